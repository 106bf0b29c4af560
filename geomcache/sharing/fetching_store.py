"""A sealed cache at an address, read as if it were here: its shards are fetched when they are first needed.

The folder below `home` has what describes the cache, and the shards that `local_shards` keeps in it. If the bound has
room for all of them, they stay, and their files stay open as those of any cache. Otherwise a shard is open only while
its rows are read, so that what is removed leaves the disk at once.
"""

import contextlib
import hashlib
import logging
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, override

import numpy as np
from numpy.typing import NDArray

from geomcache.cache import locks
from geomcache.cache.header import LOCK
from geomcache.cache.layout import Table
from geomcache.cache.manifest import MANIFEST
from geomcache.cache.shard_reader import OpenShard, ShardReader
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheError
from geomcache.progress import human_bytes
from geomcache.sharing.address import is_remote, public_address
from geomcache.sharing.base import PARALLEL_TRANSFERS, home, one_rank_logs
from geomcache.sharing.limits import fetch_description
from geomcache.sharing.local_shards import LocalShards, Unit
from geomcache.sharing.open import open_remote

AHEAD_ROWS = 4096  # of the sampler's order

logger = logging.getLogger(__name__)


def open_for_training(cache: str | Path, disk_nbytes: int) -> GeometryStore:
    """Open a cache for many reads in any order: by its path, or a sealed one by its address.

    Args:
        cache: a path or an address.
        disk_nbytes: how much of a remote cache this machine keeps.

    Raises:
        CacheError: there is no such cache, or it cannot be read.
        UserInputError: the room is too small for a shard.
    """
    if not is_remote(str(cache)):
        return GeometryStore.open(cache)
    with one_rank_logs():
        return FetchingGeometryStore.open_address(str(cache), disk_nbytes)


