"""Writing a cache: shards are committed one by one, by any number of processes, and then the cache is sealed.

The commit of a shard, each step durable before the next:

    1. every file of the shard, under a temporary name
    2. if the shard exists, with fewer rows: a journal line that drops it
    3. the files' own names
    4. a journal line, from which on the shard exists

Whoever works on a shard holds its byte of the lock file, and whoever appends to the journal or seals holds the
journal's byte; the kernel frees both when their owner dies. docs/cache-format.md describes the whole protocol.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache import durable, locks
from geomcache.cache.codecs import RAW, Codec
from geomcache.cache.create import (
    check_episodes,
    check_feature_basis,
    check_identities,
    check_rows,
    create,
    matching_header,
    require_cache,
)
from geomcache.cache.header import GROUP, LOCK, Header
from geomcache.cache.inventory import Stored, check_files
from geomcache.cache.journal import Commit, Drop, Journal
from geomcache.cache.layout import CHECKSUMS, PICTURE_HASH, PICTURE_MEANS, Column, ShardFiles, Table
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.cache.signatures import Signatures
from geomcache.errors import CacheCorruptError, CacheLockedError, GeometryError, NonFiniteGeometryError
from geomcache.geometry import OUTPUTS, DatasetSpec, GeometrySpec
from geomcache.ranges import Ranges, clip_ranges, common_ranges, count_rows, merge_ranges, name_row, rows_of
from geomcache.statistics import Moments

ShardMaps = Mapping[str, Mapping[str, NDArray[np.float16]]]
"""Camera -> output -> maps of n rows: [n, h, w, 6], [n, h, w, D] of features, or [n, h, w]."""

DROPPED = ".dropped"  # ends the names of a dropped shard's files, which are kept until the shard is made again
_SHARD_FILE = re.compile(rf"c\.(0|[1-9][0-9]*)(?:\.0)+({re.escape(durable.TEMPORARY)}|{re.escape(DROPPED)})?")
_STATISTICS_VALUES = 1 << 17  # values measured at a time: their float64 copies fit the CPU's cache


@dataclass(frozen=True, slots=True)
class Claim:
    """A process's exclusive right to make a shard."""

    shard: int
    rows: Ranges
    """The rows to compute and commit: those that were asked for, and those that the shard had before."""


