"""Shard files: which frames belong into a shard, where their bytes lie, and what a shard's files hold.

docs/cache-format.md describes the files. Rows are the dataset's frame numbers; ranges of rows are half-open.

Legend:  N frames   K frames a shard   A columns (cameras x outputs), one array of the cache each   n rows at hand
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from geomcache.cache.codecs import RAW, Codec
from geomcache.errors import UserInputError
from geomcache.geometry import GeometrySpec
from geomcache.ranges import Ranges

CHECKSUMS = "frame_crc32c"  # the array of the frames' checksums
CRC_NBYTES = 4
MIN_SHARD_FRAMES, MAX_SHARD_FRAMES = 16, 4096
_SHARD_NBYTES = 32 << 20  # of one camera's rays, about
_SHARDS_AT_LEAST = 64  # a dataset, so that many processes find work
_RESERVED = {
    "episode_index",
    "frame_index",
    "episodes",
    CHECKSUMS,
    "zarr.json",
    "journal.jsonl",
    "manifest.json",
    "lock",
}
_INDEX_DTYPE = np.dtype("<u8")
_ABSENT = 2**64 - 1  # offset and length of an inner chunk that is not there


crc32c: Callable[[bytes | NDArray[Any]], int] = google_crc32c.value
"""Castagnoli's CRC of contiguous bytes. The library's function itself: the inner loops pay for every Python frame."""


def with_crc(data: bytes) -> bytes:
    """As Zarr's ``crc32c`` codec stores it: the checksum behind the data, little-endian."""
    return data + crc32c(data).to_bytes(CRC_NBYTES, "little")


def without_crc(data: bytes) -> bytes | None:
    """The data in front of its checksum; None where the two do not fit."""
    content = data[:-CRC_NBYTES]
    return content if with_crc(content) == data else None


@dataclass(frozen=True, kw_only=True)
class Column:
    """One array of maps: a camera's output."""

    camera: str
    output: str
    shape: tuple[int, ...]
    """Of one map."""

    @property
    def key(self) -> str:
        """The array's path in the cache."""
        return f"{self.camera}/{self.output}"

    @functools.cached_property
    def nbytes(self) -> int:
        """Of one map, without checksum."""
        return prod(self.shape) * np.dtype(np.float16).itemsize

    @functools.cached_property
    def stride(self) -> int:
        """Bytes from one map of a shard to the next, where maps are not compressed."""
        return self.nbytes + CRC_NBYTES


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """What was written of a shard: of its files, in the order of `Layout.files`."""

    sizes: tuple[int, ...]
    """In bytes."""
    digests: tuple[bytes, ...]
    """sha256."""

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self.sizes)


