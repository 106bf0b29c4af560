"""Whether a cache is as it was written: every byte against the hashes in manifest and journal. No DA3, no dataset.

    root attributes, journal, manifest      their own checksums; manifest and journal against each other
    metadata, coordinates, episode table    bytes and sha256; coordinates against the episode table
    each shard                              bytes and sha256 of its files, crc32c of every map
    rows                                    the seal; none owed; no episode in part within a shard

Repair gives damaged shards up, and makes a damaged manifest again from the journal. It makes no geometry: the next
extraction does. A cache that is written meanwhile may be found damaged in a shard that was just made again.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from geomcache.cache.commands import extract_command
from geomcache.cache.contents import damaged_files, read_episodes
from geomcache.cache.header import EPISODE_TABLE, GROUP, Header
from geomcache.cache.journal import Journal
from geomcache.cache.layout import CRC_NBYTES, Column, Layout, ShardFiles, crc32c, without_crc
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.cache.store import GeometryStore
from geomcache.cache.writer import StoreWriter
from geomcache.cache.zarr_arrays import read_coordinates
from geomcache.errors import CacheCorruptError, CacheError, CacheFormatError
from geomcache.progress import human_bytes
from geomcache.ranges import (
    Ranges,
    RowSet,
    clip_ranges,
    common_ranges,
    count_rows,
    format_ranges,
    merge_ranges,
    rows_of,
)

_LISTED = 100  # lines of problems; --json has all


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a cache."""

    file: str
    """Relative to the cache."""
    message: str
    """One line."""
    shard: int | None = None
    """Where the file is a shard's."""
    rows: Ranges = ()
    """Rows that cannot be read because of it."""
    repairable: bool = False
    """Whether repair can do something about it: give the shard up, or make the file again."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found and did."""

    path: Path
    sealed: bool
    frames: int
    """Rows that the cache says it has."""
    shards: int
    nbytes: int
    """Of the shards' files."""
    problems: tuple[Problem, ...]
    repairs: tuple[str, ...] = ()
    """What was done about them, and what is left to do: a line each."""

    def lines(self) -> Iterator[str]:
        """For the user."""
        held = f"{self.frames} frames in {self.shards} shards, {human_bytes(self.nbytes)}"
        if not self.problems:
            yield f"{self.path}: {held}: every file, frame and row as it was written"
            return
        yield from (problem.message for problem in self.problems[:_LISTED])
        if len(self.problems) > _LISTED:
            yield f"... and {len(self.problems) - _LISTED} more: --json lists all"
        yield f"{self.path}: {held}: {len(self.problems)} found wrong"
        if self.repairs:
            yield from self.repairs
        elif any(problem.repairable for problem in self.problems):
            yield f"to mend what can be mended: geomcache verify {self.path} --repair"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        problems = [
            {
                "file": each.file,
                "shard": each.shard,
                "rows": [list(part) for part in each.rows],
                "message": each.message,
            }
            for each in self.problems
        ]
        facts = {"path": str(self.path), "sealed": self.sealed, "frames": self.frames, "shards": self.shards}
        return {**facts, "nbytes": self.nbytes, "problems": problems, "repairs": list(self.repairs)}


def verify(path: str | Path, *, repair: bool = False) -> VerifyReport:
    """Compare everything in a cache with what was written; a progress bar on a terminal.

    Args:
        path: of the cache.
        repair: give damaged shards up, and make a damaged manifest again.

    Raises:
        CacheNotFoundError: there is none.
        CacheFormatError: it is no cache, or its root attributes cannot be read.
        CacheLockedError: repair was asked for, and the file system has no POSIX locks.
    """
    folder = Path(path).absolute()
    check = _Check(folder)
    check.run()
    repairs = tuple(_repair(folder, check)) if repair and check.problems else ()
    return VerifyReport(
        path=folder,
        sealed=check.manifest is not None,
        frames=count_rows(check.rows),
        shards=len(check.shards),
        nbytes=check.nbytes,
        problems=tuple(check.problems),
        repairs=repairs,
    )


def require_intact(path: str | Path) -> None:
    """Verify a cache that is about to be used.

    Raises:
        CacheCorruptError: something is wrong with it; the message has the first problem.
        CacheError: as `verify`.
    """
    report = verify(path)
    if report.problems:
        raise CacheCorruptError(
            f"cache {report.path}: expected what was written, found {len(report.problems)} problems: list them with"
            f" `geomcache verify {report.path}`; the first is {report.problems[0].message}"
        )


