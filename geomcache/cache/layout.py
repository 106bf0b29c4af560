"""Shard files: which rows belong to a shard, what its files contain, and where in them each map lies.

docs/cache-format.md describes the files. Ranges of rows are half-open.

Legend:  N rows   K rows per shard   A columns (cameras x outputs), each one array of the cache   n rows of one shard
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from geomcache.cache.codecs import RAW, Codec
from geomcache.cache.signatures import BLOCKS
from geomcache.errors import UserInputError
from geomcache.geometry import GeometrySpec
from geomcache.ranges import Ranges

CHECKSUMS = "frame_crc32c"  # the array of the maps' checksums
PICTURE_HASH, PICTURE_MEANS = "picture_hash", "picture_means"  # the arrays of the pictures' signatures
SCHEMA_VERSION = 2  # of caches that are made now
SCHEMA_VERSIONS = (1, 2)  # of caches that can be read
CRC_NBYTES = 4
MIN_SHARD_FRAMES, MAX_SHARD_FRAMES = 16, 65_536
HUB_FOLDER_ENTRIES = 10_000  # the Hub takes no more in one folder
_MAX_SHARDS = 8192  # so that no folder has more than these
_MAX_SHARD_NBYTES = 4 << 30  # of all columns, which a writer holds in memory
_BLOCK_NBYTES = 64 << 20  # of a column that are copied at a time
_SHARD_NBYTES = 32 << 20  # of one camera's largest maps, about
_USUAL_SHARD_FRAMES = 4096
_SHARDS_AT_LEAST = 64  # per dataset, so that many processes find work
_OUTGROWN = 8  # times K: from here on a cache that has grown is cut anew
_RESERVED = {
    "episode_index",
    "frame_index",
    "episodes",
    "feature_basis",
    "zarr.json",
    "journal.jsonl",
    "manifest.json",
    "lock",
}
_INDEX_DTYPE = np.dtype("<u8")
_ABSENT = 2**64 - 1  # offset and length of an inner chunk that is missing

crc32c: Callable[[bytes | NDArray[Any]], int] = google_crc32c.value
"""Castagnoli's CRC of contiguous bytes: the library's function itself, as inner loops pay for every Python call."""


def with_crc(data: bytes) -> bytes:
    """Return data followed by its checksum, little-endian, as Zarr's ``crc32c`` codec stores it."""
    return data + crc32c(data).to_bytes(CRC_NBYTES, "little")


def without_crc(data: bytes) -> bytes | None:
    """Return the data before its checksum; None if the two do not fit."""
    content = data[:-CRC_NBYTES]
    return content if with_crc(content) == data else None


@dataclass(frozen=True, kw_only=True)
class Column:
    """One array of maps: one output of one camera."""

    camera: str
    output: str
    shape: tuple[int, ...]
    """Shape of one map."""

    @property
    def key(self) -> str:
        """Return the array's path in the cache."""
        return f"{self.camera}/{self.output}"

    @functools.cached_property
    def nbytes(self) -> int:
        """Return the bytes of one map, without checksum."""
        return prod(self.shape) * np.dtype(np.float16).itemsize

    @functools.cached_property
    def stride(self) -> int:
        """Return the bytes from one map of a shard to the next, if maps are not compressed."""
        return self.nbytes + CRC_NBYTES


@dataclass(frozen=True, kw_only=True)
class Table:
    """One array with a few numbers of every frame: a chunk of K rows, and so a file, for each shard."""

    key: str
    """The array's path in the cache."""
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """Shape of one frame's numbers."""

    @functools.cached_property
    def frame_nbytes(self) -> int:
        """Return the bytes of one frame's numbers."""
        return prod(self.shape) * self.dtype.itemsize

    def encode(self, shard_frames: int, local: NDArray[np.int64], values: NDArray[Any]) -> bytes:
        """Return the file of a shard.

        Args:
            shard_frames: K.
            local: the rows that the shard holds, counted from its first, int64 [n].
            values: their numbers, [n, *shape].
        """
        content = np.zeros((shard_frames, *self.shape), dtype=self.dtype)
        content[local] = values
        return with_crc(content.tobytes())

    def decode(self, content: bytes) -> NDArray[Any]:
        """Return the numbers in a file that was compared with its hash, [K, *shape]."""
        return np.frombuffer(content[:-CRC_NBYTES], self.dtype).reshape(-1, *self.shape)


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """Sizes and hashes of a shard's files, in the order of `Layout.files`."""

    sizes: tuple[int, ...]
    """Bytes of each file."""
    digests: tuple[bytes, ...]
    """sha256 of each file."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files."""
        return sum(self.sizes)


