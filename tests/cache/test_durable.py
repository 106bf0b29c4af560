"""File operations that last, or leave what was there."""

import contextlib
import ctypes
import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache import durable
from geomcache.errors import OutOfSpaceError
from tests.support.stores import Faults


def test_a_file_holds_its_parts_and_gives_their_size_and_hash(tmp_path: Path) -> None:
    parts: list[bytes | NDArray[np.uint8]] = [b"abc", np.arange(6, dtype=np.uint8).reshape(2, 3)]
    nbytes, digest = durable.write_file(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"abc\0\1\2\3\4\5"
    assert (nbytes, digest) == (9, hashlib.sha256(b"abc\0\1\2\3\4\5").digest())


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "write", lambda descriptor, data: os.write(descriptor, data[:3]))
    durable.write_file(tmp_path / "file", [bytes(range(100)), b"end"])
    assert (tmp_path / "file").read_bytes() == bytes(range(100)) + b"end"
    monkeypatch.setattr(durable, "write", lambda descriptor, data: 0)
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        durable.write_file(tmp_path / "file", [b"abc"])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    faults = Faults(monkeypatch)
    faults.start(1, OSError(code, os.strerror(code)))
    with pytest.raises(OutOfSpaceError, match=f"{tmp_path}/file: .*{os.strerror(code)}"):
        durable.write_file(tmp_path / "file", [b"abc"])


def test_other_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    for at in range(3):  # open, write, fsync
        faults.start(at, OSError(errno.EIO, os.strerror(errno.EIO)))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
            durable.write_file(tmp_path / "file", [b"abc"])
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == str(tmp_path / "file")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults, path = Faults(monkeypatch), tmp_path / "file"
    path.write_bytes(b"old")
    faults.start()
    durable.replace_file(path, b"new")
    for at in range(faults.count):
        path.write_bytes(b"old")
        faults.start(at, OSError(errno.EIO, "played"))
        with pytest.raises(OSError, match="played"):
            durable.replace_file(path, b"new")
        assert path.read_bytes() in (b"old", b"new")


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Somebody else's file, to which links lead."""
    (tmp_path / "elsewhere").write_bytes(b"two years")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("dangling", [False, True])
def test_a_planted_link_is_not_followed(tmp_path: Path, planted: Path, dangling: bool) -> None:
    if dangling:
        planted.unlink()
    for link in ("file", "run.yaml.tmp", ".picture.tmp.png"):
        (tmp_path / link).symlink_to(planted)
    durable.write_file(tmp_path / "file", [b"mine"])
    durable.replace_file(tmp_path / "run.yaml", b"mine")
    with durable.replacing(tmp_path / "picture.png") as draft:
        draft.write_bytes(b"mine")
    for name in ("file", "run.yaml", "picture.png"):
        assert (tmp_path / name).read_bytes() == b"mine"
        assert not (tmp_path / name).is_symlink()
    assert planted.exists() == (not dangling)
    assert dangling or planted.read_bytes() == b"two years"


def test_a_file_that_is_a_link_is_not_appended_to(tmp_path: Path, planted: Path) -> None:
    (tmp_path / "journal").symlink_to(planted)
    with pytest.raises(OSError, match="journal"):
        durable.open_file(tmp_path / "journal", os.O_APPEND)


def test_a_stale_temporary_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").write_bytes(b"left by a run that was killed, and longer")
    durable.replace_file(tmp_path / "file", b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"new"}


def test_a_written_file_replaces_another_one_or_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), durable.replacing(path) as draft:
        assert (draft.parent, draft.suffix) == (tmp_path, ".png")
        draft.write_bytes(b"half")
        raise KeyboardInterrupt
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"picture.png": b"old"}
    with durable.replacing(path) as draft:
        draft.write_bytes(b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"picture.png": b"new"}


def test_names_are_exchanged_at_once(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    assert durable.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "content").read_text() == "other"
    assert (tmp_path / "other" / "content").read_text() == "one"
    with pytest.raises(FileNotFoundError) as caught:
        durable.exchange(tmp_path / "one", tmp_path / "none")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "one"), str(tmp_path / "none"))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, None])
def test_a_system_without_exchange_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    def renameat2(*arguments: object) -> int:
        ctypes.set_errno(code or 0)
        return -1

    monkeypatch.setattr(durable, "_renameat2", lambda: None if code is None else renameat2)
    (tmp_path / "one").touch()
    (tmp_path / "other").touch()
    assert not durable.exchange(tmp_path / "one", tmp_path / "other")
