"""Making a cache: its creation, shards committed one by one by as many processes as there are, and the seal.

The commit of a shard, each step durable before the next:

    1. every file of the shard, under a temporary name
    2. where the shard was there already, with fewer rows: a journal line that drops it
    3. the files' own names
    4. a journal line, from which on the shard exists

Whoever works on a shard holds its byte of the lock file, and whoever appends to the journal or seals holds the
journal's; the kernel frees both when their owner dies. docs/cache-format.md has the whole protocol.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache import durable, locks
from geomcache.cache.codecs import RAW, Codec
from geomcache.cache.contents import check_files
from geomcache.cache.create import check_episodes, check_rows, create, matching_header
from geomcache.cache.header import GROUP, LOCK, Header
from geomcache.cache.journal import Commit, Drop, Journal
from geomcache.cache.layout import CHECKSUMS, Column, ShardFiles
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.errors import (
    CacheCorruptError,
    CacheLockedError,
    GeometryError,
    NonFiniteGeometryError,
)
from geomcache.geometry import OUTPUTS, DatasetSpec, GeometrySpec
from geomcache.ranges import Ranges, clip_ranges, common_ranges, count_rows, merge_ranges, rows_of
from geomcache.statistics import Moments

Maps = Mapping[str, Mapping[str, NDArray[np.float16]]]
"""Camera -> output -> [n, h, w, 6] or [n, h, w]."""

DROPPED = ".dropped"  # ends the names of a dropped shard's files, which are kept until the shard is made again
_STATISTICS_VALUES = 1 << 17  # maps taken together for statistics, in values: their float64 copies fit the CPU's cache


@dataclass(frozen=True, slots=True)
class Claim:
    """A shard that is this process's to make."""

    shard: int
    rows: Ranges
    """Rows to compute and commit: those asked for, and those that the shard had before."""


