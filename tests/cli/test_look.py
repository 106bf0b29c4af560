"""`geomcache view` and `geomcache report` from the command line."""

from pathlib import Path

import pytest
from PIL import Image

from geomcache.cli import main as cli
from tests.support.cli import call
from tests.support.scene import Scene, make_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


def test_view_and_report(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, page = tmp_path / "frame.png", tmp_path / "report.html"
    arguments = ["--root", scene.root, "--dataset", "geomcache/test"]
    assert call(monkeypatch, "view", scene.cache, "--episode", 1, "--frame", 2, "-o", picture, *arguments) == 0
    assert capsys.readouterr().out.startswith(f"{picture}: frame 2 of episode 1")
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert call(monkeypatch, "report", scene.cache, "-o", page, "--max-frames", 7, *arguments) == 0
    assert capsys.readouterr().out.startswith(f"{page}: 7 of 12 frames")
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["view", "--episode", 0, "-o", "a.gif"], ".png, .mp4, .rrd"),
        (["view", "--episode", 9, "-o", "a.png", "--no-rgb"], "9"),
        (["view", "--episode", 0, "--frame", 99, "--no-rgb", "-o", "a.png"], "0 to 6"),
        (["view", "--episode", 0, "--root", "none", "-o", "a.png"], "--no-rgb"),
        (["report", "-o", "a.txt"], ".html"),
        (["report", "-o", "none/a.html"], "none/a.html"),
    ],
)
def test_a_mistake_is_one_line(
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, arguments[0], scene.cache, *arguments[1:]) == cli.EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert part in message
    assert message.startswith("geomcache: ")
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
