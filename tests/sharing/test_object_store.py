"""Caches in an S3 bucket, through s3fs and a real server, with the connection cut; and the errors of drivers."""

import errno
import functools
import sys
import threading
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from geomcache.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheNotFoundError,
    ConnectionFailedError,
    RemoteError,
)
from geomcache.sharing.base import remote_errors
from geomcache.sharing.object_store import FsspecRemote
from geomcache.sharing.pull import pull
from geomcache.sharing.push import UNSEALED, push
from tests.support.servers import Wire, s3_wire
from tests.support.sharing import CONTROL, FILES, RAY, assert_reads, contents, make_small_store, said

__all__ = ["s3_wire", "said"]

ADDRESS = "s3://bucket/caches/made-up.zarr"
PULLING = ".there.zarr.geomcache-pull"


def test_pushed_and_pulled_with_the_connection_cut_once_each(tmp_path: Path, s3_wire: Wire, said: list[str]) -> None:
    path, target = make_small_store(tmp_path / "here.zarr"), tmp_path / "there.zarr"
    s3_wire.cut_after(6_000)  # of answers: about ten files go through
    with pytest.raises(ConnectionFailedError, match=ADDRESS):
        push(path, ADDRESS)
    s3_wire.mend()
    there = FsspecRemote(ADDRESS).listing()
    assert "manifest.json" not in there
    assert UNSEALED in there
    with pytest.raises(CacheIncompleteError, match=f"{ADDRESS}: .*manifest.json.*geomcache push"):
        pull(ADDRESS, target)
    sent = push(path, ADDRESS, verify=True).sent
    assert 0 < sent < FILES + CONTROL
    assert FsspecRemote(ADDRESS).listing().keys() == contents(path).keys()
    assert push(path, ADDRESS).sent == 0

    s3_wire.cut_after(40_000)
    with pytest.raises(ConnectionFailedError, match=ADDRESS):
        pull(ADDRESS, target)
    assert s3_wire.cuts > 1
    assert not target.exists()
    kept = {
        name for name, content in contents(tmp_path / PULLING).items() if content == contents(path).get(name)
    }  # a file that was cut off stays, too, and is downloaded again
    assert kept
    s3_wire.mend()
    report = pull(ADDRESS, target)
    assert report.fetched == FILES - len(kept)
    assert f"{len(kept)} are there already" in " ".join(said)
    assert contents(target) == contents(path)
    assert_reads(target, list(range(90)))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["here.zarr", "there.zarr"]
    assert not any("made-up-secret" in line for line in said)


def test_a_file_that_is_not_the_manifests_is_refused_by_name(tmp_path: Path, s3_wire: Wire) -> None:
    push(make_small_store(tmp_path / "here.zarr"), ADDRESS)
    store = fsspec.filesystem("s3")
    damaged = f"bucket/caches/made-up.zarr/{RAY}/c.2.0.0.0"
    content = store.cat_file(damaged)
    store.pipe_file(damaged, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CacheCorruptError, match=rf"s3://{damaged}: .* {len(content)} .*{sha256(content).hexdigest()}"
    ) as raised:
        pull(ADDRESS, tmp_path / "there.zarr")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "there.zarr").exists()
    store.rm_file(damaged)
    with pytest.raises(CacheCorruptError, match=rf"{ADDRESS}/{RAY}/c.2.0.0.0: .* {len(content)} .* none"):
        pull(ADDRESS, tmp_path / "there.zarr")


def test_what_s3_refuses_is_told_in_one_line(tmp_path: Path, s3_wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    with pytest.raises(RemoteError, match="no-such-bucket") as raised:
        push(path, "s3://no-such-bucket/cache.zarr")
    assert not isinstance(raised.value, ConnectionFailedError)  # trying again would not help
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    type(fsspec.filesystem("s3")).clear_instance_cache()
    with pytest.raises(RemoteError, match="aws configure"):
        pull("s3://bucket/none.zarr", tmp_path / "there.zarr")


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(RemoteError, match=r"pip install 'geomcache\[s3\]'"):
        FsspecRemote("s3://bucket/cache.zarr")
    with pytest.raises(RemoteError, match="no-such-scheme://bucket/cache.zarr: "):
        FsspecRemote("no-such-scheme://bucket/cache.zarr")


def test_errors_that_pass_are_told_from_errors_that_stay() -> None:
    for error, passing in {
        TimeoutError("slow"): True,
        ConnectionResetError("cut"): True,
        OSError(errno.EIO, "an answer with status 500"): True,
        OSError(errno.ENOSPC, "full"): False,
        FileNotFoundError("gone"): False,
        PermissionError("no"): False,
        ValueError("not its protocol"): False,
    }.items():
        with pytest.raises(RemoteError) as raised, remote_errors("s3://bucket/name"):
            raise error
        assert isinstance(raised.value, ConnectionFailedError) == passing, error
        assert str(raised.value).startswith("s3://bucket/name: ")
    with pytest.raises(KeyError), remote_errors("s3://bucket/name"):  # a bug is no answer of a remote
        raise KeyError("name")


def test_a_passing_failure_is_tried_again_by_the_driver(tmp_path: Path, s3_wire: Wire) -> None:
    push(make_small_store(tmp_path / "here.zarr"), ADDRESS)
    s3_wire.cut_after(20_000, once=True)
    assert pull(ADDRESS, tmp_path / "there.zarr").fetched == FILES
    assert s3_wire.cuts == 1


def test_no_more_is_read_than_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").write_bytes(b"x" * 1000)
    place, copy = FsspecRemote(f"file://{tmp_path}/cache"), tmp_path / "copy"
    with pytest.raises(CacheCorruptError, match=rf"{tmp_path}/cache/file: .* 10 bytes"):
        place.fetch("file", 10, copy)
    assert (copy / "file").stat().st_size == 11  # one more, so that the file is known to be longer
    assert place.fetch("file", 1000, copy)
    assert (copy / "file").read_bytes() == b"x" * 1000
    assert not place.fetch("none", 10, copy)
    assert place.address == f"file://{tmp_path}/cache"
    assert FsspecRemote("memory://name:secret@host/cache").address == "memory://host/cache"


def test_a_cache_on_a_web_server_is_pulled(tmp_path: Path) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/here.zarr"
        pull(address, tmp_path / "there.zarr", episodes="1")
        pull(address, tmp_path / "there.zarr")
        with pytest.raises(CacheNotFoundError, match=f"{address}/none"):
            pull(f"{address}/none", tmp_path / "none.zarr")
        server.shutdown()
    assert contents(tmp_path / "there.zarr") == contents(path)
