"""`geomcache report`: its numbers against NumPy on the maps themselves, and the page as a browser's parser sees it."""

import base64
import dataclasses
import io
import logging
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheIncompleteError, DatasetNotFoundError, UserInputError
from geomcache.look import charts
from geomcache.look import gather as gather_module
from geomcache.look import page as page_module
from geomcache.look.charts import histogram, over_time
from geomcache.look.gather import choose_rows, disk_use, gather, lowest_confidence
from geomcache.look.options import ReportOptions
from geomcache.look.page import write_page
from geomcache.look.report import report
from tests.support.scene import KEYS, LENGTHS, Scene, make_scene, scene_maps
from tests.support.stores import make_store, open_writer

TOTAL = sum(LENGTHS)
EDGES: NDArray[np.float64] = np.linspace(0.0, 4.0, 5, dtype=np.float64)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("report"))


def options(scene: Scene, tmp_path: Path, **fields: object) -> ReportOptions:
    values: dict[str, Any] = {"path": scene.cache, "output": tmp_path / "report.html", "root": scene.root, **fields}
    return ReportOptions(**values)


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "geomcache")


class Page(HTMLParser):
    """Tags that are opened and not closed, addresses, headings and text."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_the_page_is_whole_and_fetches_nothing(scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report(options(scene, tmp_path))
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'report.html'}: 12 of 12 frames, ")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.findall(r"@import|url\(|https?:|<script|<link", text)
    assert page.tags.count("h2") == 6
    # two cameras over time, and 6 + 3 channels
    assert len([address for address in page.addresses if "svg" in address]) == 2 + 9
    for part in ("ray_dx", "log ray_conf", "depth", *KEYS, "All 12 frames", "8x8", "sealed"):
        assert part in page.text
    assert "no pictures" not in page.text


def test_pictures_are_those_of_the_frames(scene: Scene, tmp_path: Path) -> None:
    report(options(scene, tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    photos = [address for address in page.addresses if address.startswith("data:image/jpeg")]
    gathered = gather(options(scene, tmp_path))
    assert [shown.row for shown in gathered.samples] == [1, 3, 5, 7, 9, 11]
    assert len(photos) == len(gathered.outliers) + 2 * len(gathered.samples)
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(photos[len(gathered.outliers)].partition(",")[2]))))
    row = gathered.samples[0].row
    assert np.abs(first.astype(int) - scene.pictures[KEYS[0]][row]).mean() < 12  # JPEG
    assert np.abs(first.astype(int) - scene.pictures[KEYS[0]][row + 1]).mean() > 24


def test_counts_and_means_are_numpys(scene: Scene, tmp_path: Path) -> None:
    gathered = gather(options(scene, tmp_path))
    maps = [[scene_maps(view, row) for row in range(TOTAL)] for view in (0, 1)]
    for view in (0, 1):
        rays = np.stack([one["ray"] for one in maps[view]]).astype(np.float64)
        for axis, channel in enumerate(("ray_dx", "ray_dy", "ray_dz", "ray_ox", "ray_oy", "ray_oz")):
            counts = gathered.counts[view, channel]
            assert counts.total == rays[..., axis].size
            assert counts.percentile(30) == np.percentile(rays[..., axis], 30, method="inverted_cdf")
        depth = np.stack([one["depth"] for one in maps[view]]).astype(np.float64)
        assert gathered.counts[view, "depth"].percentile(100) == depth.max()
    expected = [[Scene.confidence(view, row) for view in (0, 1)] for row in range(TOTAL)]
    np.testing.assert_allclose(gathered.confidence, expected, atol=1e-3)
    assert gathered.confidence_of == "ray_conf"


def test_outliers_are_the_lowest_a_second_apart(scene: Scene, tmp_path: Path) -> None:
    gathered = gather(options(scene, tmp_path))
    found = [(outlier.shown.episode, outlier.shown.frame, outlier.view) for outlier in gathered.outliers]
    # 10 frames a second: of each camera two fit into 12 rows; the second camera's last frame is the lowest of all
    assert found[:2] == [(1, 4, 1), (0, 1, 1)]
    assert [view for _, _, view in found[2:]] == [0, 0]
    assert gathered.outliers[0].confidence == pytest.approx(Scene.confidence(1, TOTAL - 1), abs=1e-3)
    confidence = np.array([(5.0, 1.0), (2.0, 4.0), (3.0, 6.0)])
    assert lowest_confidence(np.array([10, 11, 13]), confidence, 2) == [
        (10, 1, 1.0),
        (11, 0, 2.0),
        (13, 0, 3.0),
        (13, 1, 6.0),
    ]


def test_disk_use_is_what_the_files_have(scene: Scene) -> None:
    with GeometryStore.open(scene.cache) as store:
        used = disk_use(store)
        assert sum(used.values()) == store.nbytes
    for (camera, output), nbytes in used.items():
        folder = scene.cache / camera / output
        assert nbytes == sum(file.stat().st_size for file in folder.glob("c.*"))


def test_a_large_cache_is_sampled_evenly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_store(tmp_path / "a.zarr", [(0, 20), (50, 75)])
    with GeometryStore.open(path) as store:
        assert choose_rows(store, 100).tolist() == [*range(20), *range(50, 75)]
        assert choose_rows(store, 9).tolist() == [0, 5, 10, 15, 50, 55, 60, 65, 70]
    made = ReportOptions(path=path, output=tmp_path / "a.html", rgb=False, max_frames=9)
    report(made)
    assert "9 of 45 frames" in caplog.messages[-1]
    page = Page((tmp_path / "a.html").read_text())
    assert "9 of the cache's 45 frames were read, evenly spaced" in page.text
    assert "All 90 frames will take about" in page.text
    gathered = gather(made)
    assert gathered.segments.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 2]


def test_points_stand_for_neighbouring_frames_and_no_line_spans_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "a.zarr", [(0, 20), (50, 75)])
    gathered = gather(ReportOptions(path=path, output=tmp_path / "a.html", rgb=False))
    drawn: list[list[NDArray[np.float64]]] = []

    def draw(view: int, lines: list[NDArray[np.float64]], *_: object) -> bytes:
        drawn.append(lines)
        return b""

    monkeypatch.setattr(page_module, "over_time", draw)
    monkeypatch.setattr(page_module, "GROUPS", 5)  # of 45 frames: 9 frames a point
    write_page(gathered)
    for view, lines in enumerate(drawn):
        assert [line[:, 0].tolist() for line in lines] == [[4.0, 13.0, 18.5], [53.0, 61.0, 70.0]]
        last = gathered.confidence[36:, view]
        np.testing.assert_allclose(lines[1][2, 1:], [last.sum() / 9, last.min(), last.max()])
    assert len(drawn) == len(gathered.cameras) > 1


def test_blocks_give_the_same_numbers(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gather(options(scene, tmp_path))
    monkeypatch.setattr(gather_module, "block_frames", lambda store: 5)
    parts = gather(options(scene, tmp_path))
    np.testing.assert_array_equal(parts.confidence, whole.confidence)
    for key, counts in whole.counts.items():
        assert parts.counts[key].total == counts.total
        assert parts.counts[key].percentile(50) == counts.percentile(50)


def test_a_missing_dataset_is_reported(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise DatasetNotFoundError("dataset geomcache/test: not available <from the Hub>")

    monkeypatch.setattr(gather_module, "open_pictures", missing)
    report(options(scene, tmp_path, root=None))
    assert "dataset geomcache/test: not available <from the Hub>" in caplog.messages[0]
    page = Page((tmp_path / "report.html").read_text())
    assert "dataset geomcache/test: not available <from the Hub>" in page.text
    assert not [address for address in page.addresses if "jpeg" in address]
    with pytest.raises(DatasetNotFoundError):  # one that the user named must be available
        report(options(scene, tmp_path))


def test_a_cache_without_confidence(scene: Scene, tmp_path: Path) -> None:
    bare = make_scene(tmp_path, outputs=("ray",), like=scene)
    report(options(bare, tmp_path, rgb=False, root=None))
    page = Page((tmp_path / "report.html").read_text())
    assert "neither ray_conf nor depth_conf" in page.text
    assert len([address for address in page.addresses if "svg" in address]) == 6


def test_mistakes_are_refused(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"\.html.*\.pdf"):
        options(scene, tmp_path, output=tmp_path / "a.pdf")
    with pytest.raises(UserInputError, match="max-frames: .*1.*0"):
        options(scene, tmp_path, max_frames=0)
    with pytest.raises(UserInputError, match="--root: .*--no-rgb"):
        options(scene, tmp_path, rgb=False)
    with open_writer(tmp_path / "empty.zarr"):
        pass
    with pytest.raises(CacheIncompleteError, match=r"empty\.zarr"):
        report(ReportOptions(path=tmp_path / "empty.zarr", output=tmp_path / "a.html", rgb=False))
    assert not (tmp_path / "a.html").exists()


def svg_paths(chart: bytes) -> dict[str, list[list[tuple[float, float]]]]:
    """Return the points of an SVG's lines by their colour, those of a band (no stroke) by its fill."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for element in ET.fromstring(chart).iter("{http://www.w3.org/2000/svg}path"):
        colour = re.search(r"(?:stroke|fill): (#\w+)", element.get("style", ""))
        points = re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", element.get("d", ""))
        if colour is not None:
            found.setdefault(colour[1], []).append([(float(x), float(y)) for x, y in points])
    return found


