"""Frames out of many shards at once: indexes and checksums are checked once, then maps are read into their places.

Legend:  V views   K frames a shard   A columns (cameras x outputs)   n rows at hand
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import CacheCorruptError
from geomcache.shards import CRC_NBYTES, Column, Layout, RowSet, clip_ranges, crc32c, rows_of, with_crc, without_crc

_SMALL = 8 << 10  # bytes of a map
_MAX_DESCRIPTORS = 4096  # kept open for shards, whatever the limit


class OpenShard:
    """A shard's files, open and checked.

    Attributes:
        files: a descriptor for each column.
        checksums: of every map, K times A little-endian uint32.
        first: rows that are in the cache before this shard's first.
        version: another number when a file has been written or replaced.
    """

    def __init__(self, folder: str, layout: Layout, shard: int, held: RowSet) -> None:
        self.files: list[int] = []
        self._paths = [f"{folder}/{name}" for name in layout.files(shard)]
        start, stop = layout.shard_rows(shard)
        self.first = held.count_before(start)
        sizes = layout.file_sizes(held.count_before(stop) - self.first)
        self.version = 0
        for path, size in zip(self._paths, sizes, strict=True):
            self._open(path, size)
        table = self.files.pop()
        try:
            content = os.pread(table, sizes[-1], 0)
        finally:
            os.close(table)
        checksums = without_crc(content)
        if checksums is None:
            raise _DamageError(self._paths[-1], "the checksum of its content", "another one")
        self.checksums = checksums

    def _open(self, path: str, size: int) -> None:
        try:
            self.files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise _DamageError(path, "the file", "none") from None
        found = os.fstat(self.files[-1])
        if found.st_size != size:
            raise _DamageError(path, f"{size} bytes", f"{found.st_size}")
        self.version = hash((self.version, found.st_ino, found.st_mtime_ns))

    def check(self, layout: Layout, shard: int, held: RowSet, digest: bytes) -> None:
        """Compare the indexes with what the rows that are there give, and the checksums' file with its hash."""
        start, stop = layout.shard_rows(shard)
        local = rows_of(clip_ranges(held.ranges, start, stop)) - start
        for column, descriptor, path in zip(layout.columns, self.files, self._paths[:-1], strict=True):
            expected = layout.index(column, local)
            if os.pread(descriptor, len(expected), len(local) * column.stride) != expected:
                raise _DamageError(path, f"a shard index of {len(local)} frames", "other bytes")
        found = sha256(with_crc(self.checksums)).digest()
        if found != digest:
            raise _DamageError(self._paths[-1], f"sha256 {digest.hex()}", found.hex())

    def path(self, column: int) -> str:
        """Path of a column's file."""
        return self._paths[column]

    def __del__(self) -> None:
        for descriptor in self.files:
            os.close(descriptor)


class _DamageError(Exception):
    """A file is not as expected: (path, expected, found). `ShardReader` says which frame was asked for."""


