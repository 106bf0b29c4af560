"""Read maps of many frames: check a shard's index and checksum table when it is opened, and every map when it is read.

Legend:  V views   K frames per shard   A columns (cameras x outputs)   n rows
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.layout import Layout, ShardFiles, Table, crc32c, without_crc
from geomcache.errors import CacheCorruptError
from geomcache.ranges import RowSet, clip_ranges, rows_of

_MAX_DESCRIPTORS = 4096  # kept open for shards, whatever the process's limit


class _DamageError(Exception):
    """A file that differs from what was written: (path, expected, found). `ShardReader` adds the frame."""


class OpenShard:
    """A shard whose files are open, and whose index and checksum table are those that were written.

    Its n rows have the slots 0 to n - 1, in order.

    Attributes:
        first_rank: how many rows of the cache precede this shard's first.
    """

    def __init__(self, folder: str, layout: Layout, shard: int, present_rows: RowSet, written: ShardFiles) -> None:
        """Open and check a shard's files.

        Raises:
            _DamageError: a file is missing, or its size, index or hash differs.
            OSError: a file cannot be opened.
        """
        self._descriptors: list[int] = []
        self._paths = [f"{folder}/{name}" for name in layout.files(shard)]
        self._codec = layout.codec
        start, stop = layout.shard_rows(shard)
        self.first_rank = present_rows.count_before(start)
        local_rows = rows_of(clip_ranges(present_rows.ranges, start, stop)) - start
        for path, size in zip(self._paths[: len(layout.columns) + 1], written.sizes, strict=False):
            self._open(path, size)
        self._checksums = self._read_checksums(layout, local_rows, written)
        self._offsets = self._read_indexes(layout, local_rows, written)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def read_map(self, column: int, slot: int, destination: NDArray[np.uint8]) -> None:
        """Read one map and compare its checksum.

        Args:
            column: number of the column.
            slot: the row's place among the shard's rows.
            destination: receives the map's bytes, uint8 [nbytes], contiguous.

        Raises:
            _DamageError: the bytes cannot be read, or are not those that were written.
        """
        start, stop = self._offsets[column][slot], self._offsets[column][slot + 1]
        if self._codec.compresses:
            self._decode(column, start, self._read(column, stop - start, start), destination)
        else:
            self._read_into(column, destination, start)
        expected, found = self._checksums[slot, column], crc32c(destination)
        if found != expected:
            raise _DamageError(self._paths[column], f"checksum {expected:08x} at {start}", f"{found:08x}")

    def _open(self, path: str, size: int) -> None:
        try:
            self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise _DamageError(path, "the file", "none") from None
        actual_size = os.fstat(self._descriptors[-1]).st_size
        if actual_size != size:
            raise _DamageError(path, f"{size} bytes", f"{actual_size}")

    def _read_checksums(self, layout: Layout, local_rows: NDArray[np.int64], written: ShardFiles) -> memoryview:
        """Return the checksums of the shard's maps, uint32 [n, A], and close their file."""
        number = len(layout.columns)
        content = self._read(number, written.sizes[number], 0)
        os.close(self._descriptors.pop())
        digest = sha256(content)
        if digest.digest() != written.digests[number]:
            raise _DamageError(self._paths[number], f"sha256 {written.digests[number].hex()}", digest.hexdigest())
        return memoryview(layout.tables[0].decode(content)[local_rows])

    def _read_indexes(self, layout: Layout, local_rows: NDArray[np.int64], written: ShardFiles) -> list[Sequence[int]]:
        """Return for each column where the maps begin and the last one ends: n + 1 offsets."""
        indexes: list[Sequence[int]] = []
        for number, column in enumerate(layout.columns):
            body_nbytes = written.sizes[number] - layout.index_nbytes
            content = self._read(number, layout.index_nbytes, body_nbytes)
            offsets = layout.read_index(column, local_rows, content, body_nbytes)
            if len(offsets) == 0:
                raise _DamageError(self._paths[number], f"a shard index of {len(local_rows)} frames", "other bytes")
            # Without compression all maps have one size: a range gives the same offsets and takes no memory.
            uniform = range(0, body_nbytes + 1, column.stride)
            indexes.append(memoryview(offsets) if layout.codec.compresses else uniform)
        return indexes

    def _decode(self, column: int, offset: int, stored: bytes, destination: NDArray[np.uint8]) -> None:
        path, compressed = self._paths[column], without_crc(stored)
        if compressed is None:  # the decoder never sees bytes that were damaged
            raise _DamageError(path, f"the checksum of the {len(stored)} bytes at {offset}", "another one")
        try:
            self._codec.decode_into(compressed, destination)
        except (RuntimeError, ValueError) as error:
            raise _DamageError(path, f"a compressed map at {offset}", str(error)) from error

    def _read(self, column: int, nbytes: int, offset: int) -> bytes:
        content = np.empty(nbytes, np.uint8)
        self._read_into(column, content, offset)
        return content.tobytes()

    def _read_into(self, column: int, buffer: NDArray[np.uint8], offset: int) -> None:
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self._descriptors[column], (buffer[filled:],), offset + filled)
            except OSError as error:
                raise _DamageError(self._paths[column], "to read it", error.strerror) from error
            if count == 0:
                raise _DamageError(self._paths[column], f"{len(buffer)} bytes at {offset}", f"{filled}")
            filled += count


