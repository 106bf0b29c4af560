"""Caches that are fetched shard by shard as they are needed: equal to the local one, within the disk's bound."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache.header import LOCK
from geomcache.cache.locks import LockFile
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheCorruptError, CacheError, ConnectionFailedError, UserInputError
from geomcache.sharing import base, fetching_store
from geomcache.sharing.fetching_store import FetchingGeometryStore, open_for_training
from geomcache.sharing.local_shards import Unit
from geomcache.sharing.object_store import FsspecRemote
from geomcache.sharing.push import push
from tests.support.servers import Wire, patient_s3, s3_wire
from tests.support.sharing import RAY, make_small_store, said
from tests.support.stores import make_store

__all__ = ["patient_s3", "s3_wire", "said"]

ADDRESS, S3 = "memory://made-up.zarr", "s3://bucket/made-up.zarr"
PLENTY = 10**9
ROWS = np.arange(90)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GEOMCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(base, "FIRST_PAUSE_S", 0.01)
    yield
    fsspec.filesystem("memory").store.clear()


def open_fetching(address: str, disk: int = PLENTY) -> FetchingGeometryStore:
    store = open_for_training(address, disk)
    assert isinstance(store, FetchingGeometryStore)
    return store


def assert_equal(store: GeometryStore, local: GeometryStore, rows: NDArray[np.int64]) -> None:
    for (name, ours), (_, theirs) in zip(store.batch(rows).items(), local.batch(rows).items(), strict=True):
        np.testing.assert_array_equal(ours.view(np.uint16), theirs.view(np.uint16), name)


def on_disk(folder: Path) -> int:
    """Bytes of the shards' files, also of those that are being fetched.

    Nothing is removed or begun meanwhile, so that it is what is there at one moment; a file that is given its name
    meanwhile counts once.
    """
    sizes: dict[int, int] = {}
    with contextlib.closing(LockFile(folder / LOCK)) as lock, lock.exclusive():
        for parent, _, names in os.walk(folder):
            for name in names:
                if name.startswith("c.") and "episode" not in parent and "frame_index" not in parent:
                    with contextlib.suppress(FileNotFoundError):
                        status = (Path(parent) / name).stat()
                        sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_every_row_and_signature_is_that_of_the_cache(tmp_path: Path, codec: str) -> None:
    local = GeometryStore.open(make_store(tmp_path / "here.zarr", codec=codec))
    push(local.path, ADDRESS)
    order = np.random.default_rng(0).permutation(90)
    for disk in (PLENTY, 20_000):
        store = open_fetching(ADDRESS, disk)
        assert store.local.fits == (disk == PLENTY)
        for rows in np.split(order, 9):
            assert_equal(store, local, rows)
        np.testing.assert_array_equal(store.signatures(order).hashes, local.signatures(order).hashes)
        np.testing.assert_array_equal(store.signatures(order).means, local.signatures(order).means)
        assert (store.spec, store.rows, store.fingerprint) == (local.spec, local.rows, local.fingerprint)
        store.close()


def test_a_shard_is_fetched_when_a_row_of_it_is_read_and_once(tmp_path: Path) -> None:
    local = GeometryStore.open(make_small_store(tmp_path / "here.zarr"))
    push(local.path, ADDRESS)
    store = open_fetching(ADDRESS)
    assert on_disk(store.path) == 0
    for rows, shards in (([0, 15, 3], 1), ([0, 40], 2), ([41, 1], 2), (list(range(90)), 6)):
        assert_equal(store, local, np.array(rows))
        assert store.local.fetched == shards
    copy = pickle.loads(pickle.dumps(store))
    fsspec.filesystem("memory").store.clear()  # neither a copy nor another read asks for anything now
    assert_equal(copy, local, ROWS)
    assert copy.local.fetched == 0


def test_the_shards_that_were_used_least_recently_go(tmp_path: Path) -> None:
    local = GeometryStore.open(make_small_store(tmp_path / "here.zarr"))
    push(local.path, ADDRESS)
    size = open_fetching(ADDRESS).local.size(Unit(0))
    store = open_fetching(ADDRESS, 3 * size)
    for row in (0, 16, 32, 1, 48):  # shards 0, 1, 2, 0 again, 3
        assert_equal(store, local, np.array([row]))
    assert [store.local.is_here(Unit(shard)) for shard in range(6)] == [True, False, True, True, False, False]
    assert on_disk(store.path) == 3 * size


def test_a_disk_that_holds_no_shard_is_refused(tmp_path: Path) -> None:
    push(make_small_store(tmp_path / "here.zarr"), ADDRESS)
    with pytest.raises(UserInputError, match=f"cache-disk: .*{ADDRESS}"):
        open_for_training(ADDRESS, 1000)


def read_at_random(store: GeometryStore, local: Path, seed: int, errors: Any) -> None:
    reference = GeometryStore.open(local)
    generator = np.random.default_rng(seed)
    for _ in range(8):
        rows = generator.integers(0, 90, size=8)
        if not np.array_equal(store.batch(rows).ray.view(np.uint16), reference.batch(rows).ray.view(np.uint16)):
            errors.put(f"rows {rows}")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_share_the_disk_and_its_bound_holds_at_every_moment(
    tmp_path: Path, s3_wire: Wire, method: str
) -> None:
    local = GeometryStore.open(make_small_store(tmp_path / "here.zarr"))
    push(local.path, S3)
    size = open_fetching(S3).local.size(Unit(0))
    bound = int(2.5 * size)
    store = open_fetching(S3, bound)
    context: Any = multiprocessing.get_context(method)
    errors = context.Queue()
    workers = [
        context.Process(target=read_at_random, args=(store, local.path, seed, errors))
        for seed in range(4 if method == "fork" else 2)
    ]
    for worker in workers:
        worker.start()
    most = 0
    while any(worker.is_alive() for worker in workers):
        most = max(most, on_disk(store.path))
        time.sleep(0.001)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    assert errors.empty()
    assert 0 < most <= bound


def test_a_cut_connection_is_retried_and_then_an_error_with_shard_and_address(tmp_path: Path, s3_wire: Wire) -> None:
    local = GeometryStore.open(make_small_store(tmp_path / "here.zarr"))
    push(local.path, S3)
    store = open_fetching(S3)
    s3_wire.cut_after(3000, once=True)
    assert_equal(store, local, np.array([0, 20]))
    assert s3_wire.cuts == 1
    s3_wire.cut_after(1500)
    with pytest.raises(ConnectionFailedError, match=rf"{S3}/.*/c\.2\..*: shard 2: "):
        store.batch([40])
    s3_wire.mend()
    assert_equal(store, local, ROWS)


def test_connections_cut_at_random_give_no_wrong_row(tmp_path: Path, s3_wire: Wire) -> None:
    local = GeometryStore.open(make_store(tmp_path / "here.zarr"))
    push(local.path, S3)
    store = open_fetching(S3, 20_000)
    s3_wire.latency_s = 0.002
    s3_wire.cut_at_random(20_000, seed=3)
    generator, failed = np.random.default_rng(0), 0
    for _ in range(12):
        rows = generator.integers(0, 90, size=4)
        try:
            assert_equal(store, local, rows)
        except ConnectionFailedError as error:
            assert S3 in str(error)
            failed += 1
    assert s3_wire.cuts > 5
    assert failed < 12


def test_a_damaged_object_is_named_and_never_read(tmp_path: Path) -> None:
    local = GeometryStore.open(make_small_store(tmp_path / "here.zarr"))
    push(local.path, ADDRESS)
    memory, name = fsspec.filesystem("memory"), f"{ADDRESS}/{RAY}/c.1.0.0.0"
    content = memory.cat_file(name)
    store = open_fetching(ADDRESS)
    for damaged in (content[:50] + bytes([content[50] ^ 1]) + content[51:], content + b"more", None):
        memory.rm_file(name)
        if damaged is not None:
            memory.pipe_file(name, damaged)
        if damaged is not None and len(damaged) > len(content):
            continue  # what follows is not asked for
        with pytest.raises(CacheCorruptError, match=rf"{name}: shard 1: expected {len(content)} bytes"):
            store.batch([3, 16])
    memory.pipe_file(name, content[:-10])
    with pytest.raises(CacheError, match=rf"{name}: shard 1: "):
        store.batch([16])
    memory.pipe_file(name, content)
    assert_equal(store, local, ROWS)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_is_killed_while_it_fetches_leaves_nothing_wrong(tmp_path: Path, s3_wire: Wire) -> None:
    local = GeometryStore.open(make_small_store(tmp_path / "here.zarr"))
    push(local.path, S3)
    size = open_fetching(S3).local.size(Unit(0))
    store = open_fetching(S3, 3 * size)
    s3_wire.latency_s = 0.05
    context = multiprocessing.get_context("fork")
    for pause in (0.02, 0.06, 0.1, 0.14):
        process = context.Process(target=store.batch, args=([*range(0, 90, 7)],))
        process.start()
        time.sleep(pause)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    s3_wire.latency_s = 0.0
    assert_equal(store, local, ROWS)
    assert on_disk(store.path) <= 3 * size


def test_shards_are_fetched_ahead_in_the_samplers_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = GeometryStore.open(make_small_store(tmp_path / "here.zarr"))
    push(local.path, ADDRESS)
    store = open_fetching(ADDRESS)
    order = [80, 0, 50, 20, 40, 70, 1]
    rows = store.expect(iter(order), lambda row: row)
    assert next(rows) == 80
    wait_until(lambda: store.local.fetched == 6)  # of every row that follows, before it is asked for
    assert list(rows) == order[1:]
    assert_equal(store, local, ROWS)
    assert store.local.fetched == 6
    store.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_who_reads_waits_for_what_is_fetched_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    local = GeometryStore.open(make_small_store(tmp_path / "here.zarr"))
    push(local.path, ADDRESS)
    store, reading = open_fetching(ADDRESS), open_fetching(ADDRESS)
    fetch, may_go_on = FsspecRemote.fetch_whole, threading.Event()

    def slow(self: FsspecRemote, name: str, size: int, folder: Path) -> bool:
        assert may_go_on.wait(30)
        return fetch(self, name, size, folder)

    monkeypatch.setattr(FsspecRemote, "fetch_whole", slow)
    monkeypatch.setattr(fetching_store, "PARALLEL_TRANSFERS", 1)  # the others wait for their turn
    list(store.expect(iter(ROWS), lambda row: row))  # every shard is on its way
    reader = threading.Thread(target=assert_equal, args=(reading, local, ROWS))
    reader.start()
    if stopped:
        store.close()  # shards whose turn has not come are given up
    may_go_on.set()
    reader.join(30)
    shards = -(-len(ROWS) // local.shard_frames)
    assert store.local.fetched + reading.local.fetched == shards
    assert (reading.local.fetched > 0) == stopped
    store.close()
    reading.close()


def test_a_sampler_that_goes_on_after_its_store_was_closed_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(make_small_store(tmp_path / "here.zarr"), ADDRESS)
    store, other = open_fetching(ADDRESS), open_fetching(ADDRESS)
    monkeypatch.setattr(fetching_store, "AHEAD_ROWS", 0)
    rows = store.expect(iter([0, 80]), lambda row: row)
    assert next(rows) == 0
    store.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        next(rows)
    unit = Unit(80 // other.shard_frames)
    assert other.local.claim_missing(unit)
    other.local.release(unit)
    other.close()


def test_an_error_ahead_is_one_of_whoever_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(make_small_store(tmp_path / "here.zarr"), ADDRESS)
    store = open_fetching(ADDRESS)
    tried = threading.Event()

    def broken(self: FsspecRemote, name: str, size: int, folder: Path) -> bool:
        tried.set()
        raise CacheCorruptError(f"{name}: broken")

    monkeypatch.setattr(FsspecRemote, "fetch_whole", broken)
    assert list(store.expect(iter([0, 1]), lambda row: row)) == [0, 1]
    assert tried.wait(10)
    with pytest.raises(CacheCorruptError, match="broken"):
        store.batch([0])
    store.close()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
