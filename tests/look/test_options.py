"""Output files are refused before the work."""

import os
from pathlib import Path

import pytest

from geomcache.errors import UserInputError
from geomcache.look.options import check_output


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