class _Check:
    """One pass over a cache.

    Attributes:
        header: None where the root attributes are damaged.
        manifest: None where there is none that can be read.
        journal: likewise.
        shards: their files, by number; the manifest's, else the journal's.
        rows: that are there, likewise.
        nbytes: of the shards' files.
        problems: so far.
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
        self.episodes: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None  # starts and lengths

    def run(self) -> None:
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
        with tqdm(total=self.nbytes, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
            for shard, files in sorted(self.shards.items()):
                rows = clip_ranges(self.rows, *header.layout.shard_rows(shard))
                self.problems += _check_shard(self.folder, header.layout, shard, rows, files, self._name)
                bar.update(files.nbytes)

    def _add(self, file: str, message: str, *, repairable: bool = False) -> None:
        self.problems.append(Problem(file=file, message=message, repairable=repairable))

    def _read_manifest(self, header: Header) -> None:
        path = self.folder / MANIFEST
        try:
            self.manifest = Manifest.parse(path.read_bytes(), path, header.layout, header.fingerprint)
        except FileNotFoundError:
            self._add(
                MANIFEST,
                f"{path}: expected the seal of a finished cache, found none: give the extract command that made"
                " it once more",
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
        if journal.torn:
            self._add(
                JOURNAL,
                f"{journal.path}: expected whole lines, found {journal.torn} bytes behind them that are none: an append"
                " that a kill cut off, or damage",
            )
        if self.manifest is not None and self.manifest.shards != journal.shards:
            self._add(MANIFEST, f"{self.folder / MANIFEST}: expected the journal's shards and hashes, found others")
        for shard, rows in sorted(journal.owed.items()):
            self._add(
                JOURNAL,
                f"{journal.path}: shard {shard}: expected {count_rows(rows)} frames, found that they were dropped: the"
                " next extraction makes them again",
            )

    def _check_files(self, header: Header, contents: Manifest | Journal) -> None:
        """Metadata, coordinates and episode table."""
        group = [GROUP] if isinstance(contents, Manifest) else []
        # The attributes of a hostile cache may promise any number of chunks: what is named bounds what is looked for.
        names = itertools.islice(itertools.chain(group, header.metadata(), header.chunks()), len(contents.files) + 1)
        damaged = {}
        for name, error in damaged_files(self.folder, names, contents.files):
            damaged[name] = error
            self._add(name, str(error), repairable=name == GROUP)
        if damaged.keys() & {f"{name}/c.0" for name in EPISODE_TABLE}:
            return
        try:
            self.episodes = read_episodes(self.folder, header)
        except CacheCorruptError as error:
            self._add("episodes", str(error))
        else:
            if not damaged:
                self._check_coordinates(header, self.episodes[0])

    def _check_coordinates(self, header: Header, starts: NDArray[np.int64]) -> None:
        for first, episodes, frames in read_coordinates(self.folder, header):
            rows = np.arange(first, first + len(episodes))
            wanted = starts.searchsorted(rows, "right") - 1
            wrong = np.flatnonzero((episodes != wanted) | (frames != rows - starts[wanted]))
            if len(wrong):
                at = int(wrong[0])
                self._add(
                    "episode_index",
                    f"{self.folder}: row {first + at}: expected {self._name(first + at)} in the coordinates, as the"
                    f" episode table has it, found episode {episodes[at]} frame {frames[at]}: restore them from a copy",
                )

    def _check_rows(self) -> None:
        """Episodes are asked for as wholes: a shard of a sealed cache has all of its rows of an episode, or none.

        A cache of some shards, as `geomcache pull --episodes` makes it, has episodes that end where a shard does.
        """
        if self.manifest is None or self.episodes is None:
            return
        starts, lengths = self.episodes
        held = RowSet(self.rows)
        for episode in np.flatnonzero(~held.covers(starts, starts + lengths)).tolist():
            start, length = int(starts[episode]), int(lengths[episode])
            count = count_rows(clip_ranges(self.rows, start, start + length))
            if count and self._is_cut_within_a_shard(((start, start + length),)):
                self._add(
                    MANIFEST,
                    f"{self.folder / MANIFEST}: episode {episode}: expected all of its {length} frames or none, found"
                    f" {count}: extract the episode again",
                )

    def _is_cut_within_a_shard(self, episode: Ranges) -> bool:
        assert self.header is not None
        layout = self.header.layout
        parts = (clip_ranges(episode, *layout.shard_rows(shard)) for shard in layout.shards_of(episode))
        return any(0 < count_rows(common_ranges(self.rows, part)) < count_rows(part) for part in parts)

    def _name(self, row: int) -> str:
        if self.episodes is None:
            return f"row {row}"
        episode = int(self.episodes[0].searchsorted(row, "right")) - 1
        return f"episode {episode} frame {row - int(self.episodes[0][episode])}"


def _check_shard(
    folder: Path, layout: Layout, shard: int, rows: Ranges, written: ShardFiles, name_of: Callable[[int], str]
) -> Iterator[Problem]:
    """What is wrong with the files of a shard that holds these rows."""
    numbers = rows_of(rows)
    local = numbers - layout.shard_rows(shard)[0]
    files = [*zip(layout.files(shard), written.sizes, written.digests, strict=True)]

    def problem(file: str, fault: str, damaged: NDArray[np.int64]) -> Problem:
        which = _span(damaged, name_of) if len(damaged) else "no frame, but a checksum that other readers use"
        lost = merge_ranges((row, row + 1) for row in damaged.tolist())
        return Problem(file=file, message=f"{folder / file}: {fault}: {which}", shard=shard, rows=lost, repairable=True)

    name, size, digest = files.pop()
    content, fault = _check_file(folder / name, size, digest)
    if fault:  # without it no map of the shard is read
        yield problem(name, fault, numbers)
    table = None if fault else np.frombuffer(content[:-CRC_NBYTES], "<u4").reshape(-1, len(layout.columns))[local]
    for number, (column, (name, size, digest)) in enumerate(zip(layout.columns, files, strict=True)):
        content, fault = _check_file(folder / name, size, digest)
        if len(content) != size:
            yield problem(name, fault, numbers)
            continue
        body = len(content) - layout.index_nbytes
        offsets = layout.read_index(column, local, content[body:], body)
        checksums = None if table is None else table[:, number].tolist()
        bad = numbers[_damaged_maps(layout, column, content, offsets, checksums)] if len(offsets) else numbers
        if fault or len(bad):
            yield problem(name, fault or "expected the frames' checksums, found others", bad)


def _damaged_maps(
    layout: Layout, column: Column, content: bytes, offsets: NDArray[np.int64], checksums: list[int] | None
) -> NDArray[np.bool_]:
    """Which maps of a column's file have not the table's checksum, or where that is damaged, the one behind them.

    Compressed maps must have both: none is unpacked, and so none read, whose bytes have not the one behind them.
    """
    place = np.zeros(column.nbytes, np.uint8)

    def is_damaged(number: int, start: int, stop: int) -> bool:
        stored = content[start:stop]
        if not layout.codec.compresses:
            found = crc32c(stored[:-CRC_NBYTES])
            return found != checksums[number] if checksums is not None else without_crc(stored) is None
        packed = without_crc(stored)
        if packed is None:
            return True
        try:
            layout.codec.decode_into(packed, place)
        except (RuntimeError, ValueError):  # numcodecs' own, of bytes that are no Blosc buffer, or a larger one
            return True
        return checksums is not None and crc32c(place) != checksums[number]

    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return np.array([is_damaged(number, *each) for number, each in enumerate(bounds)], dtype=bool)


def _check_file(path: Path, size: int, digest: bytes) -> tuple[bytes, str]:
    """Content of a file, empty where it cannot be had in its size; what is wrong with it, empty where nothing is."""
    try:
        found = path.stat().st_size
        content = path.read_bytes() if found == size else b""
    except FileNotFoundError:
        return b"", "expected the file, found none"
    except OSError as error:
        return b"", f"expected to read it, found {error.strerror}"
    if len(content) != size:
        return b"", f"expected {size} bytes, found {found}"
    hexdigest = sha256(content).hexdigest()
    return content, "" if hexdigest == digest.hex() else f"expected sha256 {digest.hex()}, found {hexdigest}"


def _span(rows: NDArray[np.int64], name_of: Callable[[int], str]) -> str:
    first, last = int(rows[0]), int(rows[-1])
    return name_of(first) if len(rows) == 1 else f"{len(rows)} frames from {name_of(first)} to {name_of(last)}"


def _repair(folder: Path, check: _Check) -> Iterator[str]:
    """Give damaged shards up, or make a damaged manifest again; a line for the user for each thing done or left."""
    if check.header is None or check.episodes is None or check.journal is None:
        yield "nothing was repaired: restore the files above that are no shards' from a copy first"
        return
    damaged = {problem.shard: problem.file for problem in check.problems if problem.shard is not None}
    try:
        writer = StoreWriter(folder, check.header, check.episodes[1], ())
    except CacheCorruptError as error:
        yield f"nothing was repaired: {error}"
        return
    dropped: list[tuple[int, int]] = []
    with writer:
        for shard, file in damaged.items():
            if writer.drop(shard, check.shards[shard], f"damaged: {file}"):
                dropped += clip_ranges(check.rows, *check.header.layout.shard_rows(shard))
            else:
                yield f"shard {shard} was not dropped: another process has it, or has made it again"
        # A manifest that is there was made when nothing was missing, and nothing has been written since.
        if not damaged and (folder / MANIFEST).exists() and writer.seal():
            yield f"{folder / MANIFEST}: made again from the journal"
    if dropped:
        yield from _command(folder, check, merge_ranges(dropped))


def _command(folder: Path, check: _Check, dropped: Ranges) -> Iterator[str]:
    assert check.episodes is not None
    starts = check.episodes[0]
    episodes = np.unique(starts.searchsorted(rows_of(dropped), "right") - 1)
    yield f"dropped {count_rows(dropped)} frames of episodes {format_ranges(episodes)}; to make them again:"
    try:
        with GeometryStore.open(folder) as store:
            yield f"  {extract_command(store, episodes)}  (with --root DIR where the dataset is local)"
    except CacheError as error:
        yield f"  the extract command that made the cache, after this is mended: {error}"
