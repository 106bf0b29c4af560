"""Frames out of many shards at once: indexes and checksums are checked once, then maps are read into their places.

Legend:  V views   K frames a shard   A columns (cameras x outputs)   n rows at hand
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.layout import CRC_NBYTES, Column, Layout, ShardFiles, crc32c, with_crc, without_crc
from geomcache.cache.result_memory import ResultMemory
from geomcache.errors import CacheCorruptError
from geomcache.ranges import RowSet, clip_ranges, rows_of

_SMALL = 8 << 10  # bytes of a map
_ANY_BYTE = (bytearray(1),)  # where bytes go that nobody looks at
_MAX_DESCRIPTORS = 4096  # kept open for shards, whatever the limit


class OpenShard:
    """A shard's files, open and checked.

    Attributes:
        files: a descriptor for each column.
        checksums: of every map, K times A little-endian uint32.
        offsets: for each column, where the maps begin and the last one ends, int64 [n + 1]; of compressed maps only.
        first: rows that are in the cache before this shard's first.
        version: another number when a file has been written or replaced.
    """

    def __init__(self, folder: str, layout: Layout, shard: int, held: RowSet, written: ShardFiles) -> None:
        self.files: list[int] = []
        self._paths = [f"{folder}/{name}" for name in layout.files(shard)]
        self.first = held.count_before(layout.shard_rows(shard)[0])
        self.offsets: list[NDArray[np.int64]] = []
        self.version = 0
        for path, size in zip(self._paths, written.sizes, strict=True):
            self._open(path, size)
        table = self.files.pop()
        try:
            content = _pread(table, written.sizes[-1], 0, self._paths[-1])
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

    def check_table(self, written: ShardFiles) -> None:
        """Compare the checksums' file with its hash."""
        found, digest = sha256(with_crc(self.checksums)).digest(), written.digests[-1]
        if found != digest:
            raise _DamageError(self._paths[-1], f"sha256 {digest.hex()}", found.hex())

    def read_indexes(self, layout: Layout, shard: int, held: RowSet, written: ShardFiles) -> None:
        """Compare the indexes with what the rows that are there give; keep them where maps are compressed."""
        start, stop = layout.shard_rows(shard)
        local = rows_of(clip_ranges(held.ranges, start, stop)) - start
        packed, expected = layout.codec.compresses, {}
        for column, descriptor, path, size in zip(layout.columns, self.files, self._paths, written.sizes, strict=False):
            body = size - layout.index_nbytes
            content = _pread(descriptor, layout.index_nbytes, body, path)
            if packed:
                self.offsets.append(layout.read_index(column, local, content, body))
                good = len(self.offsets[-1]) > 0
            else:  # the same for all arrays with maps of one size
                if column.stride not in expected:
                    expected[column.stride] = layout.index(local, column.stride)
                good = content == expected[column.stride]
            if not good:
                raise _DamageError(path, f"a shard index of {len(local)} frames", "other bytes")

    def path(self, column: int) -> str:
        """Path of a column's file."""
        return self._paths[column]

    def __del__(self) -> None:
        for descriptor in self.files:
            os.close(descriptor)


class _DamageError(Exception):
    """A file is not as expected: (path, expected, found). `ShardReader` says which frame was asked for."""


def _pread(descriptor: int, nbytes: int, offset: int, path: str) -> bytes:
    try:
        return os.pread(descriptor, nbytes, offset)
    except OSError as error:
        raise _DamageError(path, "to read it", error.strerror) from error