class StoreWriter:
    """A cache that is open for writing, next to any number of other processes. Threads may share the object.

    Attributes:
        path: the cache's folder, absolute.
        address: of a cache whose shards are only made in the folder; None for others.
        spec: what the geometry depends on.
        dataset: the dataset that it belongs to.
        shard_frames: K, rows of a shard.
        wanted: the rows that were asked for, and those of shards that were dropped.
        removed_stale_files: how many files of interrupted runs were removed when it was opened.
    """

    address: str | None = None

    def __init__(self, path: Path, header: Header, episode_lengths: NDArray[np.int64], wanted: Ranges) -> None:
        """Open an existing cache.

        Raises:
            CacheFormatError, CacheCorruptError: it cannot be used.
            CacheLockedError: the file system has no POSIX locks, or another cache has taken its place.
        """
        self.path, self.wanted = path, wanted
        self.spec, self.dataset, self.shard_frames = header.spec, header.dataset, header.shard_frames
        self._header, self._layout = header, header.layout
        self._episode_starts = np.cumsum(episode_lengths) - episode_lengths
        self._journal = Journal(path / JOURNAL, self._layout, header.fingerprint)
        self._pending: set[int] = set()
        self._done: dict[int, int] = {}  # shard -> how many of its wanted rows are committed
        self._lock = locks.LockFile(path / LOCK)
        try:
            if Header.read(path) != header:  # nobody can replace it from here on
                raise CacheLockedError(f"{path}: expected the cache that was read, found another one: run this again")
            with self._current():
                check_files(path, header, self._journal)
                self._check_seal()
                self.wanted = merge_ranges((*wanted, *itertools.chain(*self._journal.dropped_rows.values())))
                for shard in self._layout.shards_of(self.wanted):
                    self._update(shard)
                self.removed_stale_files = self._remove_drafts()
            self.removed_stale_files += self._remove_stale_files()
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
        identities: NDArray[np.uint64] | None = None,
        feature_basis: NDArray[np.float32] | None = None,
        codec: Codec = RAW,
        shard_frames: int | None = None,
        overwrite: bool = False,
    ) -> Self:
        """Create a cache, or open the one that is there to resume or extend it.

        Args:
            path: the cache's folder.
            spec: what the geometry depends on.
            dataset: the dataset that it belongs to.
            episode_lengths: frames of every episode, int64 [E].
            wanted: ranges of rows that the cache is to have, in addition to those it has.
            identities: what tells each episode from others, uint64 [E]; None for a dataset of schema version 1.
            feature_basis: the spec's, float32 [width, D]; None without features.
            codec: how maps are stored.
            shard_frames: K of a cache that is created; None for one that suits it.
            overwrite: replace a cache that is there. At most one process may ask for that.

        Raises:
            UserInputError: episodes or rows do not fit the dataset, or the basis does not fit the spec.
            CacheExistsError: something else is at the path.
            CacheMismatchError: a cache of other settings is there.
            CacheFormatError, CacheCorruptError: the cache that is there cannot be used.
            CacheLockedError: the file system has no POSIX locks, or somebody has the cache to be replaced open.
            OutOfSpaceError: there is no room.
        """
        folder = Path(path).absolute()
        lengths = check_episodes(dataset, episode_lengths)
        rows = check_rows(dataset, wanted)
        header = Header.new(spec, dataset, codec, shard_frames)
        table = check_identities(dataset, identities)
        basis = check_feature_basis(spec, feature_basis)
        if overwrite or not folder.exists():
            create(folder, header, lengths, table, feature_basis=basis, overwrite=overwrite)
        require_cache(folder, "a cache or nothing", "choose another --output")
        with contextlib.closing(locks.LockFile(folder / LOCK)):  # nobody replaces the cache between its two readings
            return cls(folder, matching_header(folder, header), lengths, rows)

    def claim(self, among: Collection[int] | None = None) -> Claim | None:
        """Claim the next shard that is wanted, not committed and not claimed; None if there is none now.

        Args:
            among: the shards to choose from; None for all.
        """
        with self._current():
            candidates = sorted(self._pending if among is None else self._pending.intersection(among))
        for shard in candidates:
            if not self._lock.claim(shard):
                continue
            with self._current():  # its last owner may just have committed it
                if shard in self._pending:
                    return Claim(shard, self._rows_to_make(shard))
            self._lock.release(shard)
        return None

    def release(self, claim: Claim) -> None:
        """Give a claim back without making its shard."""
        self._lock.release(claim.shard)

    def commit(self, claim: Claim, maps: ShardMaps, signatures: Signatures | None = None) -> int:
        """Write a shard and make it durable; the claim ends with it.

        Args:
            claim: what `claim` returned.
            maps: camera -> output -> float16 [n, h, w, 6] or [n, h, w], the claim's rows in order.
            signatures: of the pictures that the maps were made from, in the same order. A cache of schema version 1 has
                no place for them.

        Returns:
            The bytes of the shard's files.

        Raises:
            GeometryError: cameras, outputs, shapes, dtypes or values are not the spec's, or signatures are missing.
            NonFiniteGeometryError: a value is NaN or infinite.
            OutOfSpaceError: there is no room. Nothing of the shard is left, and the claim stays.
        """
        arrays = self._checked(claim, maps)
        tables = self._checked_tables(claim, signatures)
        return self._publish(claim, lambda drafts: self._write(claim, arrays, tables, drafts))

    def adopt(self, claim: Claim, other: Path, commit: Commit, signatures: Signatures, *, check_content: bool) -> int:
        """Make a shard of the files of another cache's, and make it durable; the claim ends with it.

        Columns and checksums get a second name where the file system can, and are copied otherwise: no file of a shard
        is ever changed in place. The signatures are written. Caches of one spec, K and codec have equal files for equal
        maps, whatever their shards' numbers.

        Args:
            claim: what `claim` returned.
            other: the other cache, of the same spec, K and codec.
            commit: its journal's record of the shard, which has the claim's rows, counted from the first of each shard.
            signatures: of the pictures that the maps belong to, the claim's rows in order.
            check_content: compare the files with their hashes; otherwise with their sizes alone.

        Returns:
            The bytes of the shard's files.

        Raises:
            CacheCorruptError: a file of the other cache is missing, or not as it was written. Nothing of the shard is
                left, and the claim stays.
            GeometryError: the rows differ, or signatures are missing.
            OutOfSpaceError: as `commit`.
        """
        shift = (claim.shard - commit.shard) * self.shard_frames
        rows = tuple((start + shift, stop + shift) for start, stop in commit.rows)
        if rows != claim.rows:
            raise GeometryError(f"shard {claim.shard}: expected the rows {claim.rows!r:.80}, got {rows!r:.80}")
        tables = self._checked_tables(claim, signatures)
        files = [other / name for name in self._layout.files(commit.shard)[: len(self._layout.columns) + 1]]

        def take(drafts: list[Path]) -> tuple[ShardFiles, dict[str, Any]]:
            stored = zip(files, commit.files.sizes, commit.files.digests, drafts, strict=False)
            written = [_take(*each, check_content=check_content) for each in stored]
            written += self._write_tables(claim, tables, self._layout.tables[1:], drafts[len(files) :])
            return _as_shard_files(written), dict(commit.statistics)

        return self._publish(claim, take)

    def _publish(self, claim: Claim, write: Callable[[list[Path]], tuple[ShardFiles, dict[str, Any]]]) -> int:
        """Let `write` make the shard's files under temporary names, and commit them; return their bytes."""
        if not self._lock.holds(claim.shard):
            raise CacheLockedError(f"{self.path}: expected a claim of shard {claim.shard}, found none: claim it first")
        files = [self.path / name for name in self._layout.files(claim.shard)]
        drafts = [durable.temporary(file) for file in files]
        try:
            written, statistics = write(drafts)
            with self._current():
                if claim.shard in self._journal.commits:
                    self._append(Drop(claim.shard, "made again with more frames"))
            for draft, file in zip(drafts, files, strict=True):
                with durable.file_errors(file):
                    durable.rename(draft, file)
            for folder in {file.parent for file in files}:
                durable.sync_folder(folder)
        except BaseException:
            with contextlib.suppress(OSError):  # what failed is raised; what this leaves, the next run removes
                _remove(drafts)
            raise
        with self._current():
            self._append(Commit(claim.shard, claim.rows, written, statistics))
        dropped = map(_dropped_name, files)  # of the shard as it was before it was dropped
        _remove(path for path in dropped if path.exists())
        self._lock.release(claim.shard)
        return written.nbytes

    def drop(self, shard: int, files: ShardFiles, reason: str) -> bool:
        """Drop a damaged shard, so that the next writer makes its rows again.

        Its files are renamed, not deleted: no reader finds them, and a shard that turns out to be good is not lost.

        Args:
            shard: its number.
            files: what the journal said of its files when they were found damaged.
            reason: why, for the journal.

        Returns:
            False if another process is working on it, or has made it again.
        """
        if not self._lock.claim(shard):
            return False
        try:
            with self._current():
                commit = self._journal.commits.get(shard)
                if commit is None or commit.files != files:
                    return False
                self._append(Drop(shard, reason))
                _keep_dropped(self.path / name for name in self._layout.files(shard))
                return True
        finally:
            self._lock.release(shard)

    def frames_done(self) -> int:
        """Return how many of the wanted rows are committed, by this process or another."""
        with self._current():
            return sum(self._done.values())

    def shards_of(self, rows: Ranges) -> tuple[int, ...]:
        """Return the shards that have these rows, in order."""
        return tuple(self._layout.shards_of(rows))

    def pending(self) -> tuple[int, ...]:
        """Return the shards that have wanted rows and lack some of them."""
        with self._current():
            return tuple(sorted(self._pending))

    def seal(self) -> bool:
        """Write statistics and manifest and return True, or return False if a shard is pending."""
        with self._current():
            if self._pending:
                return False
            statistics = self._journal.statistics()
            group = self._header.encode(statistics)
            manifest = Manifest(
                rows=self._journal.rows,
                files={**self._journal.files, GROUP: Stored.of(group)},
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

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Hold the journal's lock, with its newest lines read and an incomplete one cut off."""
        with self._lock.exclusive():
            for shard in self._journal.read():
                self._update(shard)
            # Whoever appends unseals first: in a sealed cache a bad line is damage, and no append that was interrupted.
            if self._journal.incomplete_nbytes and (self.path / MANIFEST).exists():
                raise CacheCorruptError(
                    f"{self._journal.path}: expected whole lines, as the cache is sealed, found"
                    f" {self._journal.incomplete_nbytes} bytes of another: the file is damaged; restore it from a copy"
                )
            self._journal.repair()
            yield

    def _check_seal(self) -> None:
        """Refuse a manifest of other shards than the journal's. `seal` replaces one that cannot be read."""
        path = self.path / MANIFEST
        try:
            shards = Manifest.parse(path.read_bytes(), path, self._layout, self._header.fingerprint).shards
        except (FileNotFoundError, CacheCorruptError):
            return
        if shards != self._journal.shards:
            raise CacheCorruptError(
                f"{self._journal.path}: expected the {len(shards)} shards that {MANIFEST} has, found"
                f" {len(self._journal.shards)}, or others: one of the files is damaged; restore it from a copy"
            )

    def _rows_to_make(self, shard: int) -> Ranges:
        """Return the rows that a shard is to have: those asked for, and those it has or had."""
        commit = self._journal.commits.get(shard)
        return merge_ranges(
            (
                *clip_ranges(self.wanted, *self._layout.shard_rows(shard)),
                *(commit.rows if commit else ()),
                *self._journal.dropped_rows.get(shard, ()),
            )
        )

    def _update(self, shard: int) -> None:
        """Count a shard again after its journal lines changed."""
        commit = self._journal.commits.get(shard)
        rows = commit.rows if commit else ()
        self._done[shard] = count_rows(common_ranges(self.wanted, rows))
        if rows == self._rows_to_make(shard):
            self._pending.discard(shard)
        else:
            self._pending.add(shard)

    def _append(self, record: Commit | Drop) -> None:
        self._unseal()
        self._journal.append(record)
        self._update(record.shard)

    def _unseal(self) -> None:
        """Remove manifest and statistics before anything changes. Only under the journal's lock."""
        manifest = self.path / MANIFEST
        if _remove([manifest]):
            durable.sync_folder(self.path)
            durable.replace_file(self.path / GROUP, self._header.encode())

    def _remove_drafts(self) -> int:
        """Remove what an interrupted seal left; return how many files. Only under the journal's lock."""
        return _remove(durable.temporary(self.path / name) for name in (GROUP, MANIFEST))

    def _remove_stale_files(self) -> int:
        """Remove temporary files and files of shards that are not committed, except those of living processes.

        The files of a dropped shard stay, under names of their own, until the shard is committed again.

        Returns:
            How many files were removed.
        """
        candidates: dict[int, list[Path]] = {}
        for key in self._layout.keys:
            for entry in os.scandir(self.path / key):
                match = _SHARD_FILE.fullmatch(entry.name)
                shard = int(match[1]) if match else self._layout.shards
                if match and shard < self._layout.shards and (match[2] or shard not in self._journal.commits):
                    candidates.setdefault(shard, []).append(Path(entry.path))
        removed = 0
        for shard, paths in candidates.items():
            if not self._lock.claim(shard):
                continue
            with self._current():  # its owner may have committed it since
                if shard in self._journal.dropped_rows:  # and was killed before it had renamed all files
                    named = (path for path in paths if path.suffix not in (durable.TEMPORARY, DROPPED))
                    _keep_dropped(path for path in named if not _dropped_name(path).exists())
                committed = shard in self._journal.commits
                removed += _remove(
                    path for path in paths if path.suffix == durable.TEMPORARY or (path.suffix == DROPPED) == committed
                )
            self._lock.release(shard)
        return removed

    def _write(
        self, claim: Claim, arrays: list[NDArray[np.float16]], tables: dict[str, NDArray[Any]], drafts: list[Path]
    ) -> tuple[ShardFiles, dict[str, Any]]:
        """Write a shard's files; return what was written and the statistics of the maps as JSON types."""
        local = rows_of(claim.rows) - self._layout.shard_rows(claim.shard)[0]
        written: list[tuple[int, bytes]] = []
        checksums: list[NDArray[np.uint32]] = []
        statistics: dict[str, Any] = {}
        for column, values, draft in zip(self._layout.columns, arrays, drafts, strict=False):
            parts, of_maps = self._layout.encode(column, local, values)
            written.append(durable.write_file(draft, parts))
            checksums.append(of_maps)
            statistics.setdefault(column.camera, {})[column.output] = _moments(column, values).to_dict()
        tables[CHECKSUMS] = np.stack(checksums, axis=1)
        written += self._write_tables(claim, tables, self._layout.tables, drafts[len(arrays) :])
        return _as_shard_files(written), statistics

    def _write_tables(
        self, claim: Claim, contents: Mapping[str, NDArray[Any]], tables: Iterable[Table], drafts: Iterable[Path]
    ) -> list[tuple[int, bytes]]:
        """Write some of a shard's tables; return size and sha256 of each file."""
        local = rows_of(claim.rows) - self._layout.shard_rows(claim.shard)[0]
        return [
            durable.write_file(draft, [table.encode(self.shard_frames, local, contents[table.key])])
            for table, draft in zip(tables, drafts, strict=True)
        ]

    def _checked(self, claim: Claim, maps: ShardMaps) -> list[NDArray[np.float16]]:
        """Check the maps of a claim and return them in the order of the columns."""
        arrays = {
            f"{camera}/{output}": values for camera, outputs in maps.items() for output, values in outputs.items()
        }
        if set(arrays) != {column.key for column in self._layout.columns}:
            expected = ", ".join(column.key for column in self._layout.columns)
            raise GeometryError(f"maps: expected {expected}, got {', '.join(arrays) or 'none'}")
        for column in self._layout.columns:
            values, shape = arrays[column.key], (count_rows(claim.rows), *column.shape)
            if values.dtype != np.float16 or values.shape != shape:
                raise GeometryError(
                    f"{column.key}: expected float16 {list(shape)}, got {values.dtype} {list(values.shape)}"
                )
            self._check_values(claim, column, values)
        return [arrays[column.key] for column in self._layout.columns]

    def _checked_tables(self, claim: Claim, signatures: Signatures | None) -> dict[str, NDArray[Any]]:
        """Check the signatures of a claim and return them by the table that stores them."""
        tables: dict[str, NDArray[Any]] = {}
        if signatures is not None:
            tables = {PICTURE_HASH: signatures.hashes, PICTURE_MEANS: signatures.means}
        for table in self._layout.tables:
            if table.key == CHECKSUMS:  # made when the maps are written
                continue
            values, shape = tables.get(table.key), (count_rows(claim.rows), *table.shape)
            if values is None or values.dtype != table.dtype or values.shape != shape:
                found = "none" if values is None else f"{values.dtype} {list(values.shape)}"
                raise GeometryError(f"{table.key}: expected {table.dtype} {list(shape)}, got {found}")
        return tables

    def _check_values(self, claim: Claim, column: Column, values: NDArray[np.float16]) -> None:
        """Refuse NaN and infinity, and numbers without a logarithm where one is taken."""
        log = OUTPUTS[column.output].log
        fits = np.ones(len(values), bool)
        for part in _blocks(column, len(values)):
            good = np.isfinite(values[part]) & (values[part] > 0) if log else np.isfinite(values[part])
            fits[part] = good.reshape(len(good), -1).all(axis=1)
        if fits.all():
            return
        positions = np.flatnonzero(~fits)
        row = int(rows_of(claim.rows)[positions[0]])
        view = self.spec.camera_keys.index(column.camera)
        raise NonFiniteGeometryError(
            f"{name_row(self._episode_starts, row)} camera {column.camera} {column.output}: expected finite"
            f" numbers{', above 0' if log else ''}, found others in {len(positions)} frames: check the model's weights",
            tuple((int(position), view, column.output) for position in positions),
        )


def _take(file: Path, size: int, digest: bytes, draft: Path, *, check_content: bool) -> tuple[int, bytes]:
    """Link or copy a file of another cache, which has this size and sha256; return both.

    Raises:
        CacheCorruptError: it is missing, or not as it was written.
    """
    expected = Stored(size, digest.hex())
    try:
        durable.link_or_copy(file, draft)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CacheCorruptError(f"{file}: expected {expected}, found no such file") from None
    if draft.stat().st_size != size or (check_content and Stored.of_file(draft) != expected):
        raise CacheCorruptError(f"{file}: expected {expected}, found {Stored.of_file(draft)}")
    return size, digest


def _as_shard_files(written: list[tuple[int, bytes]]) -> ShardFiles:
    sizes, digests = zip(*written, strict=True)
    return ShardFiles(sizes, digests)


def _moments(column: Column, values: NDArray[np.float16]) -> Moments:
    """Measure a shard's maps of one column, block after block, so that float64 copies stay small."""
    return Moments.merged(Moments.of(column.output, values[part]) for part in _blocks(column, len(values)))


def _blocks(column: Column, rows: int) -> Iterator[slice]:
    """Yield parts of so many maps whose copies are small."""
    step = max(1, 2 * _STATISTICS_VALUES // column.nbytes)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _dropped_name(file: Path) -> Path:
    """Return the name under which a file of a dropped shard is kept."""
    return file.with_name(file.name + DROPPED)


def _keep_dropped(files: Iterable[Path]) -> None:
    """Give the files of a dropped shard names that no reader looks for."""
    for file in files:
        with contextlib.suppress(FileNotFoundError), durable.file_errors(file):
            durable.rename(file, _dropped_name(file))


def _remove(paths: Iterable[Path]) -> int:
    """Remove files; return how many of them existed."""
    removed = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError), durable.file_errors(path):
            if path.name.endswith(DROPPED) and path.is_dir() and not path.is_symlink():
                durable.remove_tree(path)  # a folder was in the file's place
            else:
                durable.unlink(path)
            removed += 1
    return removed