class StoreWriter:
    """A cache, for writing, beside any number of other processes. Its methods may be called from several threads.

    Attributes:
        path: the cache, absolute.
        spec: what the geometry depends on.
        dataset: which frames it is of.
        shard_frames: K, rows of a shard.
        wanted: rows that were asked for, and those of shards that were dropped before.
        resumed: whether the cache was there before.
        removed_leftovers: files of interrupted runs that were removed when it was opened.
        torn_bytes: bytes of the journal that an interrupted append left, removed likewise.
        dropped: shards that were there, and are to be made again: dropped before, or lacking wanted rows.
    """

    def __init__(self, path: Path, header: Header, episode_lengths: NDArray[np.int64], wanted: Ranges) -> None:
        self.path, self.wanted, self.resumed = path, wanted, True
        self.spec, self.dataset, self.shard_frames = header.spec, header.dataset, header.shard_frames
        self.removed_leftovers = self.torn_bytes = 0
        self._header, self._layout = header, header.layout
        self._episode_starts = np.cumsum(episode_lengths) - episode_lengths
        self._journal = Journal(path / JOURNAL, self._layout, header.fingerprint)
        self._pending: set[int] = set()
        self._done: dict[int, int] = {}  # by shard: wanted rows that are there
        self._lock = locks.LockFile(path / LOCK)
        try:
            with self._current():
                check_files(path, header, self._journal)
                self._check_seal()
                owed = (part for rows in self._journal.owed.values() for part in rows)
                self.wanted = merge_ranges((*wanted, *owed))
                for shard in self._layout.shards_of(self.wanted):
                    self._update(shard)
                self.dropped = len({*self._journal.owed, *(self._pending & self._journal.commits.keys())})
                self.removed_leftovers += self._remove_drafts()
            self._remove_leftovers()
        except BaseException:
            self._lock.close()
            raise

    @classmethod
    def create_or_open(
        cls,
        path: str | Path,
        spec: GeometrySpec,
        dataset: DatasetSpec,
        episode_lengths: NDArray[np.int64],
        wanted: Iterable[tuple[int, int]],
        *,
        codec: Codec = RAW,
        overwrite: bool = False,
    ) -> Self:
        """Make a cache, or go on with the one that is there.

        Args:
            path: the cache's folder.
            spec: what the geometry depends on.
            dataset: which frames it is of.
            episode_lengths: frames of every episode, int64 [E].
            wanted: ranges of rows that the cache is to have, beside those it has.
            codec: of the maps.
            overwrite: replace a cache that is there. One process at most may ask for that.

        Raises:
            UserInputError: episodes or rows do not fit the dataset.
            CacheExistsError: something else is at the path.
            CacheMismatchError: a cache of other settings is there.
            CacheFormatError, CacheCorruptError: the cache that is there cannot be used.
            CacheLockedError: the file system has no POSIX locks, or the cache to be replaced is being written.
            OutOfSpaceError: there is no room.
        """
        folder = Path(path).absolute()
        lengths = check_episodes(dataset, episode_lengths)
        rows = check_rows(dataset, wanted)
        header = Header.new(spec, dataset, codec)
        created = (overwrite or not folder.exists()) and create(folder, header, lengths)
        if not created:
            header = matching_header(folder, header)
        writer = cls(folder, header, lengths, rows)
        writer.resumed = not created
        return writer

    def claim(self) -> Claim | None:
        """The next shard that is wanted, not there, and nobody's; None where there is none now."""
        with self._current():
            candidates = sorted(self._pending)
        for shard in candidates:
            if not self._lock.claim(shard):
                continue
            with self._current():  # its last owner may just have committed it
                if shard in self._pending:
                    return Claim(shard, self._target(shard))
            self._lock.release(shard)
        return None

    def release(self, claim: Claim) -> None:
        """Give a claim back without its shard."""
        self._lock.release(claim.shard)

    def commit(self, claim: Claim, maps: Maps) -> int:
        """Write a shard and make it durable; the claim ends with it.

        Args:
            claim: from `claim`.
            maps: camera -> output -> float16 [n, h, w, 6] or [n, h, w], the claim's rows in order.

        Returns:
            Bytes of the shard's files.

        Raises:
            GeometryError: cameras, outputs, shapes, dtypes or values are not the spec's.
            NonFiniteGeometryError: a value is NaN or infinite.
            OutOfSpaceError: there is no room. Nothing of the shard is left, and the claim goes on.
        """
        if not self._lock.holds(claim.shard):
            raise CacheLockedError(f"{self.path}: expected a claim of shard {claim.shard}, found none: claim it first")
        arrays = self._check_maps(claim, maps)
        files = [self.path / name for name in self._layout.files(claim.shard)]
        drafts = [durable.temporary(file) for file in files]
        try:
            written, statistics = self._write(claim, arrays, drafts)
            with self._current():
                if claim.shard in self._journal.commits:
                    self._append(Drop(claim.shard, "made again with more frames"))
            for draft, file in zip(drafts, files, strict=True):
                with durable.naming(file):
                    durable.rename(draft, file)
            for folder in {file.parent for file in files}:
                durable.sync_folder(folder)
        except BaseException:
            with contextlib.suppress(OSError):  # what failed is raised; what this leaves, the next run removes
                _remove(drafts)
            raise
        with self._current():
            self._append(Commit(claim.shard, claim.rows, written, statistics))
        _remove(path for path in map(_aside, files) if path.exists())  # of the shard as it was before it was dropped
        self._lock.release(claim.shard)
        return written.nbytes

    def drop(self, shard: int, files: ShardFiles, reason: str) -> bool:
        """Give a damaged shard up: its rows are owed, and whoever writes next makes them again.

        Its files are renamed, not deleted: no reader finds them, and a shard that turns out to be good is not lost.

        Args:
            shard: its number.
            files: as they were recorded when it was found damaged.
            reason: for the journal.

        Returns:
            False where another process works on it, or has made it again.
        """
        if not self._lock.claim(shard):
            return False
        try:
            with self._current():
                commit = self._journal.commits.get(shard)
                if commit is None or commit.files != files:
                    return False
                self._append(Drop(shard, reason))
                self._set_aside(self.path / name for name in self._layout.files(shard))
                return True
        finally:
            self._lock.release(shard)

    def frames_done(self) -> int:
        """How many of the wanted rows are there, by whoever made them."""
        with self._current():
            return sum(self._done.values())

    def pending(self) -> tuple[int, ...]:
        """Shards that are wanted and not there."""
        with self._current():
            return tuple(sorted(self._pending))

    def seal(self) -> bool:
        """Finish the cache where nothing is pending: statistics, then the manifest. True when it is sealed."""
        with self._current():
            if self._pending:
                return False
            statistics = self._journal.statistics()
            group = self._header.encode(statistics)
            manifest = Manifest(
                rows=self._journal.rows,
                files={**self._journal.files, GROUP: (len(group), sha256(group).hexdigest())},
                shards=self._journal.shards,
                statistics=statistics,
            ).encode(self._layout, self._header.fingerprint)
            sealed = {self.path / GROUP: group, self.path / MANIFEST: manifest}
            self._remove_drafts()
            if not all(path.exists() and path.read_bytes() == content for path, content in sealed.items()):
                self._unseal()
                durable.replace_file(self.path / GROUP, group)
                durable.replace_file(self.path / MANIFEST, manifest)
            return True

    def close(self) -> None:
        """Give all claims back. What was committed stays."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Hold the journal's lock, with its newest lines read and a torn one cut off."""
        with self._lock.exclusive():
            for shard in self._journal.read():
                self._update(shard)
            # Who appends unseals first: beside a manifest every line was acknowledged, and a bad one is no torn append.
            if self._journal.torn and (self.path / MANIFEST).exists():
                raise CacheCorruptError(
                    f"{self._journal.path}: expected whole lines, as the cache is sealed, found {self._journal.torn}"
                    " bytes that are none: the file was damaged; restore it from a copy"
                )
            self.torn_bytes += self._journal.repair()
            yield

    def _check_seal(self) -> None:
        """See that a manifest has the journal's shards. One that cannot be read is made again by `seal`."""
        path = self.path / MANIFEST
        try:
            shards = Manifest.parse(path.read_bytes(), path, self._layout, self._header.fingerprint).shards
        except (FileNotFoundError, CacheCorruptError):
            return
        if shards != self._journal.shards:
            raise CacheCorruptError(
                f"{self._journal.path}: expected the {len(shards)} shards that {MANIFEST} has, found"
                f" {len(self._journal.shards)}, or others: one of the files was damaged; restore it from a copy"
            )

    def _target(self, shard: int) -> Ranges:
        """Rows that a shard is to have: those asked for, and those it has or had."""
        commit = self._journal.commits.get(shard)
        return merge_ranges(
            (
                *clip_ranges(self.wanted, *self._layout.shard_rows(shard)),
                *(commit.rows if commit else ()),
                *self._journal.owed.get(shard, ()),
            )
        )

    def _update(self, shard: int) -> None:
        commit = self._journal.commits.get(shard)
        rows = commit.rows if commit else ()
        self._done[shard] = count_rows(common_ranges(self.wanted, rows))
        if rows == self._target(shard):
            self._pending.discard(shard)
        else:
            self._pending.add(shard)

    def _append(self, record: Commit | Drop) -> None:
        self._unseal()
        self._journal.append(record)
        self._update(record.shard)

    def _unseal(self) -> None:
        """Take the manifest and the statistics away before anything changes. Only under the journal's lock."""
        manifest = self.path / MANIFEST
        if _remove([manifest]):
            durable.sync_folder(self.path)
            durable.replace_file(self.path / GROUP, self._header.encode())

    def _remove_drafts(self) -> int:
        """Remove what an interrupted seal left. Only under the journal's lock."""
        return _remove(durable.temporary(self.path / name) for name in (GROUP, MANIFEST))

    def _remove_leftovers(self) -> None:
        """Remove temporary files, and files of shards that are not in the journal, where no living process works.

        The files of a dropped shard stay, under names of their own, until the shard is committed again.
        """
        found: dict[int, list[Path]] = {}
        for key in (*(column.key for column in self._layout.columns), CHECKSUMS):
            for entry in os.scandir(self.path / key):
                match = re.fullmatch(r"c\.(\d+)(?:\.0)+(\.tmp|\.dropped)?", entry.name)
                if match and (match[2] or int(match[1]) not in self._journal.commits):
                    found.setdefault(int(match[1]), []).append(Path(entry.path))
        for shard, paths in found.items():
            if not self._lock.claim(shard):
                continue
            with self._current():  # its owner may have committed it since
                committed, dropped = shard in self._journal.commits, shard in self._journal.owed
                temporary = [path for path in paths if path.suffix == durable.TEMPORARY]
                aside = [path for path in paths if path.suffix == DROPPED]
                named = [path for path in paths if path.suffix not in (durable.TEMPORARY, DROPPED)]
                if dropped:  # also by a process that was killed in the middle of dropping it
                    self._set_aside(path for path in named if not _aside(path).exists())
                stale = [*temporary, *(aside if committed else []), *([] if committed else named)]
                self.removed_leftovers += _remove(stale)
            self._lock.release(shard)

    @staticmethod
    def _set_aside(files: Iterable[Path]) -> None:
        for file in files:
            with contextlib.suppress(FileNotFoundError), durable.naming(file):
                durable.rename(file, _aside(file))

    def _write(
        self, claim: Claim, arrays: list[NDArray[np.float16]], drafts: list[Path]
    ) -> tuple[ShardFiles, dict[str, Any]]:
        """Write a shard's files; the statistics of what they hold, too."""
        local = rows_of(claim.rows) - self._layout.shard_rows(claim.shard)[0]
        written: list[tuple[int, bytes]] = []
        checksums: list[NDArray[np.uint32]] = []
        statistics: dict[str, Any] = {}
        for column, values, draft in zip(self._layout.columns, arrays, drafts[:-1], strict=True):
            parts, of_maps = self._layout.encode(column, local, values)
            written.append(durable.write_file(draft, parts))
            checksums.append(of_maps)
            statistics.setdefault(column.camera, {})[column.output] = _moments(column, values).to_dict()
        written.append(durable.write_file(drafts[-1], [self._layout.encode_checksums(local, checksums)]))
        sizes, digests = zip(*written, strict=True)
        return ShardFiles(sizes, digests), statistics

    def _check_maps(self, claim: Claim, maps: Maps) -> list[NDArray[np.float16]]:
        """The arrays in the order of the columns."""
        given = {f"{camera}/{output}": values for camera, outputs in maps.items() for output, values in outputs.items()}
        if set(given) != {column.key for column in self._layout.columns}:
            expected = ", ".join(column.key for column in self._layout.columns)
            raise GeometryError(f"maps: expected {expected}, got {', '.join(given) or 'none'}")
        for column in self._layout.columns:
            values, shape = given[column.key], (count_rows(claim.rows), *column.shape)
            if values.dtype != np.float16 or values.shape != shape:
                raise GeometryError(
                    f"{column.key}: expected float16 {list(shape)}, got {values.dtype} {list(values.shape)}"
                )
            self._check_values(claim, column, values)
        return [given[column.key] for column in self._layout.columns]

    def _check_values(self, claim: Claim, column: Column, values: NDArray[np.float16]) -> None:
        log = OUTPUTS[column.output].log
        good = np.isfinite(values) & (values > 0) if log else np.isfinite(values)
        if good.all():
            return
        at = np.flatnonzero(~good.reshape(len(values), -1).all(axis=1))
        row = int(rows_of(claim.rows)[at[0]])
        episode = int(self._episode_starts.searchsorted(row, "right")) - 1
        view = self.spec.camera_keys.index(column.camera)
        raise NonFiniteGeometryError(
            f"episode {episode} frame {row - int(self._episode_starts[episode])} camera {column.camera}"
            f" {column.output}: expected finite numbers{', above 0' if log else ''}, found others in"
            f" {len(at)} frames: check the model's weights",
            tuple((int(position), view, column.output) for position in at),
        )


def _moments(column: Column, values: NDArray[np.float16]) -> Moments:
    """Of a shard's maps of one column, block after block, so that float64 copies stay small."""
    block = max(1, 2 * _STATISTICS_VALUES // column.nbytes)
    return Moments.merged(
        Moments.of(column.output, values[start : start + block]) for start in range(0, len(values), block)
    )


def _aside(file: Path) -> Path:
    """Where a file of a dropped shard is kept."""
    return file.with_name(file.name + DROPPED)


def _remove(paths: Iterable[Path]) -> int:
    """Remove files; how many of them were there."""
    removed = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError), durable.naming(path):
            if path.name.endswith(DROPPED) and path.is_dir() and not path.is_symlink():
                durable.remove_tree(path)  # a folder was in the file's place
            else:
                durable.unlink(path)
            removed += 1
    return removed
