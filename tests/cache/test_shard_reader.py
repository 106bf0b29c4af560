"""Reading from the disk gives what reading from the page cache gives, and no file is opened more often than needed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geomcache.cache.store import GeometryStore
from tests.support.stores import expected, make_spec, make_store


def drop_pages_of(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_cold_files_are_read_as_warm_ones(tmp_path: Path, codec: str) -> None:
    path = make_store(tmp_path / "cache.zarr", spec=make_spec(grid_hw=(36, 36)), codec=codec)
    rows = np.random.default_rng(0).permutation(90)[:40]
    with GeometryStore.open(path) as store:
        warm = store.batch(rows)
        for file in path.rglob("c.*"):
            drop_pages_of(file)
        for (_, cold), (_, same) in zip(store.batch(rows).items(), warm.items(), strict=True):
            np.testing.assert_array_equal(cold.view(np.uint16), same.view(np.uint16))


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_each_shard_is_opened_once_for_a_batch_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Also where only one shard may be open at a time: alternating rows do not open the same files again and again."""
    monkeypatch.setattr("geomcache.cache.shard_reader.getrlimit", lambda _limit: (8, 8))
    path = make_store(tmp_path / "cache.zarr", codec=codec)
    store = GeometryStore.open(path)
    opened: list[str] = []
    real_open = os.open

    def counting_open(file: Any, *arguments: Any, **options: Any) -> int:
        opened.append(Path(file).relative_to(path).as_posix())
        return real_open(file, *arguments, **options)

    rows = [0, 80, 1, 81, 40, 0, 82, 41]  # of shards 0, 2 and 5
    monkeypatch.setattr(os, "open", counting_open)
    geometry = store.batch(rows)
    assert len(opened) == len({*opened}) == 3 * 5  # four arrays of maps and the checksums
    wanted = expected(store.spec, rows)
    for name, values in geometry.items():
        np.testing.assert_array_equal(values, wanted[name])


def test_batches_share_no_memory(tmp_path: Path) -> None:
    """A training loop holds a batch while the next one is read."""
    store = GeometryStore.open(make_store(tmp_path / "cache", spec=make_spec(grid_hw=(128, 128), outputs=("ray",))))
    batches = [store.batch([3, 4]), store.batch([5, 6])]
    before = batches[0].ray.copy()
    del batches[1]
    batches.append(store.batch([7, 8]))
    np.testing.assert_array_equal(batches[0].ray, before)
    assert not np.shares_memory(batches[0].ray, batches[1].ray)