class ShardReader:
    """Reads frames out of the shards of one cache. For many threads; a forked child starts with nothing open."""

    def __init__(
        self, folder: str, layout: Layout, held: RowSet, digests: Mapping[int, bytes], name_of: Callable[[int], str]
    ) -> None:
        """Take what does not change.

        Args:
            folder: the cache.
            layout: its layout.
            held: the rows that are there.
            digests: sha256 of the checksums' file, by shard.
            name_of: how messages name a row.
        """
        self._folder, self._layout, self._held, self._digests, self._name_of = folder, layout, held, digests, name_of
        self._outputs = len({column.output for column in layout.columns})
        self._views = len(layout.columns) // self._outputs
        self._shift = layout.shard_frames.bit_length() - 1  # K is a power of two
        self._strides = np.array([[column.stride] for column in layout.columns])
        limit = getrlimit(RLIMIT_NOFILE)[0]
        descriptors = _MAX_DESCRIPTORS if limit == RLIM_INFINITY else min(limit // 2, _MAX_DESCRIPTORS)
        self._capacity = max(1, descriptors // len(layout.columns))
        self._checked: dict[int, int] = {}  # versions of the shards that were
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._shards: dict[int, OpenShard] = {}  # the one opened first leaves first: random reads favour none
        self._guard = threading.Lock()

    def close(self) -> None:
        """Close all files. The next read opens them again."""
        self._start()

    def read(self, rows: NDArray[np.int64], ranks: NDArray[np.int64]) -> dict[str, Any]:
        """Maps of rows that are there.

        Args:
            rows: int64 [n].
            ranks: of each of them among the rows of the cache.

        Returns:
            float16 [n, V, h, w, 6] or [n, V, h, w], by output, in the order of the rows.

        Raises:
            CacheCorruptError: a file is missing or damaged, or a map has not the checksum it had when it was written.
        """
        if self._pid != os.getpid():
            self._start()
        columns = self._layout.columns
        targets = {column.output: _Target(column, len(rows), self._views) for column in columns[: self._outputs]}
        for first in range(0, len(rows), self._capacity):  # so that the shards of a block can all be open
            self._read_block(rows, ranks, first, targets)
        return {name: target.array() for name, target in targets.items()}

    def _read_block(
        self, rows: NDArray[np.int64], ranks: NDArray[np.int64], first: int, targets: Mapping[str, "_Target"]
    ) -> None:
        """Read the maps of some rows, from position `first` on."""
        block = rows[first : first + self._capacity]
        numbers = block >> self._shift
        shards = self._open_shards(numbers.tolist(), block)
        slots = ranks[first : first + self._capacity] - [shard.first for shard in shards]
        runs = _find_runs(block, numbers)
        of_columns = list(
            zip(
                self._layout.columns,
                zip(*[shard.files for shard in shards], strict=True),
                (self._strides * slots).tolist(),
                self._checksums(shards, block - (numbers << self._shift)),
                strict=True,
            )
        )
        if any(_would_wait(descriptors[0], offsets[0]) for _, descriptors, offsets, _ in of_columns):
            for column, descriptors, offsets, _ in of_columns:  # all at once: the disk takes many requests at a time
                for descriptor, offset in zip(descriptors, offsets, strict=True):
                    os.posix_fadvise(descriptor, offset, column.nbytes, os.POSIX_FADV_WILLNEED)
        for number, (column, descriptors, offsets, checksums) in enumerate(of_columns):
            target, view = targets[column.output], number // self._outputs
            maps = target.read(first, view, descriptors, offsets, runs)
            if list(map(crc32c, maps)) != checksums:
                # The careful way, one map at a time: finishes what was interrupted, names what is damaged.
                for at, row in enumerate(block.tolist()):
                    path = shards[at].path(number)
                    content = self._read_map(descriptors[at], column.nbytes, offsets[at], checksums[at], path, row)
                    target.put(first + at, view, content)

    def _checksums(self, shards: list[OpenShard], local: NDArray[np.int64]) -> list[list[int]]:
        """Checksums of the maps at hand: a list for each column."""
        width = len(self._layout.columns) * CRC_NBYTES
        entries = zip(shards, (local * width).tolist(), strict=True)
        table = b"".join([shard.checksums[at : at + width] for shard, at in entries])
        columns: list[list[int]] = np.frombuffer(table, "<u4").reshape(len(shards), -1).T.tolist()
        return columns

    def _read_map(self, descriptor: int, nbytes: int, offset: int, checksum: int, path: str, row: int) -> bytes:
        content = b""
        while len(content) < nbytes:
            try:
                more = os.pread(descriptor, nbytes - len(content), offset + len(content))
            except OSError as error:
                self._fail(_DamageError(path, "to read it", error.strerror), row)
            if not more:
                self._fail(_DamageError(path, f"{nbytes} bytes at {offset}", f"{len(content)}"), row)
            content += more
        if (found := crc32c(content)) != checksum:
            self._fail(_DamageError(path, f"checksum {checksum:08x} at {offset}", f"{found:08x}"), row)
        return content

    def _open_shards(self, numbers: list[int], rows: NDArray[np.int64]) -> list[OpenShard]:
        shards = self._shards
        try:
            return [shards[number] for number in numbers]
        except KeyError:
            wanted = dict(zip(numbers, rows.tolist(), strict=True))
        with self._guard:
            missing = [number for number in wanted if number not in shards]
            idle = [number for number in shards if number not in wanted]
            for number in idle[: max(0, len(shards) + len(missing) - self._capacity)]:
                del shards[number]
            for number in missing:
                shards[number] = self._open_shard(number, wanted[number])
            return [shards[number] for number in numbers]

    def _open_shard(self, number: int, row: int) -> OpenShard:
        try:
            shard = OpenShard(self._folder, self._layout, number, self._held)
            if self._checked.get(number) != shard.version:
                shard.check(self._layout, number, self._held, self._digests[number])
                self._checked[number] = shard.version
        except _DamageError as damage:
            self._fail(damage, row)
        return shard

    def _fail(self, damage: _DamageError, row: int) -> NoReturn:
        path, expected, found = damage.args
        raise CacheCorruptError(
            f"{path}: {self._name_of(row)}: expected {expected}, found {found}: the file is damaged, or was made again"
            " since this process opened the cache; open it again, else restore the file from a copy, or make the cache"
            " anew with `geomcache extract --overwrite`"
        )


class _Target:
    """Where the maps of one output go: [n, V, ...].

    Small maps are read as bytes and joined, large ones are read into their places: below `_SMALL` making a view of each
    place costs more than the copy.
    """

    def __init__(self, column: Column, rows: int, views: int) -> None:
        self._column, self._views = column, views
        self._shape = (rows, views, *column.shape)
        self._small = column.nbytes <= _SMALL
        self._maps: list[Any] = [b""] * (rows * views)
        if not self._small:
            self._array = np.empty(self._shape, "<f2")
            self._maps = list(self._array.view(np.uint8).reshape(rows * views, column.nbytes))

    def read(
        self, first: int, view: int, descriptors: Sequence[int], offsets: list[int], runs: list[tuple[int, int]] | None
    ) -> list[Any]:
        """Read one view's maps of the rows from `first` on; what was read of each, perhaps too little."""
        places = slice(first * self._views + view, (first + len(offsets)) * self._views, self._views)
        with contextlib.suppress(OSError):  # the careful way meets it again, and names it
            if not self._small:
                list(map(os.preadv, descriptors, zip(self._maps[places]), offsets))
            elif runs is None:
                self._maps[places] = map(os.pread, descriptors, itertools.repeat(self._column.nbytes), offsets)
            else:
                self._maps[places] = self._read_runs(descriptors, offsets, runs)
        return self._maps[places]

    def _read_runs(self, descriptors: Sequence[int], offsets: list[int], runs: list[tuple[int, int]]) -> list[bytes]:
        nbytes, stride = self._column.nbytes, self._column.stride
        maps = []
        for start, stop in runs:
            content = os.pread(descriptors[start], stride * (stop - start), offsets[start])
            maps += [content[at : at + nbytes] for at in range(0, stride * (stop - start), stride)]
        return maps

    def put(self, row: int, view: int, content: bytes) -> None:
        """One map."""
        at = row * self._views + view
        if self._small:
            self._maps[at] = content
        else:
            self._maps[at][:] = np.frombuffer(content, np.uint8)

    def array(self) -> NDArray[np.float16]:
        """All maps."""
        return np.frombuffer(bytearray().join(self._maps), "<f2").reshape(self._shape) if self._small else self._array


def _would_wait(descriptor: int, offset: int) -> bool:
    """Whether this byte has to come from the disk. False where the file system cannot tell."""
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:  # not supported, or a failure that the read itself will meet
        return False
    return False


def _find_runs(rows: NDArray[np.int64], numbers: NDArray[np.int64]) -> list[tuple[int, int]] | None:
    """Positions [start, stop) of rows that lie one behind the other in a shard; None where few do."""
    joined = rows[1:] - rows[:-1] == 1
    if 2 * np.count_nonzero(joined) < len(rows):
        return None
    breaks = np.flatnonzero(~joined | (numbers[1:] != numbers[:-1])) + 1
    return list(itertools.pairwise([0, *breaks.tolist(), len(rows)]))