def choose_shard_frames(spec: GeometrySpec, frames: int) -> int:
    """Return K, 16 to 65,536, a power of two.

    It is about 32 MiB of one camera's largest maps, at most 4096, and small enough for 64 shards. It is larger where
    otherwise there would be more than 8192 shards, as long as a shard's maps take at most 4 GiB together.
    """
    map_nbytes = 2 * max(prod(spec.map_shape(name)) for name in spec.outputs) + CRC_NBYTES
    fitting = min(_SHARD_NBYTES // map_nbytes, frames // _SHARDS_AT_LEAST, _USUAL_SHARD_FRAMES)
    needed = 1 << (-(-frames // _MAX_SHARDS) - 1).bit_length()
    held = 1 << max(_MAX_SHARD_NBYTES // spec.frame_nbytes, MIN_SHARD_FRAMES).bit_length() - 1
    return min(max(MIN_SHARD_FRAMES, 1 << max(fitting, 1).bit_length() - 1, needed), held, MAX_SHARD_FRAMES)


def keep_shard_frames(current: int, spec: GeometrySpec, frames: int) -> int:
    """Return K for a cache that takes over the shards of one with `current` rows a shard: the same, unless outgrown."""
    chosen = choose_shard_frames(spec, frames)
    outgrown = chosen >= _OUTGROWN * current or -(-frames // current) > _MAX_SHARDS
    return chosen if outgrown else current


@dataclass(frozen=True)
class Layout:
    """The files of a cache's shards, and where in them each map lies."""

    frames: int
    """N."""
    shard_frames: int
    """K."""
    columns: tuple[Column, ...]
    """The columns in the order of the views, and of the outputs within a view."""
    tables: tuple[Table, ...]
    """The maps' checksums; from schema version 2 on, also the pictures' hashes and means."""
    codec: Codec = RAW
    """How maps are stored."""
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of(
        cls,
        spec: GeometrySpec,
        frames: int,
        shard_frames: int,
        codec: Codec = RAW,
        schema_version: int = SCHEMA_VERSION,
    ) -> "Layout":
        """Return the layout of a cache with this spec.

        Raises:
            UserInputError: a camera's key is the name of another part of the cache.
        """
        columns = tuple(
            Column(camera=camera, output=output, shape=spec.map_shape(output))
            for camera in spec.camera_keys
            for output in spec.outputs
        )
        views = len(spec.cameras)
        tables = [Table(key=CHECKSUMS, dtype=np.dtype("<u4"), shape=(len(columns),))]
        if schema_version >= 2:
            tables += [
                Table(key=PICTURE_HASH, dtype=np.dtype("<u8"), shape=(views,)),
                Table(key=PICTURE_MEANS, dtype=np.dtype("u1"), shape=(views, BLOCKS, BLOCKS, 3)),
            ]
        reserved = _RESERVED | {table.key for table in tables}
        for camera in spec.camera_keys:
            if camera.casefold() in reserved:
                raise UserInputError(f"camera key: expected none of {', '.join(sorted(reserved))}, got {camera!r}")
        return cls(frames, shard_frames, columns, tuple(tables), codec, schema_version)

    @property
    def shards(self) -> int:
        """Return how many shards N rows make; the last one may have fewer."""
        return -(-self.frames // self.shard_frames)

    def shard_rows(self, shard: int) -> tuple[int, int]:
        """Return (start, stop) of the rows that belong to a shard."""
        start = shard * self.shard_frames
        return start, min(start + self.shard_frames, self.frames)

    def shards_of(self, ranges: Ranges) -> Iterator[int]:
        """Yield the shards that have rows in merged ranges, in order, each once."""
        done = 0
        for start, stop in ranges:
            shards = range(max(done, start // self.shard_frames), (stop - 1) // self.shard_frames + 1)
            yield from shards
            done = shards.stop

    def files(self, shard: int) -> tuple[str, ...]:
        """Return the relative paths of a shard's files: one for each column, then one for each table."""
        return tuple(f"{array.key}/c.{shard}" + ".0" * len(array.shape) for array in self._arrays)

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the paths of the arrays that have a file for each shard, in the order of `files`."""
        return tuple(array.key for array in self._arrays)

    @property
    def _arrays(self) -> tuple[Column | Table, ...]:
        return (*self.columns, *self.tables)

    @property
    def index_nbytes(self) -> int:
        """Return the bytes of the index at the end of a column's file."""
        return self.shard_frames * 2 * _INDEX_DTYPE.itemsize + CRC_NBYTES

    def table_nbytes(self, table: Table) -> int:
        """Return the bytes of a table's file."""
        return self.shard_frames * table.frame_nbytes + CRC_NBYTES

    def size_bounds(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Return (least, most) bytes of each file of a shard that holds so many rows."""
        sizes = (self._map_bounds(column) for column in self.columns)
        columns = ((rows * low + self.index_nbytes, rows * high + self.index_nbytes) for low, high in sizes)
        return (*columns, *((self.table_nbytes(table),) * 2 for table in self.tables))

    def _map_bounds(self, column: Column) -> tuple[int, int]:
        """Return (least, most) bytes of a map in a file, with its checksum."""
        low, high = self.codec.bounds(column.nbytes)
        return low + CRC_NBYTES, high + CRC_NBYTES

    def raw_nbytes(self, rows: int, shards: int) -> int:
        """Return the bytes of the files of so many shards that hold so many rows together, without compression."""
        empty = len(self.columns) * self.index_nbytes + sum(map(self.table_nbytes, self.tables))
        return rows * sum(column.stride for column in self.columns) + shards * empty

    def index(self, local: NDArray[np.int64], lengths: NDArray[np.uint64] | int) -> bytes:
        """Return the index at the end of a shard file.

        Args:
            local: the rows that the file holds, counted from the shard's first, int64 [n].
            lengths: bytes of each map with its checksum, uint64 [n], or one number for all.
        """
        entries = np.full((self.shard_frames, 2), _ABSENT, dtype=_INDEX_DTYPE)
        sizes = np.broadcast_to(np.asarray(lengths, dtype=np.uint64), local.shape)
        entries[local, 0] = np.cumsum(sizes) - sizes
        entries[local, 1] = sizes
        return with_crc(entries.tobytes())

    def read_index(self, column: Column, local: NDArray[np.int64], content: bytes, nbytes: int) -> NDArray[np.int64]:
        """Return where maps begin according to a file's index, which must give them the places that a writer gives.

        Args:
            column: the file's column.
            local: the rows that the file holds, counted from the shard's first, int64 [n].
            content: the bytes of the index.
            nbytes: bytes of the file before the index.

        Returns:
            int64 [n + 1], the last one the end of the last map; empty if no writer writes this index.
        """
        low, high = self._map_bounds(column)
        offsets = np.zeros(len(local) + 1, dtype=np.int64)
        if len(content) == self.index_nbytes:
            lengths = np.frombuffer(content, _INDEX_DTYPE, count=2 * self.shard_frames).reshape(-1, 2)[local, 1]
            if ((lengths >= low) & (lengths <= high)).all() and self.index(local, lengths) == content:
                np.cumsum(lengths, out=offsets[1:])
                if offsets[-1] == nbytes:
                    return offsets
        return offsets[:0]

    def encode(
        self, column: Column, local: NDArray[np.int64], maps: NDArray[np.float16]
    ) -> tuple[Iterable[bytes | NDArray[np.uint8]], NDArray[np.uint32]]:
        """Return a shard file and the checksums of its maps.

        Args:
            column: the file's column.
            local: the maps' rows, counted from the shard's first, int64 [n].
            maps: float16 [n, h, w, 6], [n, h, w, D] or [n, h, w].

        Returns:
            The file's bytes, in parts that are made when they are asked for, and uint32 [n].
        """
        values = np.ascontiguousarray(maps, dtype="<f2")
        plain = values.view(np.uint8).reshape(len(local), -1)
        checksums = np.fromiter(map(crc32c, plain), dtype="<u4", count=len(local))
        if self.codec.compresses:
            packed = [with_crc(content) for content in self.codec.encode(values)]
            return [b"".join(packed), self.index(local, np.array([*map(len, packed)], np.uint64))], checksums
        return chain(_with_checksums(column, plain, checksums), [self.index(local, column.stride)]), checksums


def _with_checksums(
    column: Column, plain: NDArray[np.uint8], checksums: NDArray[np.uint32]
) -> Iterator[NDArray[np.uint8]]:
    """Yield maps [n, nbytes], each followed by its checksum, in blocks."""
    step = max(1, _BLOCK_NBYTES // column.stride)
    for start in range(0, len(plain), step):
        maps, sums = plain[start : start + step], checksums[start : start + step]
        block = np.empty((len(maps), column.stride), dtype=np.uint8)
        block[:, : column.nbytes] = maps
        block[:, column.nbytes :] = sums.view(np.uint8).reshape(-1, CRC_NBYTES)
        yield block


def shards_nbytes(spec: GeometrySpec, frames: int) -> int:
    """Return the bytes of all shards of a cache with so many frames in a row, without compression."""
    layout = Layout.of(spec, frames, choose_shard_frames(spec, frames))
    return layout.raw_nbytes(frames, layout.shards)
