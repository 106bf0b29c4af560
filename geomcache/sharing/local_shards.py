"""Parts of a remote cache on this disk: fetched when they are needed, within a bound, shared by all processes here.

A unit is what is fetched and removed as one: the maps of a shard with their checksums, or one table of its pictures'
signatures. `used/SHARD.PART` stands for a unit that has room on the disk; its time is that of the last use. Room is
found before a byte is fetched: units that were used least recently go, unless somebody reads or fetches them. Files get
their names when their hash is right; the last of a unit's files to get its name says that the unit is here.

Locks are those of the cache's writers: a byte of `lock` for each unit, and one for the room. They end with a process.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from geomcache.cache import durable, locks
from geomcache.cache.header import LOCK
from geomcache.cache.inventory import Stored
from geomcache.cache.layout import Layout, ShardFiles
from geomcache.errors import CacheCorruptError, ConnectionFailedError, UserInputError
from geomcache.progress import human_bytes
from geomcache.sharing.address import HUB_SCHEME
from geomcache.sharing.base import in_parallel, retried
from geomcache.sharing.object_store import FsspecRemote
from geomcache.waits import limit_hub_requests, waiting

POLL_S = 0.005  # for a unit that another process fetches or reads, and for room
MAPS = 0
"""The part of a shard that training reads; the others are its tables, from 1 on."""
_PARTS = 8  # bytes of the lock file for each shard
_USED, _FETCHING = "used", "fetching"


class Unit(NamedTuple):
    """What is fetched and removed as one."""

    shard: int
    part: int = MAPS

    @property
    def name(self) -> str:
        """Return the name of the file that stands for it."""
        return f"{self.shard}.{self.part}"


class LocalShards:
    """The units of one remote cache in a folder. Processes and threads may share the folder; threads the object.

    Attributes:
        fits: whether the bound has room for the whole cache, so that nothing is ever removed.
        fetched: how many units this object has fetched.
    """

    def __init__(self, folder: Path, layout: Layout, written: Mapping[int, ShardFiles], url: str, bound: int) -> None:
        """Use a folder that exists.

        Raises:
            UserInputError: the bound has no room for the largest unit.
            RemoteError: the driver is not installed.
        """
        self._folder, self._layout, self._written, self._bound = folder, layout, written, bound
        if url.startswith(HUB_SCHEME):
            limit_hub_requests()
        self._remote = FsspecRemote(url)
        largest = max((self.size(Unit(shard)) for shard in written), default=0)
        self.fits = sum(files.nbytes for files in written.values()) <= bound
        if largest > bound:
            raise UserInputError(
                f"cache-disk: expected at least {human_bytes(largest)}, as the largest shard of {self._remote.address}"
                f" needs, got {human_bytes(bound)}: give it more room"
            )
        self.fetched = 0
        self._largest = largest
        self._lock: locks.LockFile | None = None
        self._pid, self._guard = os.getpid(), threading.Lock()
        (folder / _USED).mkdir(exist_ok=True)

    @property
    def ahead(self) -> int:
        """Return how many units may be fetched ahead, so that they are not removed before they are used."""
        return len(self._written) if self.fits else self._bound // (2 * max(1, self._largest))

    def size(self, unit: Unit) -> int:
        """Return the bytes of a unit's files."""
        return sum(stored.size for stored in self._files(unit).values())

    def is_here(self, unit: Unit) -> bool:
        """Return whether a unit is on the disk at this moment."""
        return (self._folder / [*self._files(unit)][-1]).exists()

    @contextlib.contextmanager
    def held(self, unit: Unit) -> Iterator[None]:
        """Keep a unit on the disk, where it is fetched if it is missing. No other thread holds it meanwhile.

        Raises:
            CacheCorruptError: a file at the address is not as it was written.
            ConnectionFailedError: it cannot be fetched; the message names shard and address.
            OutOfSpaceError: the disk is full before the bound is reached.
        """
        if not self._claim(unit):
            what = f"{self._folder}: waiting for shard {unit.shard}, which is being fetched or read"
            with waiting(what, group="shards"):
                while not self._claim(unit):
                    time.sleep(POLL_S)
        try:
            self._complete(unit)
            yield
        finally:
            self.release(unit)

    def claim_missing(self, unit: Unit) -> bool:
        """Take the lock of a unit that is not here, for `fetch_claimed` or `release`.

        Whoever needs the unit meanwhile waits for it instead of fetching it, too. Returns False if it is here, or
        somebody has it.
        """
        return not self.is_here(unit) and self._claim(unit)

    def fetch_claimed(self, unit: Unit) -> None:
        """Fetch a unit whose lock was taken, and release the lock. Raises what `held` raises."""
        try:
            self._complete(unit)
        finally:
            self.release(unit)

    def release(self, unit: Unit) -> None:
        """Release the lock of a unit."""
        self._locks().release(_lock_byte(unit))

    def _claim(self, unit: Unit) -> bool:
        return self._locks().claim(_lock_byte(unit))

    def _complete(self, unit: Unit) -> None:
        """Fetch a unit if it is missing, and note its use; its lock is ours."""
        if not self.is_here(unit):
            self._make_room(unit, self._locks())
            self._fetch(unit)
        with contextlib.suppress(FileNotFoundError):  # a run with a smaller bound has removed it just now
            os.utime(self._folder / _USED / unit.name)

    def bring(self, units: list[Unit]) -> None:
        """Fetch units that are missing, several at a time."""

        def bring_one(unit: Unit) -> None:
            with self.held(unit):
                pass

        in_parallel(bring_one, [unit for unit in units if not self.is_here(unit)])

    def _locks(self) -> locks.LockFile:
        """Return the locks of this process. A forked child has none of its parent's, and its driver cannot be used."""
        if self._pid != os.getpid():
            self._pid, self._guard, self._lock = os.getpid(), threading.Lock(), None
            self._remote = FsspecRemote(self._remote.url)
        with self._guard:
            if self._lock is None:
                self._lock = locks.LockFile(self._folder / LOCK)
            return self._lock

    def _files(self, unit: Unit) -> dict[str, Stored]:
        written, columns = self._written[unit.shard], len(self._layout.columns)
        entries = zip(self._layout.files(unit.shard), written.sizes, written.digests, strict=True)
        files = [(name, Stored(size, digest.hex())) for name, size, digest in entries]
        return dict(files[: columns + 1] if unit.part == MAPS else files[columns + unit.part :][:1])

    def _make_room(self, unit: Unit, lock: locks.LockFile) -> None:
        """Reserve room for a unit; the units that were used least recently go."""
        message = f"{self._folder}: waiting for room: all shards in it are being read; give --cache-disk more"
        with waiting(message, group="shards"):
            while not self._reserve(unit, lock):
                time.sleep(POLL_S)

    def _reserve(self, unit: Unit, lock: locks.LockFile) -> bool:
        with lock.exclusive():
            used = sorted((entry.stat().st_mtime_ns, _unit(entry.name)) for entry in os.scandir(self._folder / _USED))
            others = [each for _, each in used if each != unit]
            total = self.size(unit) + sum(map(self.size, others))
            for each in others:
                if total <= self._bound:
                    break
                if lock.claim(_lock_byte(each)):
                    self._remove(each)
                    lock.release(_lock_byte(each))
                    total -= self.size(each)
            if total > self._bound:
                return False
            self._remove(unit)  # what a fetch that was killed left
            (self._folder / _USED / unit.name).touch()
            return True

    def _remove(self, unit: Unit) -> None:
        """Remove a unit's files, first the one that says that it is here."""
        for name in reversed(self._files(unit)):
            for path in (self._folder / name, self._folder / _FETCHING / name):
                with contextlib.suppress(FileNotFoundError):
                    durable.unlink(path)
        (self._folder / _USED / unit.name).unlink(missing_ok=True)

    def _fetch(self, unit: Unit) -> None:
        files = self._files(unit)
        in_parallel(lambda name: retried(lambda: self._fetch_file(unit, name, files[name])), files)
        for name in files:
            target = self._folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            durable.rename(self._folder / _FETCHING / name, target)
        self.fetched += 1

    def _fetch_file(self, unit: Unit, name: str, expected: Stored) -> None:
        where = f"{self._remote.address}/{name}: shard {unit.shard}"
        copy = self._folder / _FETCHING / name
        try:
            is_there = self._remote.fetch_whole(name, expected.size, self._folder / _FETCHING)
        except ConnectionFailedError as error:
            raise ConnectionFailedError(str(error).replace(f"{self._remote.address}/{name}", where, 1)) from error
        if not is_there:
            raise CacheCorruptError(f"{where}: expected {expected}, found no such object: {_CHANGED}")
        found = Stored.of_file(copy)
        if found is not None and found.size < expected.size:
            raise ConnectionFailedError(
                f"{where}: expected {expected.size} bytes, found the connection cut after {found.size}: run the same"
                " command again"
            )
        if found != expected:
            durable.unlink(copy)
            raise CacheCorruptError(f"{where}: expected {expected}, found {found or 'none'}: {_CHANGED}")


_CHANGED = (
    "it is damaged, or the cache there was changed since this run began: verify it with `geomcache verify`, and start"
    " the run again"
)


def _lock_byte(unit: Unit) -> int:
    return unit.shard * _PARTS + unit.part


def _unit(name: str) -> Unit:
    shard, _, part = name.partition(".")
    return Unit(int(shard), int(part))