def _read_whole(path: str, size: int, digest: bytes) -> bytes:
    try:
        with Path(path).open("rb") as file:
            content = file.read(size + 1)
    except FileNotFoundError:
        raise _DamageError(path, "the file", "none") from None
    except OSError as error:
        raise _DamageError(path, "to read it", error.strerror) from error
    if len(content) != size:
        raise _DamageError(path, f"{size} bytes", "more" if len(content) > size else f"{len(content)}")
    if (found := sha256(content)).digest() != digest:
        raise _DamageError(path, f"sha256 {digest.hex()}", found.hexdigest())
    return content


class ShardReader:
    """Reads maps from the shards of one cache.

    Several threads may read at once. A forked child opens the files again instead of sharing its parent's.
    """

    def __init__(
        self,
        folder: str,
        layout: Layout,
        present_rows: RowSet,
        written: Mapping[int, ShardFiles],
        name_of: Callable[[int], str],
    ) -> None:
        self._folder, self._layout, self._present_rows, self._written = folder, layout, present_rows, written
        self._name_of = name_of
        limit = getrlimit(RLIMIT_NOFILE)[0]
        descriptors = _MAX_DESCRIPTORS if limit == RLIM_INFINITY else min(limit // 2, _MAX_DESCRIPTORS)
        self._capacity = max(1, descriptors // len(layout.columns))  # shards
        self.close()

    def close(self) -> None:
        """Close all files. The next read opens them again."""
        self._pid = os.getpid()
        self._shards: dict[int, OpenShard] = {}
        self._lock = threading.Lock()

    def read(self, rows: NDArray[np.int64], ranks: NDArray[np.int64]) -> dict[str, NDArray[np.float16]]:
        """Read the maps of rows that the cache has.

        Args:
            rows: int64 [n].
            ranks: how many rows of the cache precede each of them, int64 [n].

        Returns:
            float16 [n, V, h, w, 6] or [n, V, h, w], by output, in the order of `rows`.

        Raises:
            CacheCorruptError: a file is missing or damaged, or a map differs from what was written; the message has
                file, episode and frame.
        """
        if self._pid != os.getpid():
            self.close()
        maps, destinations = self._allocate(len(rows))
        numbers = (rows // self._layout.shard_frames).tolist()
        for position in np.argsort(rows).tolist():  # one shard after the other: each is opened once
            try:
                shard = self._open_shard(numbers[position])
                slot = int(ranks[position]) - shard.first_rank
                for column, destination in enumerate(destinations):
                    shard.read_map(column, slot, destination[position])
            except _DamageError as damage:
                raise self._corrupt(damage, int(rows[position])) from damage
        return maps

    def read_table(self, table: Table, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Read one table's numbers of rows that the cache has.

        Args:
            table: one of the layout's.
            rows: int64 [n].

        Returns:
            [n, *shape], in the order of `rows`.

        Raises:
            CacheCorruptError: a file is missing or damaged.
        """
        values = np.empty((len(rows), *table.shape), table.dtype)
        shards, local_rows = np.divmod(rows, self._layout.shard_frames)
        number = self._layout.keys.index(table.key)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            path, written = f"{self._folder}/{self._layout.files(shard)[number]}", self._written[shard]
            try:
                content = _read_whole(path, written.sizes[number], written.digests[number])
            except _DamageError as damage:
                raise self._corrupt(damage, int(rows[here[0]])) from damage
            values[here] = table.decode(content)[local_rows[here]]
        return values

    def _allocate(self, rows: int) -> tuple[dict[str, NDArray[np.float16]], list[NDArray[np.uint8]]]:
        """Return arrays for the maps, by output, and each column's part of them as bytes, uint8 [n, nbytes]."""
        columns, maps, destinations = self._layout.columns, {}, []
        outputs = len({column.output for column in columns})
        views = len(columns) // outputs
        for number, column in enumerate(columns):
            view = number // outputs
            if view == 0:
                maps[column.output] = np.empty((rows, views, *column.shape), "<f2")
            as_bytes = maps[column.output].view(np.uint8).reshape(rows, views, column.nbytes)
            destinations.append(as_bytes[:, view])
        return maps, destinations

    def _open_shard(self, number: int) -> OpenShard:
        shard = self._shards.get(number)
        if shard is not None:
            return shard
        with self._lock:
            if number not in self._shards:
                while len(self._shards) >= self._capacity:  # random reads favour none: close the one opened first
                    del self._shards[next(iter(self._shards))]
                written = self._written[number]
                self._shards[number] = OpenShard(self._folder, self._layout, number, self._present_rows, written)
            return self._shards[number]

    def _corrupt(self, damage: _DamageError, row: int) -> CacheCorruptError:
        path, expected, found = damage.args
        return CacheCorruptError(
            f"{path}: {self._name_of(row)}: expected {expected}, found {found}: the file is damaged, or was made again"
            " since this process opened the cache: open the cache again; a damaged file is dropped with its shard by"
            f" `geomcache verify {self._folder} --repair`, which prints the command that makes the shard again"
        )