class FetchingGeometryStore(GeometryStore):
    """A cache at an address of which this machine keeps what it needs. As `GeometryStore`; unpickling asks for nothing.

    Attributes:
        address: of the cache, without credentials; on the Hub with the commit.
        path: the folder of this machine.
        local: what is in it.
    """

    address: str
    local: LocalShards
    _opened: tuple[str, str, int]

    @classmethod
    def open_address(cls, address: str, disk_nbytes: int) -> Self:
        """Open the sealed cache at an address. Raises what `open_for_training` raises."""
        remote = open_remote(address)
        with tempfile.TemporaryDirectory(prefix="geomcache-") as name:
            description = Path(name)
            fetch_description(remote, description, metadata=True)
            digest = hashlib.sha256((description / MANIFEST).read_bytes()).hexdigest()[:16]
            folder = home() / "fetched" / f"{remote.address.rpartition('/')[2].partition('@')[0]}-{digest}"
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(locks.LockFile(folder / LOCK)) as lock, lock.exclusive():
                if not (folder / MANIFEST).exists():
                    _move(description, folder)
        store = cls._reopen(str(folder), remote.url, public_address(remote.url), disk_nbytes)
        logger.info(
            "%s: shards are fetched when they are needed and kept in %s, at most %s; set GEOMCACHE_HOME for another"
            " folder",
            store.address,
            folder,
            human_bytes(disk_nbytes),
        )
        if not store.local.fits:
            logger.warning(
                "%s: the cache has %s, more than --cache-disk %s: training draws frames at random, so that most of them"
                " fetch a shard again; give it more room if you can",
                store.address,
                human_bytes(store.nbytes),
                human_bytes(disk_nbytes),
            )
        return store

    @classmethod
    def _reopen(cls, folder: str, url: str, address: str, disk_nbytes: int) -> Self:
        """Open a folder that has the description of the cache."""
        store = cls._read(Path(folder))
        store.address, store._opened = address, (url, address, disk_nbytes)
        written = store._contents.shards
        store.local = LocalShards(store.path, store._layout, written, url, disk_nbytes)
        store._reader = _FetchingReader(
            folder, store._layout, store._present_rows, written, store._name, local=store.local, address=address
        )
        store._fetches = None
        return store

    _fetches: "_Fetches | None"

    def expect(self, positions: Iterator[int], row_of: Callable[[int], int]) -> Iterator[int]:
        """Yield a sampler's positions as they come, and fetch the shards of the rows that come next, from threads."""
        self._fetches = self._fetches or _Fetches(self.local)
        return self._fetches.ahead_of(positions, lambda position: row_of(position) // self.shard_frames)

    @override
    def close(self) -> None:
        super().close()
        if self._fetches is not None:
            self._fetches.stop()
            self._fetches = None

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._reopen, (str(self.path), *self._opened)


class _FetchingReader(ShardReader):
    """Reads maps from shards that are fetched when they are missing."""

    def __init__(self, *arguments: Any, local: LocalShards, address: str) -> None:
        self._local, self._address = local, address
        self._mine = threading.local()  # of a thread: the shard that it holds, where the bound is tight
        super().__init__(*arguments)

    @override
    def read(self, rows: NDArray[np.int64], ranks: NDArray[np.int64]) -> dict[str, NDArray[np.float16]]:
        if self._local.fits:
            self._bring(Unit(shard) for shard in np.unique(rows // self._layout.shard_frames).tolist())
        try:
            return super().read(rows, ranks)
        finally:
            self._let_go()

    @override
    def read_table(self, table: Table, rows: NDArray[np.int64]) -> NDArray[Any]:
        part = self._layout.keys.index(table.key) - len(self._layout.columns)
        units = [Unit(shard, part) for shard in np.unique(rows // self._layout.shard_frames).tolist()]
        if self._local.fits:
            self._bring(units)
            return super().read_table(table, rows)
        values = np.empty((len(rows), *table.shape), table.dtype)
        for unit in units:
            here = np.flatnonzero(rows // self._layout.shard_frames == unit.shard)
            with self._local.held(unit):
                values[here] = super().read_table(table, rows[here])
        return values

    @override
    def _open_shard(self, number: int) -> OpenShard:
        if self._local.fits:
            if number not in self._shards:
                with self._local.held(Unit(number)):
                    return super()._open_shard(number)
            return super()._open_shard(number)
        held: tuple[int, OpenShard, contextlib.ExitStack] | None = getattr(self._mine, "held", None)
        if held is None or held[0] != number:
            self._let_go()
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._local.held(Unit(number)))
                shard = OpenShard(self._folder, self._layout, number, self._present_rows, self._written[number])
                held = self._mine.held = number, shard, stack.pop_all()
        return held[1]

    def _let_go(self) -> None:
        """Close the shard that this thread holds, so that it can be removed."""
        held, self._mine.held = getattr(self._mine, "held", None), None
        if held is not None:
            _, shard, stack = held
            shard.close()
            stack.close()

    def _bring(self, units: Iterable[Unit]) -> None:
        self._local.bring([unit for unit in units if unit.part or unit.shard not in self._shards])


class _Fetches:
    """Fetches shards ahead of the rows that a sampler draws.

    Their locks are taken at once: loading processes wait for a shard that is on its way. If each of them fetched what
    it needs first, they would all start drivers, and ask for the same shards.
    """

    def __init__(self, local: LocalShards) -> None:
        self._local = local
        self._pool = ThreadPoolExecutor(PARALLEL_TRANSFERS, thread_name_prefix="fetch")

    def ahead_of(self, positions: Iterator[int], shard_of: Callable[[int], int]) -> Iterator[int]:
        """Yield positions, each when `AHEAD_ROWS` more are known; fewer, if the disk has no room for as many shards."""
        window = AHEAD_ROWS if self._local.fits else min(AHEAD_ROWS, self._local.ahead)
        drawn = deque[int]()
        for position in positions:
            self._fetch(Unit(shard_of(position)))
            drawn.append(position)
            if len(drawn) > window:
                yield drawn.popleft()
        yield from drawn

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, unit: Unit) -> None:
        if not self._local.claim_missing(unit):
            return

        def release_cancelled(future: Future[None]) -> None:
            if future.cancelled():
                self._local.release(unit)

        try:
            fetched = self._pool.submit(self._bring, unit)
        except RuntimeError:  # the store was closed, and its sampler goes on
            self._local.release(unit)
            raise
        fetched.add_done_callback(release_cancelled)

    def _bring(self, unit: Unit) -> None:
        # Whoever reads the shard fetches it then, and raises what happens.
        with contextlib.suppress(CacheError):
            self._local.fetch_claimed(unit)


def _move(description: Path, folder: Path) -> None:
    """Move the files that describe a cache, the manifest last: with it the folder can be opened."""
    files = sorted(path.relative_to(description) for path in description.rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: name.name == MANIFEST):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(description / name, folder / name)
