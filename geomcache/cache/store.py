"""Read a cache on disk: what it was made of, which frames it has, and their geometry.

docs/cache-format.md describes the format. Only the plain reading path imports zarr: a training worker does not need it.
Ranges are half-open.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.commands import extract_command
from geomcache.cache.header import Header
from geomcache.cache.inventory import check_files, read_episodes, read_feature_basis
from geomcache.cache.journal import Journal
from geomcache.cache.layout import PICTURE_HASH, PICTURE_MEANS, Table
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.cache.records import Statistics, pool
from geomcache.cache.shard_reader import ShardReader
from geomcache.cache.signatures import Signatures
from geomcache.errors import CacheCorruptError, MissingFrameError, UserInputError
from geomcache.geometry import Geometry
from geomcache.ranges import Ranges, RowSet, locate, name_row
from geomcache.statistics import Moments


class GeometryStore:
    """A cache, open for reading: a sealed one, or an unsealed one with the frames it had when it was opened.

    Pickles by its path. Every process opens its own files at the first read, also a forked child whose parent has read
    already. Several threads may read at once.

    Attributes:
        path: absolute path of the cache.
        spec: what the geometry depends on.
        dataset: which frames the cache was made of.
        fingerprint: identity of spec and dataset.
        sealed: whether the cache is complete.
        rows: the rows that the cache has, as merged ranges.
        frames_present: how many rows it has.
        nbytes: bytes of the shards' files.
        shard_frames: K, rows per shard.
        codec: how the maps are stored, ``raw`` or ``zstd``.
        episode_start: row of each episode's first frame, int64 [E].
        episode_length: frames of each episode, int64 [E].
        episode_identity: what tells each episode from others, uint64 [E], 0 where the dataset does not say; None in a
            cache of schema version 1.
        schema_version: of the cache's format.
    """

    def __init__(self, path: Path, header: Header, contents: Manifest | Journal) -> None:
        self.path, self._header = path, header
        self.spec, self.dataset = header.spec, header.dataset
        self.fingerprint, self.shard_frames, self.codec = header.fingerprint, header.shard_frames, header.codec.name
        self.sealed = isinstance(contents, Manifest)
        self._contents, self._layout = contents, header.layout
        shards = contents.shards
        self._present_rows = RowSet(contents.rows)
        self.rows, self.frames_present = self._present_rows.ranges, self._present_rows.count
        self.nbytes = sum(files.nbytes for files in shards.values())
        self.schema_version = header.schema_version
        self.episode_start, self.episode_length, self.episode_identity = read_episodes(path, header)
        self._reader = ShardReader(str(path), self._layout, self._present_rows, shards, self._name)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a cache, sealed or not: read its metadata, its manifest or journal, and its episode table.

        Raises:
            CacheNotFoundError: nothing is at the path.
            CacheFormatError: the path is no cache, its metadata is malformed, or a newer version wrote it.
            CacheCorruptError: a file is damaged or missing.
        """
        folder = Path(path).absolute()
        while True:  # again where another process sealed or unsealed the cache meanwhile
            before = _identity(folder / MANIFEST)
            try:
                store = cls._read(folder)
            except CacheCorruptError:
                if _identity(folder / MANIFEST) == before:
                    raise
            else:
                if _identity(folder / MANIFEST) == before:
                    return store

    @classmethod
    def _read(cls, folder: Path) -> Self:
        header = Header.read(folder)
        try:
            data = (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            return cls.open_by_journal(folder)
        manifest = Manifest.parse(data, folder / MANIFEST, header.layout, header.fingerprint)
        check_files(folder, header, manifest)
        return cls(folder, header, manifest)

    @classmethod
    def open_by_journal(cls, path: str | Path) -> Self:
        """Open a cache by its journal, as a writer does, whatever its manifest is. Raises what `open` raises."""
        folder = Path(path).absolute()
        header = Header.read(folder)
        journal = Journal(folder / JOURNAL, header.layout, header.fingerprint)
        journal.read()
        check_files(folder, header, journal)
        return cls(folder, header, journal)

    @functools.cached_property
    def camera_statistics(self) -> Statistics:
        """Moments of each camera's outputs over the rows of the cache; empty where it has none."""
        return self._contents.statistics() if isinstance(self._contents, Journal) else self._contents.statistics

    @functools.cached_property
    def statistics(self) -> dict[str, Moments]:
        """Moments of each output, pooled over the cameras."""
        return pool(self.camera_statistics)

    @functools.cached_property
    def array_nbytes(self) -> dict[str, int]:
        """Bytes of the shards' files, by the array that they belong to."""
        keys = self._layout.keys
        sizes = np.array([files.sizes for files in self._contents.shards.values()], np.int64).reshape(-1, len(keys))
        return dict(zip(keys, sizes.sum(axis=0).tolist(), strict=True))

    @functools.cached_property
    def feature_basis(self) -> NDArray[np.float32] | None:
        """The basis by which features became the cached numbers, float32 [width, D]; None without features."""
        return read_feature_basis(self.path, self._header)

    def episodes(self) -> Ranges:
        """Return the ranges of the episodes that the cache has completely."""
        return _true_ranges(self._complete_episodes())

    def missing_episodes(self) -> Ranges:
        """Return the ranges of the episodes that lack a frame."""
        return _true_ranges(~self._complete_episodes())

    def covers(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Return for each row whether the cache has it, bool [n]."""
        rows = _as_rows(indices)
        return self._present_rows.covers(rows, rows + 1)

    def index(self, episode: int, frame: int) -> int:
        """Return the row of an episode's frame.

        Raises:
            UserInputError: the dataset has no such frame.
        """
        if not 0 <= episode < len(self.episode_start):
            raise UserInputError(f"episode: expected 0 to {len(self.episode_start) - 1}, got {episode}")
        if not 0 <= frame < self.episode_length[episode]:
            raise UserInputError(
                f"frame of episode {episode}: expected 0 to {self.episode_length[episode] - 1}, got {frame}"
            )
        return int(self.episode_start[episode]) + frame

    def locate(self, index: int) -> tuple[int, int]:
        """Return the episode of a row, and the frame's number within it.

        Raises:
            UserInputError: the dataset has no such row.
        """
        if not 0 <= index < self.dataset.frames:
            raise UserInputError(f"index: expected 0 to {self.dataset.frames - 1}, got {index}")
        return locate(self.episode_start, index)

    def frame(self, episode: int, frame: int) -> Geometry:
        """Return the geometry of one frame, as a batch of one. Raises what `index` and `batch` raise."""
        return self.batch([self.index(episode, frame)])

    def batch(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Geometry:
        """Read the geometry of B rows, in the order given, duplicates included.

        Returns:
            C-contiguous float16 arrays: rays [B, V, h, w, 6], features [B, V, h, w, D], other outputs [B, V, h, w].

        Raises:
            UserInputError: the dataset has no such row.
            MissingFrameError: the cache lacks a row; the message has the command that adds it.
            CacheCorruptError: a file is damaged, or a map differs from what was written.
        """
        rows = _as_rows(indices)
        return Geometry(**self._reader.read(rows, self._ranks(rows)))

    def signatures(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Signatures:
        """Read the signatures of the pictures that rows were made from, in the order given, duplicates included.

        Raises:
            UserInputError: the dataset has no such row, or the cache has schema version 1, and no signatures.
            MissingFrameError: the cache lacks a row; the message has the command that adds it.
            CacheCorruptError: a file is damaged.
        """
        rows = _as_rows(indices)
        means = self._signature_table(rows, PICTURE_MEANS)
        return Signatures(hashes=self.picture_hashes(rows), means=means)

    def picture_hashes(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
        """Read the exact part of `signatures` alone, [n, V]. Raises what `signatures` raises."""
        return self._signature_table(_as_rows(indices), PICTURE_HASH)

    def _signature_table(self, rows: NDArray[np.int64], key: str) -> NDArray[Any]:
        if self.schema_version == 1:
            raise UserInputError(f"{self.path}: expected signatures of pictures, found a cache of schema version 1")
        self._ranks(rows)
        return self._read_table(next(table for table in self._layout.tables if table.key == key), rows)

    def _read_table(self, table: Table, rows: NDArray[np.int64]) -> NDArray[Any]:
        return self._reader.read_table(table, rows)

    def _ranks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many rows of the cache precede each of these, which it must have."""
        ranks = self._present_rows.ranks(rows)
        if (ranks < 0).any():
            raise self._missing(int(rows[ranks < 0][0]))
        return ranks

    def batch_plain(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Geometry:
        """Read the same through zarr-python alone: slower, and the reference that tests compare `batch` with.

        Raises what `batch` raises, but checks only the checksums that Zarr's own codecs check.
        """
        from geomcache.cache.zarr_arrays import open_arrays

        rows, positions = np.unique(_as_rows(indices), return_inverse=True)
        for row in rows[~self.covers(rows)].tolist():
            raise self._missing(row)
        arrays = open_arrays(self._zarr_store(), self._header)
        maps: dict[str, NDArray[Any]] = {}
        for column in self._layout.columns:
            maps[column.key] = np.asarray(arrays[column.key].oindex[rows])
            if np.isnan(maps[column.key]).any():  # the fill value: zarr found no chunk
                raise CacheCorruptError(
                    f"{self.path}: {column.key}: expected {len(rows)} frames, found missing ones among them: a shard is"
                    f" missing; list the damage with `geomcache verify {self.path}`"
                )
        self._check_plain(arrays, rows, maps)
        return Geometry(
            **{
                output: np.stack([maps[f"{camera}/{output}"][positions] for camera in self.spec.camera_keys], axis=1)
                for output in self.spec.outputs
            }
        )

    def _zarr_store(self) -> Any:
        """Return what zarr-python opens the cache from."""
        return self.path

    def _check_plain(self, arrays: Mapping[str, Any], rows: NDArray[np.int64], maps: dict[str, NDArray[Any]]) -> None:
        """Check what zarr-python read, by array: for subclasses that have no other check."""

    def close(self) -> None:
        """Close all files. A later read opens them again."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.path,)

    def _complete_episodes(self) -> NDArray[np.bool_]:
        return self._present_rows.covers(self.episode_start, self.episode_start + self.episode_length)

    def _name(self, row: int) -> str:
        return name_row(self.episode_start, row)

    def _missing(self, row: int) -> MissingFrameError:
        episode, _ = self.locate(row)
        command = extract_command(self, np.array([episode]))
        return MissingFrameError(
            f"{self.path}: expected {self._name(row)}, found none (the cache has {self.frames_present} of"
            f" {self.dataset.frames} frames): add it with `{command}`"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells one version of a file from the next; None where there is no file."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns


def _as_rows(indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    array = np.asarray(indices)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise UserInputError(f"indices: expected a sequence of integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64, copy=False)


def _true_ranges(flags: NDArray[np.bool_]) -> Ranges:
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))
