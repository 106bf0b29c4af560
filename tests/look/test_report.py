"""`geomcache report`: its numbers against NumPy on the maps themselves, and the page as a browser's parser sees it."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheIncompleteError, DatasetNotFoundError, UserInputError
from geomcache.look import report as report_module
from geomcache.look.charts import over_time
from geomcache.look.gather import ReportOptions, choose_rows, disk_use, gather, lowest_confidence
from geomcache.look.report import report
from tests.support.scene import KEYS, LENGTHS, Scene, make_scene, scene_maps
from tests.support.stores import make_store, open_writer

TOTAL = sum(LENGTHS)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("report"))


def options(scene: Scene, tmp_path: Path, **fields: object) -> ReportOptions:
    values = {"path": scene.cache, "output": tmp_path / "report.html", "root": scene.root, **fields}
    return ReportOptions(**values)


class Page(HTMLParser):
    """Tags that are opened and not closed, addresses, headings and text."""

    VOID = ("meta", "img", "line", "polyline", "polygon", "br")

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


def test_the_page_is_whole_and_fetches_nothing(scene: Scene, tmp_path: Path) -> None:
    (line,) = report(options(scene, tmp_path))
    assert line.startswith(f"{tmp_path / 'report.html'}: 12 of 12 frames, ")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.findall(r"@import|url\(|https?:|<script|<link", text)
    assert page.tags.count("h2") == 6
    # two cameras over time, and 6 + 3 channels
    assert page.tags.count("svg") == 2 + 9
    for part in ("ray_dx", "log ray_conf", "depth", *KEYS, "All 12 frames", "8x8", "sealed"):
        assert part in page.text
    assert "no pictures" not in page.text


def test_pictures_are_those_of_the_frames(scene: Scene, tmp_path: Path) -> None:
    list(report(options(scene, tmp_path)))
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


def test_a_large_cache_is_sampled_evenly(tmp_path: Path) -> None:
    path = make_store(tmp_path / "a.zarr", [(0, 20), (50, 75)])
    with GeometryStore.open(path) as store:
        assert choose_rows(store, 100).tolist() == [*range(20), *range(50, 75)]
        assert choose_rows(store, 9).tolist() == [0, 5, 10, 15, 50, 55, 60, 65, 70]
    made = ReportOptions(path=path, output=tmp_path / "a.html", rgb=False, max_frames=9)
    (line,) = report(made)
    assert "9 of 45 frames" in line
    page = Page((tmp_path / "a.html").read_text())
    assert "9 of the cache's 45 frames were looked at, evenly spaced" in page.text
    assert "All 90 frames will take about" in page.text
    gathered = gather(made)
    assert gathered.segments.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 2]


def test_blocks_give_the_same_numbers(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gather(options(scene, tmp_path))
    monkeypatch.setattr(report_module, "block_frames", lambda store: 5)
    parts = gather(options(scene, tmp_path))
    np.testing.assert_array_equal(parts.confidence, whole.confidence)
    for key, counts in whole.counts.items():
        assert parts.counts[key].total == counts.total
        assert parts.counts[key].percentile(50) == counts.percentile(50)


def test_a_dataset_that_is_not_at_hand_is_said(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there(*_: object, **__: object) -> None:
        raise DatasetNotFoundError("dataset geomcache/test: not to be had <from the Hub>")

    monkeypatch.setattr(report_module, "open_pictures", not_there)
    lines = list(report(options(scene, tmp_path, root=None)))
    assert lines[0] == "no pictures: dataset geomcache/test: not to be had <from the Hub>"
    page = Page((tmp_path / "report.html").read_text())
    assert "Geometry alone, without the cameras' pictures: dataset geomcache/test: not to be had <from" in page.text
    assert not [address for address in page.addresses if "jpeg" in address]
    with pytest.raises(DatasetNotFoundError):  # one that was named has to be there
        list(report(options(scene, tmp_path)))


def test_no_confidence_is_said(scene: Scene, tmp_path: Path) -> None:
    bare = make_scene(tmp_path, outputs=("ray",), like=scene)
    list(report(options(bare, tmp_path, rgb=False, root=None)))
    page = Page((tmp_path / "report.html").read_text())
    assert "The cache has neither ray_conf nor depth_conf" in page.text
    assert page.tags.count("svg") == 6


def test_what_cannot_be(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"ends in \.html, got \.pdf"):
        options(scene, tmp_path, output=tmp_path / "a.pdf")
    with pytest.raises(UserInputError, match="max-frames: expected at least 1, got 0"):
        options(scene, tmp_path, max_frames=0)
    with pytest.raises(UserInputError, match="--root: expected none with --no-rgb"):
        options(scene, tmp_path, rgb=False)
    with open_writer(tmp_path / "empty.zarr"):
        pass
    with pytest.raises(CacheIncompleteError, match="expected frames to report on, found none"):
        list(report(ReportOptions(path=tmp_path / "empty.zarr", output=tmp_path / "a.html", rgb=False)))
    assert not (tmp_path / "a.html").exists()


def test_lines_break_where_the_cache_has_gaps() -> None:
    groups = [(0.0, 1.0, 1.0, 1.0, 1), (10.0, 2.0, 1.5, 3.0, 1), (90.0, 2.0, 2.0, 2.0, 2), (100.0, 1.0, 1.0, 1.0, 2)]
    chart = over_time("front", 0, groups, (1.0, 3.0), (0, 100), [50])
    lines = re.findall(r'<polyline points="([^"]*)"', chart)
    assert lines == ["0.00,98.00 10.00,50.00", "90.00,50.00 100.00,98.00"]
    assert re.findall(r'<polygon points="([^"]*)"', chart)[0] == "0.00,98.00 10.00,74.00 10.00,2.00 0.00,98.00"
    assert 'x1="50.00"' in chart