def choose_shard_frames(spec: GeometrySpec, frames: int) -> int:
    """K: a power of two, about 32 MiB of one camera's rays, and small enough for 64 shards a dataset. 16 to 4096."""
    ray_nbytes = 2 * prod(spec.map_shape("ray")) + CRC_NBYTES
    fitting = min(_SHARD_NBYTES // ray_nbytes, frames // _SHARDS_AT_LEAST, MAX_SHARD_FRAMES)
    return max(MIN_SHARD_FRAMES, 1 << max(fitting, 1).bit_length() - 1)


@dataclass(frozen=True)
class Layout:
    """Files of a cache's shards and what is where in them."""

    frames: int
    """N."""
    shard_frames: int
    """K."""
    columns: tuple[Column, ...]
    """In the order of the views, and of the outputs within a view."""
    codec: Codec = RAW
    """Of the maps."""

    @classmethod
    def of(cls, spec: GeometrySpec, frames: int, shard_frames: int, codec: Codec = RAW) -> "Layout":
        """Of a cache with this spec.

        Raises:
            UserInputError: a camera's key is the name of another part of a cache.
        """
        for camera in spec.camera_keys:
            if camera.casefold() in _RESERVED:
                raise UserInputError(f"camera key: expected none of {', '.join(sorted(_RESERVED))}, got {camera!r}")
        columns = tuple(
            Column(camera=camera, output=output, shape=spec.map_shape(output))
            for camera in spec.camera_keys
            for output in spec.outputs
        )
        return cls(frames, shard_frames, columns, codec)

    @property
    def shards(self) -> int:
        """How many shards N frames make, the last one perhaps in part."""
        return -(-self.frames // self.shard_frames)

    def shard_rows(self, shard: int) -> tuple[int, int]:
        """The rows that belong into a shard."""
        start = shard * self.shard_frames
        return start, min(start + self.shard_frames, self.frames)

    def shards_of(self, ranges: Ranges) -> Iterator[int]:
        """Shards with rows in merged ranges, in order, each once."""
        done = 0
        for start, stop in ranges:
            shards = range(max(done, start // self.shard_frames), (stop - 1) // self.shard_frames + 1)
            yield from shards
            done = shards.stop

    def files(self, shard: int) -> tuple[str, ...]:
        """Relative paths of a shard's files: one for each column, then the checksums'."""
        columns = (f"{column.key}/c.{shard}" + ".0" * len(column.shape) for column in self.columns)
        return (*columns, f"{CHECKSUMS}/c.{shard}.0")

    @property
    def index_nbytes(self) -> int:
        """Of the index at the end of a column's file."""
        return self.shard_frames * 2 * _INDEX_DTYPE.itemsize + CRC_NBYTES

    @property
    def table_nbytes(self) -> int:
        """Of the checksums' file."""
        return self.shard_frames * len(self.columns) * CRC_NBYTES + CRC_NBYTES

    def size_bounds(self, rows: int) -> tuple[tuple[int, int], ...]:
        """The least and the most bytes of the files of a shard that holds so many rows."""
        sizes = (self._map_bounds(column) for column in self.columns)
        columns = ((rows * low + self.index_nbytes, rows * high + self.index_nbytes) for low, high in sizes)
        return (*columns, (self.table_nbytes, self.table_nbytes))

    def _map_bounds(self, column: Column) -> tuple[int, int]:
        """The least and the most bytes of a map in a file, with its checksum."""
        low, high = self.codec.bounds(column.nbytes)
        return low + CRC_NBYTES, high + CRC_NBYTES

    def raw_nbytes(self, rows: int, shards: int) -> int:
        """Bytes of the files of so many shards that hold so many rows together, without compression."""
        empty = len(self.columns) * self.index_nbytes + self.table_nbytes
        return rows * sum(column.stride for column in self.columns) + shards * empty

    def index(self, local: NDArray[np.int64], lengths: NDArray[np.uint64] | int) -> bytes:
        """The index at the end of a shard file that holds these rows, counted from the shard's first.

        Args:
            local: int64 [n].
            lengths: bytes of each map with its checksum, uint64 [n], or of all.
        """
        entries = np.full((self.shard_frames, 2), _ABSENT, dtype=_INDEX_DTYPE)
        sizes = np.broadcast_to(np.asarray(lengths, dtype=np.uint64), local.shape)
        entries[local, 0] = np.cumsum(sizes) - sizes
        entries[local, 1] = sizes
        return with_crc(entries.tobytes())

    def read_index(self, column: Column, local: NDArray[np.int64], content: bytes, nbytes: int) -> NDArray[np.int64]:
        """Where the maps of these rows begin, by a file's index: the places that it must give them, or none.

        Args:
            column: whose file.
            local: the rows that it holds, counted from the shard's first, int64 [n].
            content: of the index.
            nbytes: of the file in front of the index.

        Returns:
            int64 [n + 1], the last one the end of the last map; empty where the index is not one of such a file.
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
    ) -> tuple[list[bytes | NDArray[np.uint8]], NDArray[np.uint32]]:
        """A shard file and the checksums of its maps.

        Args:
            column: whose file.
            local: rows that the maps are of, counted from the shard's first, int64 [n].
            maps: float16 [n, h, w, 6] or [n, h, w].

        Returns:
            The file's bytes, in two parts, and uint32 [n].
        """
        values = np.ascontiguousarray(maps, dtype="<f2")
        plain = values.view(np.uint8).reshape(len(local), -1)
        checksums = np.fromiter(map(crc32c, plain), dtype="<u4", count=len(local))
        if self.codec.compresses:
            packed = [with_crc(content) for content in self.codec.encode(values)]
            return [b"".join(packed), self.index(local, np.array([*map(len, packed)], np.uint64))], checksums
        body = np.empty((len(local), column.stride), dtype=np.uint8)
        body[:, : column.nbytes] = plain
        body[:, column.nbytes :] = checksums.view(np.uint8).reshape(-1, CRC_NBYTES)
        return [body, self.index(local, column.stride)], checksums

    def encode_checksums(self, local: NDArray[np.int64], checksums: Sequence[NDArray[np.uint32]]) -> bytes:
        """The file of a shard's checksums, from those of every column."""
        table = np.zeros((self.shard_frames, len(self.columns)), dtype="<u4")
        table[local] = np.stack(checksums, axis=1)
        return with_crc(table.tobytes())


def shards_nbytes(spec: GeometrySpec, frames: int) -> int:
    """Bytes of all shards of a cache with so many frames, one behind the other, without compression."""
    layout = Layout.of(spec, frames, choose_shard_frames(spec, frames))
    return layout.raw_nbytes(frames, layout.shards)
