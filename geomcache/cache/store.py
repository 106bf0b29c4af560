"""A cache on disk: what it is of, which frames it has, and their geometry.

The only importer of zarr, and only where a cache is made and on the plain reading path: a training worker needs none of
it. docs/cache-format.md has the format. Rows are the dataset's frame numbers; ranges are half-open.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.commands import extract_command
from geomcache.cache.contents import check_files, read_episodes
from geomcache.cache.header import Header
from geomcache.cache.journal import Journal
from geomcache.cache.layout import CHECKSUMS
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.cache.records import Statistics, pool
from geomcache.cache.shard_reader import ShardReader
from geomcache.cache.zarr_arrays import open_arrays
from geomcache.errors import CacheCorruptError, MissingFrameError, UserInputError
from geomcache.geometry import Geometry
from geomcache.ranges import Ranges, RowSet
from geomcache.statistics import Moments


class GeometryStore:
    """A cache, for reading: sealed, or as far as it was when it was opened.

    Pickles by its path. Every process opens files of its own, at the first read; a forked child may go on with an
    object that its parent has read from. Several threads may read at once.

    Attributes:
        path: the cache, absolute.
        spec: what the geometry depends on.
        dataset: which frames it is of.
        fingerprint: identity of both.
        sealed: whether it is finished.
        rows: the rows that are there, as merged ranges.
        frames_present: how many.
        nbytes: of the shards' files.
        shard_frames: K, rows of a shard.
        codec: how the maps are stored, ``raw`` or ``zstd``.
        episode_start: row of each episode's first frame, int64 [E].
        episode_length: frames of each episode, int64 [E].
    """

    def __init__(self, path: Path, header: Header, contents: Manifest | Journal) -> None:
        self.path, self._header = path, header
        self.spec, self.dataset = header.spec, header.dataset
        self.fingerprint, self.shard_frames, self.codec = header.fingerprint, header.shard_frames, header.codec.name
        self.sealed = isinstance(contents, Manifest)
        self._contents, self._layout = contents, header.layout
        shards = contents.shards
        self._held = RowSet(contents.rows)
        self.rows, self.frames_present = self._held.ranges, self._held.count
        self.nbytes = sum(files.nbytes for files in shards.values())
        self.episode_start, self.episode_length = read_episodes(path, header)
        self._reader = ShardReader(str(path), self._layout, self._held, shards, self._name)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a cache, finished or not. Reads metadata, the journal or manifest, and the episode table.

        Raises:
            CacheNotFoundError: there is none.
            CacheFormatError: it is no cache, malformed, or a newer version's.
            CacheCorruptError: a file is damaged or missing.
        """
        folder = Path(path).absolute()
        while True:  # until nobody seals it, or opens it for growth, in between
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
        contents: Manifest | Journal
        try:
            data = (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            contents = Journal(folder / JOURNAL, header.layout, header.fingerprint)
            contents.read()
        else:
            contents = Manifest.parse(data, folder / MANIFEST, header.layout, header.fingerprint)
        check_files(folder, header, contents)
        return cls(folder, header, contents)

    @functools.cached_property
    def camera_statistics(self) -> Statistics:
        """Moments of each camera's outputs over the rows that are there. Empty where none is."""
        return self._contents.statistics() if isinstance(self._contents, Journal) else self._contents.statistics

    @functools.cached_property
    def statistics(self) -> dict[str, Moments]:
        """Moments of each output over all cameras."""
        return pool(self.camera_statistics)

    @functools.cached_property
    def array_nbytes(self) -> dict[str, int]:
        """Bytes of the shards' files, by array."""
        keys = [column.key for column in self._layout.columns]
        sizes = np.array([files.sizes for files in self._contents.shards.values()], np.int64).reshape(-1, len(keys) + 1)
        return dict(zip([*keys, CHECKSUMS], sizes.sum(axis=0).tolist(), strict=True))

    def episodes(self) -> Ranges:
        """Ranges of the episodes whose frames are all there."""
        return _true_ranges(self._complete())

    def missing_episodes(self) -> Ranges:
        """Ranges of the episodes that lack a frame."""
        return _true_ranges(~self._complete())

    def covers(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Whether each row is there."""
        rows = _as_rows(indices)
        return self._held.covers(rows, rows + 1)

    def index(self, episode: int, frame: int) -> int:
        """The row of an episode's frame.

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
        """The episode and frame of a row.

        Raises:
            UserInputError: the dataset has no such row.
        """
        if not 0 <= index < self.dataset.frames:
            raise UserInputError(f"index: expected 0 to {self.dataset.frames - 1}, got {index}")
        episode = int(self.episode_start.searchsorted(index, "right")) - 1
        return episode, index - int(self.episode_start[episode])

    def frame(self, episode: int, frame: int) -> Geometry:
        """Geometry of one frame of an episode: a batch of one. Raises as `index` and `batch` do."""
        return self.batch([self.index(episode, frame)])

    def batch(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Geometry:
        """Geometry of rows: C-contiguous float16 arrays [B, V, h, w(, 6)], in the order asked for, duplicates kept.

        Raises:
            UserInputError: a row is none of the dataset's.
            MissingFrameError: a row is not in the cache; says how to add it.
            CacheCorruptError: a file is damaged, or a map is not the one that was written.
        """
        rows = _as_rows(indices)
        ranks = self._held.ranks(rows)
        if (ranks < 0).any():
            raise self._missing(int(rows[ranks < 0][0]))
        return Geometry(**self._reader.read(rows, ranks))

    def batch_plain(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Geometry:
        """The same through zarr-python alone: slower, and the reference that `batch` is compared with."""
        rows, places = np.unique(_as_rows(indices), return_inverse=True)
        for row in rows[~self.covers(rows)].tolist():
            raise self._missing(row)
        arrays = open_arrays(self._zarr_store(), self._header)
        maps: dict[str, NDArray[Any]] = {}
        for column in self._layout.columns:
            maps[column.key] = np.asarray(arrays[column.key].oindex[rows])
            if np.isnan(maps[column.key]).any():  # the fill value: zarr found no chunk
                raise CacheCorruptError(f"{self.path}: {column.key}: expected the frames asked for, found gaps")
        self._check_plain(arrays, rows, maps)
        return Geometry(
            **{
                output: np.stack([maps[f"{camera}/{output}"][places] for camera in self.spec.camera_keys], axis=1)
                for output in self.spec.outputs
            }
        )

    def _zarr_store(self) -> Any:
        """Where zarr-python finds the cache."""
        return self.path

    def _check_plain(self, arrays: Mapping[str, Any], rows: NDArray[np.int64], maps: dict[str, NDArray[Any]]) -> None:
        """For a subclass: see what zarr-python read, by array. Here it is the reference, and taken as it is."""

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.path,)

    def _complete(self) -> NDArray[np.bool_]:
        return self._held.covers(self.episode_start, self.episode_start + self.episode_length)

    def _name(self, row: int) -> str:
        episode, frame = self.locate(row)
        return f"episode {episode} frame {frame}"

    def _missing(self, row: int) -> MissingFrameError:
        episode, _ = self.locate(row)
        command = extract_command(self, np.array([episode]))
        return MissingFrameError(
            f"{self.path}: expected {self._name(row)}, found none (the cache has {self.frames_present} of"
            f" {self.dataset.frames} frames): add it with `{command}`"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells one version of a file from the next; None where there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns


def _as_rows(indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    array = np.asarray(indices)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise UserInputError(f"indices: expected a sequence of integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64, copy=False)


def _true_ranges(flags: NDArray[np.bool_]) -> Ranges:
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))