MEANS = [[(0.0, 1.0), (10.0, 2.0)], [(90.0, 2.0), (100.0, 1.0)]]


def test_lines_break_at_the_gaps_of_the_cache() -> None:
    lines = [np.array([[time, mean, mean, mean] for time, mean in line]) for line in MEANS]
    chart = over_time(0, lines, (1.0, 3.0), (0, 100), "ray_conf", [50])
    first, second = [points for points in svg_paths(chart)[charts.series_colour(0)] if len(points) == 2]
    (x0, y0), (x10, y10) = first
    (x90, y90), (x100, y100) = second
    assert (x100 - x0) == pytest.approx(10 * (x10 - x0), rel=1e-4)
    assert (x90, y90) == pytest.approx((x0 + 9 * (x10 - x0), y10), rel=1e-4)
    assert y0 == pytest.approx(y100)
    assert y0 > y10  # SVG's y points down
    ((tick, _), (_, _)) = svg_paths(chart)["#d9dce1"][0]
    assert tick == pytest.approx((x0 + x100) / 2, rel=1e-4)


def test_a_histogram_is_as_high_as_the_share_of_its_values() -> None:
    paths = svg_paths(histogram([np.array([1, 2, 3, 4]), np.array([0, 20, 0, 0])], EDGES))
    heights = []
    for number in (0, 1):
        y = np.array(max(paths[charts.series_colour(number)], key=len))[:, 1]
        heights.append(np.unique((y.max() - y).round(3)))
    np.testing.assert_allclose(heights[0] / heights[1].max(), [0, 0.1, 0.2, 0.3, 0.4], atol=1e-3)
    np.testing.assert_allclose(heights[1] / heights[1].max(), [0, 1])


