"""Compare every byte of a cache with the hashes in manifest and journal.

    root attributes, journal, manifest      their own checksums; manifest and journal with each other
    metadata, coordinates, episode table    bytes and sha256; shapes with the root attributes; coordinates with the
                                            episode table
    each shard                              bytes and sha256 of its files, crc32c of every map
    rows                                    the seal; no dropped shard; no episode that ends within a shard

Damage is wrong bytes, a wrong size, a missing file, or an error of the disk that a second read confirms; any other
failing read is reported as no damage. A shard that another process makes again meanwhile may be reported as damaged.
"""

import contextlib
import errno
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from geomcache.cache.header import COORDINATE_CHUNK, COORDINATES, FEATURE_BASIS, GROUP, Header
from geomcache.cache.inventory import EpisodeTable, damaged_files, read_episodes, read_feature_basis, small_files
from geomcache.cache.journal import Journal
from geomcache.cache.layout import CRC_NBYTES, Column, Layout, ShardFiles, crc32c, without_crc
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.errors import CacheCorruptError, CacheFormatError
from geomcache.ranges import Ranges, RowSet, clip_ranges, count_rows, merge_ranges, name_row, rows_of

_SECOND_READ_S = 0.5  # after which a failed read is tried once more: time for an NFS client to renew a stale handle
_DISK_ERRORS = {errno.EIO, errno.EUCLEAN, errno.ENODATA, errno.EBADMSG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A fault of a cache."""

    file: str
    """Relative to the cache."""
    message: str
    """One line."""
    shard: int | None = None
    """The shard that the file belongs to, if any."""
    rows: Ranges = ()
    """Rows that cannot be read because of it."""
    repairable: bool = False
    """True if repair can drop the shard or make the file again."""


class CacheCheck:
    """One pass over a cache.

    Attributes:
        folder: the cache.
        header: its root attributes; None where they are damaged.
        manifest: its manifest; None where it is missing or damaged.
        journal: its journal; None where it is missing or damaged.
        shards: sizes and hashes of the shards' files by the manifest, or by the journal where there is no manifest.
        rows: rows of the cache, from the same file.
        nbytes: bytes of the shards' files.
        problems: those found so far.
        episodes: the episode table; None where it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header: Header | None = None
        self.manifest: Manifest | None = None
        self.journal: Journal | None = None
        self.shards: dict[int, ShardFiles] = {}
        self.rows: Ranges = ()
        self.nbytes = 0
        self.problems: list[Problem] = []
        self.episodes: EpisodeTable | None = None

    def run(self, share: slice = slice(None)) -> None:
        """Check everything, but of the shards, in order, only a share."""
        try:
            self.header = header = Header.read(self.folder)
        except CacheCorruptError as error:
            self._add(GROUP, str(error))
            return
        self._read_manifest(header)
        self._read_journal(header)
        contents = self.manifest or self.journal
        if contents is None:
            return
        self.shards = contents.shards
        self.rows = contents.rows
        self.nbytes = sum(files.nbytes for files in self.shards.values())
        self._check_files(header, contents)
        self._check_rows()
        self._check_shards(header.layout, sorted(self.shards)[share])

    def _check_shards(self, layout: Layout, shards: Sequence[int]) -> None:
        nbytes = sum(self.shards[shard].nbytes for shard in shards)
        with tqdm(total=nbytes, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
            for shard in shards:
                rows = clip_ranges(self.rows, *layout.shard_rows(shard))
                with self._present(layout.files(shard), self.shards[shard]):
                    self.problems += _check_shard(self.folder, layout, shard, rows, self.shards[shard], self._name)
                bar.update(self.shards[shard].nbytes)

    @contextlib.contextmanager
    def _present(self, _names: Sequence[str], _written: ShardFiles) -> Iterator[None]:
        """Let a shard's files be in the folder meanwhile: for a subclass whose shards are elsewhere."""
        yield

    def _add(self, file: str, message: str, *, repairable: bool = False) -> None:
        self.problems.append(Problem(file=file, message=message, repairable=repairable))

    def _read_manifest(self, header: Header) -> None:
        path = self.folder / MANIFEST
        try:
            self.manifest = Manifest.parse(path.read_bytes(), path, header.layout, header.fingerprint)
        except FileNotFoundError:
            self._add(
                MANIFEST,
                f"{path}: expected the manifest of a sealed cache, found none: run the extract command that made the"
                " cache again to resume",
            )
        except (CacheCorruptError, CacheFormatError) as error:
            self._add(MANIFEST, str(error), repairable=True)

    def _read_journal(self, header: Header) -> None:
        journal = Journal(self.folder / JOURNAL, header.layout, header.fingerprint)
        try:
            journal.read()
        except (CacheCorruptError, CacheFormatError) as error:
            self._add(JOURNAL, str(error))
            return
        self.journal = journal
        if journal.incomplete_nbytes:
            self._add(
                JOURNAL,
                f"{journal.path}: expected complete lines, found {journal.incomplete_nbytes} bytes after the last one:"
                " damage, or an append that a kill interrupted",
            )
        if self.manifest is not None and self.manifest.shards != journal.shards:
            self._add(MANIFEST, f"{self.folder / MANIFEST}: expected the journal's shards and hashes, found others")
        for shard, rows in sorted(journal.dropped_rows.items()):
            self._add(
                JOURNAL,
                f"{journal.path}: shard {shard}: expected {count_rows(rows)} frames, found that the shard was dropped:"
                " the next extraction makes it again",
            )

    def _check_files(self, header: Header, contents: Manifest | Journal) -> None:
        """Check metadata, coordinates and episode table."""
        damaged = set()
        for name, error in damaged_files(self.folder, small_files(header, contents), contents.files):
            damaged.add(name)
            self._add(name, str(error), repairable=name == GROUP)
        for name, expected_shape in _array_shapes(header).items():
            if f"{name}/{GROUP}" in contents.files.keys() - damaged:
                self._check_shape(f"{name}/{GROUP}", expected_shape)
        if header.small_chunks[-1] not in damaged:
            try:
                read_feature_basis(self.folder, header)
            except CacheCorruptError as error:
                self._add(FEATURE_BASIS, str(error))
        if damaged & {f"{name}/c.0" for name in header.episode_table}:
            return
        try:
            self.episodes = read_episodes(self.folder, header)
        except CacheCorruptError as error:
            self._add("episodes", str(error))
            return
        if not damaged:
            self._check_coordinates(header.dataset.frames, self.episodes.start)

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Compare the shape in an array's metadata with the root attributes."""
        try:
            shape = json.loads((self.folder / name).read_bytes())["shape"]
        except (ValueError, KeyError, TypeError, RecursionError):
            shape = None
        if shape != [*expected]:
            self._add(
                name,
                f"{self.folder / name}: expected shape {[*expected]}, as the root attributes have it, found"
                f" {shape!r:.80}: another program wrote the file; do not use the cache",
            )

    def _check_coordinates(self, frames: int, starts: NDArray[np.int64]) -> None:
        """Compare the coordinates that other readers see with the episode table."""
        for chunk, first in enumerate(range(0, frames, COORDINATE_CHUNK)):
            rows = np.arange(first, min(first + COORDINATE_CHUNK, frames))
            wanted = starts.searchsorted(rows, "right") - 1
            try:
                episode_index, frame_index = (
                    _read_coordinates(self.folder / name / f"c.{chunk}", min(frames, COORDINATE_CHUNK))[: len(rows)]
                    for name in COORDINATES
                )
            except (RuntimeError, ValueError) as error:
                message = f"{self.folder}: expected coordinates of rows {first} to {rows[-1]}, found other content"
                self._add(COORDINATES[0], f"{message} ({error}): another program wrote them; do not use the cache")
                continue
            wrong = np.flatnonzero((episode_index != wanted) | (frame_index != rows - starts[wanted]))
            if len(wrong):
                row = first + int(wrong[0])
                self._add(
                    COORDINATES[0],
                    f"{self.folder}: row {row}: expected {self._name(row)} in the coordinates, as the episode table has"
                    f" it, found episode {episode_index[wrong[0]]} frame {frame_index[wrong[0]]}: restore them from a"
                    " copy",
                )

    def _check_rows(self) -> None:
        """Check that a shard of a sealed cache has all of its rows of an episode, or none.

        An episode may end where a shard does: `geomcache pull --episodes` makes caches of some shards.
        """
        if self.manifest is None or self.episodes is None:
            return
        starts, lengths, _ = self.episodes
        complete = RowSet(self.rows).covers(starts, starts + lengths)
        for episode in np.flatnonzero(~complete).tolist():
            start, length = int(starts[episode]), int(lengths[episode])
            present = clip_ranges(self.rows, start, start + length)
            if self._is_cut_within_a_shard(present, start, start + length):
                self._add(
                    MANIFEST,
                    f"{self.folder / MANIFEST}: episode {episode}: expected all of its {length} frames or none, found"
                    f" {count_rows(present)}: extract the episode again",
                )

    def _is_cut_within_a_shard(self, present: Ranges, start: int, stop: int) -> bool:
        """Return whether the present rows of an episode [start, stop) begin or end within a shard."""
        assert self.header is not None
        edges = (edge for part in present for edge in part if start < edge < stop)
        return any(edge % self.header.shard_frames for edge in edges)

    def _name(self, row: int) -> str:
        return f"row {row}" if self.episodes is None else name_row(self.episodes.start, row)


def _array_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a cache, by its path."""
    frames, columns = header.dataset.frames, header.layout.columns
    return {
        **{column.key: (frames, *column.shape) for column in columns},
        **{table.key: (frames, *table.shape) for table in header.layout.tables},
        **dict.fromkeys(COORDINATES, (frames,)),
        **dict.fromkeys(header.episode_table, (header.dataset.episodes,)),
        **({FEATURE_BASIS: (feature.width, feature.dim)} if (feature := header.spec.feature) else {}),
    }


def _read_coordinates(path: Path, count: int) -> NDArray[np.int64]:
    """Read a chunk of coordinates of unknown origin, int64 [count]: zstd, followed by its crc32c.

    Raises:
        ValueError, RuntimeError: it is none.
    """
    from numcodecs.zstd import Zstd  # the decoder that zarr uses

    compressed = without_crc(path.read_bytes())
    if compressed is None:
        raise ValueError("a wrong checksum")
    values = np.full(count, -1, dtype="<i8")
    Zstd().decode(compressed, out=values.view(np.uint8))  # refuses content that is larger than its target
    return values


def _check_shard(
    folder: Path, layout: Layout, shard: int, rows: Ranges, written: ShardFiles, name_of: Callable[[int], str]
) -> Iterator[Problem]:
    """Yield the problems of the files of a shard that has these rows."""
    numbers = rows_of(rows)
    local_rows = numbers - layout.shard_rows(shard)[0]
    files = [*zip(layout.files(shard), written.sizes, written.digests, strict=True)]
    files, (checksum_file, *signature_files) = files[: len(layout.columns)], files[len(layout.columns) :]

    def problem(file: str, fault: _Fault, damaged: NDArray[np.int64]) -> Problem:
        which = _describe_rows(damaged, name_of) if len(damaged) else "no frame, but a checksum that other readers use"
        return Problem(
            file=file,
            message=f"{folder / file}: {fault.text}: {which}",
            shard=shard,
            rows=merge_ranges((row, row + 1) for row in damaged.tolist()),
            repairable=fault.is_damage,
        )

    for name, size, digest in signature_files:  # without them no picture can be compared with the shard
        _, fault = _read_and_check(folder / name, size, digest)
        if fault:
            yield problem(name, fault, numbers)
    name, size, digest = checksum_file
    content, fault = _read_and_check(folder / name, size, digest)
    table = None
    if fault:  # without the table no map of the shard is read
        yield problem(name, fault, numbers)
    else:
        table = layout.tables[0].decode(content)[local_rows]
    for number, (column, (name, size, digest)) in enumerate(zip(layout.columns, files, strict=True)):
        content, fault = _read_and_check(folder / name, size, digest)
        if fault and not content:
            yield problem(name, fault, numbers)
            continue
        body_nbytes = len(content) - layout.index_nbytes
        offsets = layout.read_index(column, local_rows, content[body_nbytes:], body_nbytes)
        checksums = None if table is None else table[:, number].tolist()
        damaged = numbers
        if len(offsets):
            damaged = numbers[_damaged_maps(layout, column, content, offsets, checksums)]
        if fault or len(damaged):
            yield problem(name, fault or _Fault("expected the frames' checksums, found others"), damaged)


def _damaged_maps(
    layout: Layout, column: Column, content: bytes, offsets: NDArray[np.int64], checksums: list[int] | None
) -> NDArray[np.bool_]:
    """Return for each map of a column's file whether its checksum differs from the table's, bool [n].

    Where the table is damaged, the checksum that follows the map counts. Compressed maps must have both: a map is not
    decompressed, and so not read, unless the one that follows it is right.
    """
    decoded = np.zeros(column.nbytes, np.uint8)

    def is_damaged(number: int, start: int, stop: int) -> bool:
        stored = content[start:stop]
        if not layout.codec.compresses:
            if checksums is None:
                return without_crc(stored) is None
            return crc32c(stored[:-CRC_NBYTES]) != checksums[number]
        compressed = without_crc(stored)
        if compressed is None:
            return True
        try:
            layout.codec.decode_into(compressed, decoded)
        except (RuntimeError, ValueError):
            return True
        return checksums is not None and crc32c(decoded) != checksums[number]

    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return np.array([is_damaged(number, *each) for number, each in enumerate(bounds)], dtype=bool)


class _Fault(NamedTuple):
    """The reason why a file cannot be taken as it is."""

    text: str
    is_damage: bool = True
    """False where the file could not be read now, and may be whole."""


def _read_and_check(path: Path, size: int, digest: bytes) -> tuple[bytes, _Fault | None]:
    """Return a file's content, empty where it cannot be read in this size, and its fault."""
    try:
        content, actual_size = _read_confirmed(path, size)
    except FileNotFoundError:
        return b"", _Fault("expected the file, found none")
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            return b"", _Fault(f"expected to read it, found {error.strerror}")
        return b"", _Fault(f"expected to read it, found {error.strerror}; it may be whole: verify again", False)
    if actual_size != size:
        return b"", _Fault(f"expected {size} bytes, found {actual_size}")
    hexdigest = sha256(content).hexdigest()
    if hexdigest != digest.hex():
        return content, _Fault(f"expected sha256 {digest.hex()}, found {hexdigest}")
    return content, None


def _read_confirmed(path: Path, size: int) -> tuple[bytes, int]:
    """Return a file's content, empty where its size is another, and its size. An error is one that happened twice."""

    def read() -> tuple[bytes, int]:
        actual_size = path.stat().st_size
        content = path.read_bytes() if actual_size == size else b""
        return content, len(content) if actual_size == size else actual_size

    try:
        return read()
    except FileNotFoundError:
        return read()
    except OSError:
        time.sleep(_SECOND_READ_S)
        return read()


def _describe_rows(rows: NDArray[np.int64], name_of: Callable[[int], str]) -> str:
    first, last = int(rows[0]), int(rows[-1])
    return name_of(first) if len(rows) == 1 else f"{len(rows)} frames from {name_of(first)} to {name_of(last)}"
