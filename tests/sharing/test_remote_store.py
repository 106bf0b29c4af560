"""Frames read where they are, against those of the cache that was pushed there."""

import gc
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

import geomcache
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheCorruptError, CacheIncompleteError, MissingFrameError, RemoteError, UserInputError
from geomcache.sharing.push import push
from geomcache.sharing.remote_store import RemoteGeometryStore
from tests.support.servers import Wire, s3_wire
from tests.support.sharing import RAY, make_small_store
from tests.support.stores import make_spec, make_store

__all__ = ["s3_wire"]

ADDRESS = "memory://made-up.zarr"
ROWS = [80, 3, 3, 45, 0, 89]


@pytest.fixture(params=["raw", "zstd"])
def there(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cache here, which is also there."""
    path = make_small_store(tmp_path / "here.zarr", codec=request.param)
    push(path, ADDRESS)
    yield path
    fsspec.filesystem("memory").store.clear()


def assert_same(remote: GeometryStore, path: Path) -> None:
    with GeometryStore.open(path) as local:
        for (name, ours), (_, theirs) in zip(remote.batch(ROWS).items(), local.batch(ROWS).items(), strict=True):
            np.testing.assert_array_equal(ours.view(np.uint16), theirs.view(np.uint16), name)
        assert remote.spec == local.spec
        assert remote.fingerprint == local.fingerprint
        assert remote.rows == local.rows
        assert remote.episodes() == local.episodes()


def test_frames_are_those_of_the_cache(there: Path) -> None:
    remote = geomcache.open(ADDRESS)
    assert isinstance(remote, RemoteGeometryStore)
    assert_same(remote, there)
    ray = remote.frame(2, 5).ray
    np.testing.assert_array_equal(ray, GeometryStore.open(there).frame(2, 5).ray)
    assert_same(pickle.loads(pickle.dumps(remote)), there)


def test_over_http(tmp_path: Path, s3_wire: Wire) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    push(path, "s3://bucket/made-up.zarr")
    assert_same(geomcache.open("s3://bucket/made-up.zarr"), path)


def test_the_copy_of_the_metadata_goes_with_the_object(there: Path) -> None:
    remote = geomcache.open(ADDRESS)
    folder = remote.path
    assert (folder / "zarr.json").exists()
    assert not (folder / RAY / "c.0.0.0.0").exists()
    del remote
    gc.collect()
    assert not folder.exists()


def test_a_damaged_map_is_named(there: Path) -> None:
    remote = geomcache.open(ADDRESS)
    flip(f"{RAY}/c.0.0.0.0", 7)
    with pytest.raises(RemoteError, match=rf"{ADDRESS}: "):
        remote.batch([0])
    assert remote.batch([20]).ray.shape[0] == 1


def test_two_maps_that_changed_places_are_found(there: Path) -> None:
    """Their own checksums are right: only the table knows where they belong."""
    remote = geomcache.open(ADDRESS)
    memory = fsspec.filesystem("memory")
    first, second = (f"/made-up.zarr/{RAY}/c.{shard}.0.0.0" for shard in (0, 1))
    contents = memory.cat_file(first), memory.cat_file(second)
    memory.pipe_file(first, contents[1])
    memory.pipe_file(second, contents[0])
    with pytest.raises(CacheCorruptError, match=rf"{ADDRESS}/{RAY}: episode 0 frame 3: .*[0-9a-f]{{8}}.*[0-9a-f]{{8}}"):
        remote.batch([3])


def test_a_missing_shard_is_no_nan(there: Path) -> None:
    remote = geomcache.open(ADDRESS)
    fsspec.filesystem("memory").rm_file(f"/made-up.zarr/{RAY}/c.1.0.0.0")
    with pytest.raises(CacheCorruptError):
        remote.batch([16])


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    path = make_store(tmp_path / "part.zarr", [(0, 20)], spec=make_spec())
    push(path, "memory://part.zarr")
    remote = geomcache.open("memory://part.zarr")
    with pytest.raises(MissingFrameError):
        remote.batch([20])
    with pytest.raises(UserInputError):
        remote.batch([90])
    fsspec.filesystem("memory").store.clear()


def test_no_whole_cache(there: Path) -> None:
    fsspec.filesystem("memory").rm_file("/made-up.zarr/manifest.json")
    with pytest.raises(CacheIncompleteError, match=f"{ADDRESS}: .*manifest.json.*geomcache push"):
        geomcache.open(ADDRESS)


def test_metadata_that_was_changed(there: Path) -> None:
    flip(f"{RAY}/zarr.json", 20)
    with pytest.raises(CacheCorruptError, match=rf"{ADDRESS}/{RAY}/zarr\.json"):
        geomcache.open(ADDRESS)


def flip(name: str, at: int) -> None:
    memory = fsspec.filesystem("memory")
    content = bytearray(memory.cat_file(f"/made-up.zarr/{name}"))
    content[at] ^= 1
    memory.pipe_file(f"/made-up.zarr/{name}", bytes(content))