class ShardReader:
    """Reads frames out of the shards of one cache. For many threads; a forked child starts with nothing open."""

    def __init__(
        self,
        folder: str,
        layout: Layout,
        held: RowSet,
        written: Mapping[int, ShardFiles],
        name_of: Callable[[int], str],
    ) -> None:
        """Take what does not change.

        Args:
            folder: the cache.
            layout: its layout.
            held: the rows that are there.
            written: files of each shard.
            name_of: how messages name a row.
        """
        self._folder, self._layout, self._held, self._written, self._name_of = folder, layout, held, written, name_of
        self._outputs = len({column.output for column in layout.columns})
        self._views = len(layout.columns) // self._outputs
        self._shift = layout.shard_frames.bit_length() - 1  # K is a power of two
        self._decode = layout.codec.decode_into if layout.codec.compresses else None
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
        self._memory = ResultMemory()

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
        first_view, packed = columns[: self._outputs], self._decode is not None
        targets = {
            column.output: _Target(column, len(rows), self._views, packed, self._memory) for column in first_view
        }
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
        slots = ranks[first : first + self._capacity] - np.array([shard.first for shard in shards])
        runs = _find_runs(block, numbers)
        of_columns = list(
            zip(
                self._layout.columns,
                zip(*[shard.files for shard in shards], strict=True),
                *self._places(shards, slots),
                self._checksums(shards, block - (numbers << self._shift)),
                strict=True,
            )
        )
        if any(_would_wait(descriptors[0], offsets[0]) for _, descriptors, offsets, _, _ in of_columns):
            for _, descriptors, offsets, sizes, _ in of_columns:  # all at once: the disk takes many requests at a time
                for descriptor, offset, nbytes in zip(descriptors, offsets, sizes, strict=False):
                    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
        for number, (column, descriptors, offsets, sizes, checksums) in enumerate(of_columns):
            target, view = targets[column.output], number // self._outputs
            if self._decode is None:
                good = target.read(first, view, descriptors, offsets, runs, checksums)
            else:
                good = target.unpack(first, view, descriptors, offsets, sizes, checksums, self._decode)
            if not good:
                # The careful way, one map at a time: finishes what was interrupted, names what is damaged.
                for at, (row, nbytes) in enumerate(zip(block.tolist(), sizes, strict=False)):
                    path = shards[at].path(number)
                    content = self._read_map(descriptors[at], nbytes, offsets[at], checksums[at], path, row, column)
                    target.put(first + at, view, content)

    def _places(self, shards: list[OpenShard], slots: NDArray[np.int64]) -> tuple[list[list[int]], list[Iterable[int]]]:
        """Where the maps at hand lie in their files, for each column: offsets, and bytes to read."""
        columns = self._layout.columns
        if self._decode is None:
            return (self._strides * slots).tolist(), [itertools.repeat(column.nbytes) for column in columns]
        bounds = np.array(
            [
                [(shard.offsets[number][slot], shard.offsets[number][slot + 1]) for number in range(len(columns))]
                for shard, slot in zip(shards, slots.tolist(), strict=True)
            ]
        )  # [n, A, 2]
        return bounds[:, :, 0].T.tolist(), (bounds[:, :, 1] - bounds[:, :, 0]).T.tolist()

    def _checksums(self, shards: list[OpenShard], local: NDArray[np.int64]) -> list[list[int]]:
        """Checksums of the maps at hand: a list for each column."""
        width = len(self._layout.columns) * CRC_NBYTES
        entries = zip(shards, (local * width).tolist(), strict=True)
        table = b"".join([shard.checksums[at : at + width] for shard, at in entries])
        columns: list[list[int]] = np.frombuffer(table, "<u4").reshape(len(shards), -1).T.tolist()
        return columns

    def _read_map(
        self, descriptor: int, nbytes: int, offset: int, checksum: int, path: str, row: int, column: Column
    ) -> bytes:
        content = b""
        while len(content) < nbytes:
            try:
                more = _pread(descriptor, nbytes - len(content), offset + len(content), path)
            except _DamageError as damage:
                self._fail(damage, row)
            if not more:
                self._fail(_DamageError(path, f"{nbytes} bytes at {offset}", f"{len(content)}"), row)
            content += more
        if self._decode is not None:
            packed, place = without_crc(content), np.empty(column.nbytes, np.uint8)
            if packed is None:
                self._fail(_DamageError(path, f"the checksum of the {nbytes} bytes at {offset}", "another one"), row)
            try:
                self._decode(packed, place)
            except (RuntimeError, ValueError) as error:
                self._fail(_DamageError(path, f"a compressed map at {offset}", str(error)), row)
            content = place.tobytes()
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
            written = self._written[number]
            shard = OpenShard(self._folder, self._layout, number, self._held, written)
            checked = self._checked.get(number) == shard.version
            if not checked:
                shard.check_table(written)
            if not checked or self._layout.codec.compresses:
                shard.read_indexes(self._layout, number, self._held, written)
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
    place costs more than the copy. Compressed ones are unpacked into their places.
    """

    def __init__(self, column: Column, rows: int, views: int, packed: bool, memory: ResultMemory) -> None:
        self._column, self._views = column, views
        self._shape = (rows, views, *column.shape)
        self._small = column.nbytes <= _SMALL and not packed
        self._maps: list[Any] = [b""] * (rows * views)
        if not self._small:
            self._array = memory.empty(self._shape)
            self._maps = list(self._array.view(np.uint8).reshape(rows * views, column.nbytes))

    def read(
        self,
        first: int,
        view: int,
        descriptors: Sequence[int],
        offsets: list[int],
        runs: list[tuple[int, int]] | None,
        checksums: list[int],
    ) -> bool:
        """Read one view's maps of the rows from `first` on. False where the careful way has to: one failed or differs.

        What memory held before does not count, though it may be the very maps, from an earlier batch.
        """
        places, nbytes = self._places(first, view, len(offsets)), self._column.nbytes
        try:
            if not self._small:  # each map's checksum right after its read, while the processor's cache has it
                maps = self._maps[places]
                for descriptor, place, offset, checksum in zip(descriptors, maps, offsets, checksums, strict=True):
                    if os.preadv(descriptor, (place,), offset) != nbytes or crc32c(place) != checksum:
                        return False
                return True
            if runs is None:
                self._maps[places] = map(os.pread, descriptors, itertools.repeat(nbytes), offsets)
            else:
                self._maps[places] = self._read_runs(descriptors, offsets, runs)
        except OSError:
            return False
        return list(map(crc32c, self._maps[places])) == checksums

    def unpack(
        self,
        first: int,
        view: int,
        descriptors: Sequence[int],
        offsets: list[int],
        sizes: Iterable[int],
        checksums: list[int],
        decode: Callable[[bytes, NDArray[np.uint8]], object],
    ) -> bool:
        """The same of compressed maps, which have a checksum of their own behind them."""
        maps = self._maps[self._places(first, view, len(offsets))]
        try:
            for place, content, checksum in zip(
                maps, map(os.pread, descriptors, sizes, offsets), checksums, strict=True
            ):
                packed = without_crc(content)
                if packed is None:
                    return False
                decode(packed, place)
                if crc32c(place) != checksum:
                    return False
        except (OSError, RuntimeError, ValueError):
            return False
        return True

    def _places(self, first: int, view: int, rows: int) -> slice:
        return slice(first * self._views + view, (first + rows) * self._views, self._views)

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
        os.preadv(descriptor, _ANY_BYTE, offset, os.RWF_NOWAIT)
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
