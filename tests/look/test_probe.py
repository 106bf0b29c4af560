"""`geomcache probe`: its numbers against upstream's network, and its picture."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geomcache.errors import UserInputError
from geomcache.look.drawing import PANEL
from geomcache.look.probe import SCALE, probe
from tests.support.da3 import area_average, upstream_maps, upstream_network


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "geomcache.look")


def write_picture(path: Path, height: int = 48, width: int = 64, seed: int = 0) -> Path:
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(path)
    return path


def printed(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What probe itself logs: another test may have lowered the level of all loggers."""
    return [record.getMessage() for record in caplog.records if record.name == "geomcache.look.probe"]


def test_numbers_are_upstreams(random_da3_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [write_picture(tmp_path / "front.png"), write_picture(tmp_path / "wrist cam.png", seed=1)]
    probe(str(random_da3_folder), images, tmp_path / "out", process_res=56, grid="3x3", device="cpu")
    lines = printed(caplog)
    native = upstream_maps(upstream_network(random_da3_folder), [np.asarray(Image.open(path)) for path in images], 56)

    shown: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if match := re.match(r"( *\w+) +(\[.*?\]) +min (\S+)  mean (\S+)  max (\S+)$", line):
            shown[match[1], match[2]] = [float(match[group]) for group in (3, 4, 5)]
    assert len(shown) == 8
    for name, values in native.items():
        trailing = ", 6]" if name == "ray" else "]"
        for indent, cells in (("", (24, 32)), ("  ", (3, 3))):
            expected = area_average(values, cells)
            numbers = shown[indent + name, f"[2, {cells[0]}, {cells[1]}{trailing}"]
            np.testing.assert_allclose(numbers, [expected.min(), expected.mean(), expected.max()], rtol=2e-3, atol=1e-3)
    assert "2 views, seen as 42x56, fp32 on cpu" in lines[1]
    assert any(line.startswith("tokens     3x3 grid, 2 x 3 x 3") for line in lines)
    assert lines[-1] == f"picture    {tmp_path / 'out' / 'probe.png'}"


def test_picture_has_a_strip_for_each_view(random_da3_folder: Path, tmp_path: Path) -> None:
    images = [write_picture(tmp_path / "front.png"), write_picture(tmp_path / "wrist.png", seed=1)]
    probe(str(random_da3_folder), images, tmp_path, process_res=56, device="cpu")
    sheet = np.asarray(Image.open(tmp_path / "probe.png"))
    probe(str(random_da3_folder), images[:1], tmp_path, process_res=56, device="cpu")
    one = np.asarray(Image.open(tmp_path / "probe.png"))
    assert sheet.shape[1] == one.shape[1] > 7 * PANEL * SCALE
    row = round(PANEL * 48 / 64) * SCALE
    assert one.shape[0] > row
    assert sheet.shape[0] - one.shape[0] >= row
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000  # colours, not one flat surface


def test_pictures_of_different_sizes_and_turned_ones(
    random_da3_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = write_picture(tmp_path / "a.png", 48, 64), write_picture(tmp_path / "b.png", 96, 128)
    probe(str(random_da3_folder), [small, large], tmp_path, process_res=56, device="cpu")
    assert "2 views, seen as 42x56" in printed(caplog)[1]  # one size for the network
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    Image.open(small).save(tmp_path / "turned.png", exif=turned)
    caplog.clear()
    probe(str(random_da3_folder), [tmp_path / "turned.png"], tmp_path, process_res=56, device="cpu")
    assert "1 view, seen as 56x42" in printed(caplog)[1]
    square = write_picture(tmp_path / "square.png", 40, 40)
    with pytest.raises(UserInputError, match=r"0-a\.png 42x56, 1-square\.png 56x56"):
        probe(str(random_da3_folder), [small, square], tmp_path, process_res=56, device="cpu")


def test_files_that_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no picture")
    whole = write_picture(tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, reason in (("text.png", ""), ("cut.png", ""), ("none.png", "No such file or directory")):
        with pytest.raises(UserInputError, match=re.escape(f"image {tmp_path / name}: ") + f".*{reason}"):
            probe("DA3-SMALL", [tmp_path / name], tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # whole.png has 3,072: more than twice as many is an error
    with pytest.raises(UserInputError, match="3072 pixels"):
        probe("DA3-SMALL", [tmp_path / "whole.png"], tmp_path)
    with pytest.raises(UserInputError, match=r"output .*whole\.png"):
        probe("DA3-SMALL", [tmp_path / "whole.png"], tmp_path / "whole.png")
