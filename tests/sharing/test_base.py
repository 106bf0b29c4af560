"""Many transfers at a time: what one failure does to the others."""

import time
from pathlib import Path

import pytest

from geomcache import waits
from geomcache.cache.inventory import Stored
from geomcache.errors import CacheMismatchError, RemoteError
from geomcache.sharing.base import damaged, errors_name, in_parallel, remote_errors
from tests.support.logs import logged_lines


def test_the_first_failure_stops_what_has_not_begun() -> None:
    begun: list[int] = []

    def operation(number: int) -> None:
        begun.append(number)
        time.sleep(0.001)
        raise RemoteError(f"{number}")

    with pytest.raises(RemoteError):
        in_parallel(operation, range(10_000))
    assert len(begun) < 10_000


def test_damaged_files_are_those_of_other_size_or_content(tmp_path: Path) -> None:
    files = {}
    for name in ("good", "changed", "short", "none"):
        (tmp_path / name).write_bytes(name.encode() * 100)
        stored = Stored.of_file(tmp_path / name)
        assert stored is not None
        files[name] = stored
    (tmp_path / "changed").write_bytes(b"CHANGED" * 100)
    (tmp_path / "short").write_bytes(b"short")
    (tmp_path / "none").unlink()
    assert damaged(tmp_path, files) == {"changed", "short", "none"}
    assert Stored.of_file(tmp_path / "none") is None
    assert Stored.of_file(tmp_path / "short") == Stored(
        5, "f9b0078b5df596d2ea19010c001bbd009e651de2c57e8fb7e355f31eb9d3f739"
    )


def test_errors_about_a_copy_name_the_address(tmp_path: Path) -> None:
    error = CacheMismatchError(f"{tmp_path}/zarr.json: views: 1, 2", "views", 1, 2)
    with pytest.raises(CacheMismatchError) as raised, errors_name("s3://bucket/name", tmp_path):
        raise error
    assert str(raised.value) == "s3://bucket/name/zarr.json: views: 1, 2"
    assert (raised.value.field, raised.value.cached, raised.value.wanted) == ("views", 1, 2)
    with pytest.raises(RemoteError) as remote, errors_name("s3://bucket/name", tmp_path):
        raise RemoteError(f"{tmp_path}/a: no")
    assert str(remote.value) == "s3://bucket/name/a: no"


def test_a_remote_that_does_not_answer_is_waited_for_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.1)
    with logged_lines() as lines, remote_errors("s3://bucket/cache.zarr/zarr.json"):
        for _ in range(200):
            if lines:
                break
            time.sleep(0.05)
    assert lines[0].startswith("s3://bucket/cache.zarr/zarr.json: waiting for an answer")