def test_charts_are_the_same_at_every_run() -> None:
    assert histogram([np.array([1, 2, 3, 4])], EDGES) == histogram([np.array([1, 2, 3, 4])], EDGES)


def test_hostile_names_stay_text(scene: Scene, tmp_path: Path) -> None:
    """A cache from elsewhere names its dataset and model; the page shows the names and runs nothing."""
    attack = '<script>alert(1)</script>{{ 7 * 7 }}"><img src=x onerror=alert(1)>'
    gathered = gather(options(scene, tmp_path))
    facts = {**gathered.facts, "dataset": {**gathered.facts["dataset"], "repo_id": attack}, "path": attack}
    facts["spec"] = {**facts["spec"], "model_id": attack, "model_revision": attack}
    hostile = dataclasses.replace(gathered, facts=facts, cameras=(attack, attack), no_pictures=attack)
    page, harmless = Page(write_page(hostile)), Page(write_page(gathered))
    assert page.tags.count("script") == 0
    assert page.tags.count("img") == harmless.tags.count("img")
    assert page.open == []
    assert page.text.count(attack) >= 8
    assert all(address.startswith("data:image/") for address in page.addresses)


def test_the_template_is_part_of_the_package() -> None:
    names = {file.name for file in files("geomcache.look").iterdir()}
    assert {"page.html.j2", "page.css"} <= names


def test_more_cameras_than_fit_are_refused(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each camera costs memory before a byte of it is read: the number in a header is not to be believed."""
    monkeypatch.setattr("geomcache.look.episode.MAX_VIEWS", 1)
    with pytest.raises(UserInputError, match=r"at most 1 .* 2"):
        gather(options(scene, tmp_path))
