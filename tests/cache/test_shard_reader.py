"""Reading from the disk and from the page cache gives the same; what is asked for ahead is what will be read."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache import shard_reader
from geomcache.cache.store import GeometryStore
from tests.support.stores import make_spec, make_store


@pytest.mark.parametrize("cells", [(3, 4), (36, 36)])  # read as bytes and joined; read into their places
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_cold_files_are_read_as_warm_ones(tmp_path: Path, cells: tuple[int, int], codec: str) -> None:
    path = make_store(tmp_path / "cache.zarr", spec=make_spec(grid_hw=cells), codec=codec)
    rows = np.random.default_rng(0).permutation(90)[:40]
    with GeometryStore.open(path) as store:
        warm = store.batch(rows)
        for file in path.rglob("c.*"):
            drop_pages_of(file)
        for (_, cold), (_, expected) in zip(store.batch(rows).items(), warm.items(), strict=True):
            np.testing.assert_array_equal(cold.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_all_reads_are_announced_where_the_first_would_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool, codec: str
) -> None:
    path = make_store(tmp_path / "cache.zarr", codec=codec)
    announced, read = [], []
    pread = os.pread

    def advise(_: int, offset: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        announced.append((offset, nbytes))

    def watched(descriptor: int, nbytes: int, offset: int) -> bytes:
        read.append((offset, nbytes))
        return pread(descriptor, nbytes, offset)

    with GeometryStore.open(path) as store:
        store.batch([0, 89])  # opens the shards
        monkeypatch.setattr(shard_reader, "_would_wait", lambda *_: waits)
        monkeypatch.setattr(os, "posix_fadvise", advise)
        monkeypatch.setattr(os, "pread", watched)
        store.batch([80, 0, 89])
    assert len(read) == 3 * 2 * 2
    assert announced == (read if waits else [])


def test_a_page_that_is_in_memory_needs_no_wait(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10_000))
    with file.open("rb") as opened:
        opened.read()
        assert not shard_reader._would_wait(opened.fileno(), 5_000)


def test_a_page_that_is_on_disk_does(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10_000))

    def kernel_says_so(descriptor: int) -> bool:
        try:
            os.preadv(descriptor, [bytearray(1)], 5_000, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError as error:
            pytest.skip(f"this file system cannot tell: {error}")
        return False

    def is_said_of_a_dropped_page(says: Callable[[int], bool]) -> bool:
        # Each look drops the page anew: the kernel starts to read what it was asked for, so a second look may find it.
        for _ in range(20):
            drop_pages_of(file)
            with file.open("rb") as opened:
                if says(opened.fileno()):
                    return True
        return False

    if not is_said_of_a_dropped_page(kernel_says_so):
        pytest.skip("this file system keeps its files in memory")
    assert is_said_of_a_dropped_page(lambda descriptor: shard_reader._would_wait(descriptor, 5_000))


def test_the_kernel_is_asked_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def absent(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        asked.append((descriptor, [len(buffer) for buffer in buffers], offset, flags))
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", absent)
    assert shard_reader._would_wait(17, 5_000)
    assert asked == [(17, [1], 5_000, os.RWF_NOWAIT)]


def test_a_file_system_that_cannot_tell_is_no_failure() -> None:
    reading, writing = os.pipe()
    assert not shard_reader._would_wait(reading, 0)  # a pipe has no offsets: OSError
    os.close(reading)
    os.close(writing)


def drop_pages_of(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
