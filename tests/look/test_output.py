"""Output files: refused before the work, and complete or missing."""

import os
from pathlib import Path

import pytest

from geomcache.errors import UserInputError
from geomcache.look.output import check_output, replacing


def test_names_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("a.jpg", r"a\.jpg: .*\.png, \.mp4, .*\.jpg"),
        ("a", r"a: .*\.png, \.mp4"),
        ("none/a.png", f"{tmp_path / 'none'}, found none"),
        ("file/a.png", f"{tmp_path / 'file'}, found none"),
        ("folder.png", r"folder\.png"),
    ):
        with pytest.raises(UserInputError, match=message):
            check_output(tmp_path / name, (".png", ".mp4"))
    check_output(tmp_path / "A.PNG", (".png", ".mp4"))


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserInputError, match=str(tmp_path)):
        check_output(tmp_path / "a.png", (".png",))


def stop_half_way(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        stop_half_way(path)
    assert path.read_text() == "old"
    with replacing(path) as partial:
        assert partial.suffix == ".html"
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
