"""What of a cache is durable: the journal, a line for each shard while it grows, and the manifest that seals it.

Both are text with checksums of their own; docs/cache-format.md describes them. What the journal does not name does not
exist. Nothing in them is a path of a shard: those follow from the layout, so that no record can lead elsewhere.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from geomcache.cache import durable
from geomcache.cache.layout import Layout, Ranges, ShardFiles, clip_ranges, count_rows, crc32c, merge_ranges
from geomcache.errors import CacheCorruptError, CacheFormatError, GeomcacheError
from geomcache.geometry import canonical_json
from geomcache.statistics import Moments

JOURNAL, MANIFEST = "journal.jsonl", "manifest.json"
SCHEMA_VERSION = 1

Files = dict[str, tuple[int, str]]
"""Relative path -> bytes and sha256, hexadecimal, of metadata, coordinates and episode table."""
Statistics = dict[str, dict[str, Moments]]
"""Camera -> output -> moments over the rows that are there."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A shard is durable."""

    shard: int
    rows: Ranges
    files: ShardFiles
    statistics: Mapping[str, Any]
    """Of its rows: `Statistics` as JSON types. A cache has thousands of shards and reads these once."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "record": "commit",
            "shard": self.shard,
            "rows": self.rows,
            "bytes": self.files.sizes,
            "sha256": [digest.hex() for digest in self.files.digests],
            "statistics": self.statistics,
        }


@dataclass(frozen=True, slots=True)
class Drop:
    """A shard that was durable is so no more, and has to be made again."""

    shard: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"record": "drop", "shard": self.shard, "reason": self.reason}


class Journal:
    """The state that the journal's lines add up to.

    Attributes:
        files: what was there before the first shard.
        commits: of the shards that exist.
        owed: rows of the shards that were dropped and are not made again yet.
        torn: bytes behind the last good line: an append that a kill cut off, never acknowledged.
    """

    def __init__(self, path: Path, layout: Layout, fingerprint: str) -> None:
        self.path = path
        self.files: Files = {}
        self.commits: dict[int, Commit] = {}
        self.owed: dict[int, Ranges] = {}
        self.torn = 0
        self._layout, self._fingerprint = layout, fingerprint
        self._length = 0  # of the good lines

    def read(self) -> set[int]:
        """Read what was appended since the last time; the shards it is about.

        Raises:
            CacheCorruptError: a line is damaged, or the journal is not there or of another cache.
        """
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(self._length)
                data = file.read()
        except FileNotFoundError:
            raise CacheCorruptError(
                f"{self.path}: expected the journal, found none: restore it from a copy, or make the cache anew with"
                " `geomcache extract --overwrite`"
            ) from None
        if size < self._length:
            raise CacheCorruptError(f"{self.path}: expected {self._length} bytes or more, found {size}: it was cut off")
        begun = self._length > 0
        good, records = self._split(data)
        if not begun:
            if not records:
                raise CacheCorruptError(f"{self.path}: expected a first line, found {size} bytes without one")
            self._begin(records.pop(0))
        self._length += good
        self.torn = len(data) - good
        return {self._take(record) for record in records}

    def _split(self, data: bytes) -> tuple[int, list[Any]]:
        """Length of the good lines at the front, and what they say."""
        records: list[Any] = []
        good = position = 0
        while (end := data.find(b"\n", position) + 1) > 0:
            with malformed(self.path):
                record = decode_line(data[position:end])
            if record is not None and good < position:
                raise CacheCorruptError(
                    f"{self.path}: expected lines with their checksums, found a damaged one at byte"
                    f" {self._length + good}: restore the file from a copy, or make the cache anew with"
                    " `geomcache extract --overwrite`"
                )
            if record is not None:
                records.append(record)
                good = end
            position = end
        return good, records

    def _begin(self, record: Any) -> None:
        with malformed(self.path):
            if record["record"] != "begin":
                raise ValueError("begin, on the first line")
            check_identity(record, self.path, self._layout, self._fingerprint)
            self.files = parse_files(record["files"])

    def _take(self, record: Any) -> int:
        with malformed(self.path):
            kind, shard = record["record"], record["shard"]
            if kind == "commit":
                rows = parse_ranges(record["rows"], *self._layout.shard_rows(check_shard(shard, self._layout)))
                files = parse_shard_files(record["bytes"], record["sha256"], self._layout, count_rows(rows))
                if not isinstance(record["statistics"], dict):
                    raise ValueError("statistics")
                self.commits[shard] = Commit(shard, rows, files, record["statistics"])
                self.owed.pop(shard, None)
            elif kind == "drop" and shard in self.commits:
                self.owed[shard] = self.commits.pop(shard).rows
            else:
                raise ValueError("commit, or drop of a shard that is there")
        return int(shard)

    def repair(self) -> int:
        """Cut off what follows the last good line; how many bytes. Only under the journal's lock."""
        torn = self.torn
        if torn:
            with durable.naming(self.path):
                descriptor = durable.open_file(self.path, 0)
                try:
                    durable.truncate(descriptor, self._length)
                    durable.fsync(descriptor)
                finally:
                    os.close(descriptor)
            self.torn = 0
        return torn

    def append(self, record: Commit | Drop) -> None:
        """Add a line and make it durable. Only under the journal's lock, after `read` and `repair`."""
        line = encode_line(record.to_dict())
        with durable.naming(self.path):
            descriptor = durable.open_file(self.path, os.O_APPEND)
            try:
                durable.write_all(descriptor, line)
                durable.fsync(descriptor)
            except BaseException:
                durable.truncate(descriptor, self._length)
                raise
            finally:
                os.close(descriptor)
        self.read()

    @property
    def rows(self) -> Ranges:
        """The rows that are there."""
        return merge_ranges(part for commit in self.commits.values() for part in commit.rows)

    @property
    def shards(self) -> dict[int, ShardFiles]:
        """As of `Manifest`: files of the shards that exist."""
        return {shard: commit.files for shard, commit in self.commits.items()}

    def statistics(self) -> Statistics:
        """Over the rows that are there, merged in the order of the shards. Empty where there are none."""
        parts = []
        for shard in sorted(self.commits):
            with malformed(self.path):
                parts.append(parse_statistics(self.commits[shard].statistics, self._layout))
        merged: Statistics = {}
        for column in self._layout.columns if parts else ():
            moments = Moments.merged(part[column.camera][column.output] for part in parts)
            merged.setdefault(column.camera, {})[column.output] = moments
        return merged


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a sealed cache holds."""

    rows: Ranges
    files: Files
    shards: dict[int, ShardFiles]
    statistics: Statistics

    def encode(self, layout: Layout, fingerprint: str) -> bytes:
        """The file's content."""
        shards = (
            [shard, self.shards[shard].sizes, [digest.hex() for digest in self.shards[shard].digests]]
            for shard, _ in held_by_shard(self.rows, layout)
        )
        members = {
            **{name: canonical_json(value) for name, value in identity(layout, fingerprint).items()},
            "rows": canonical_json(self.rows),
            "statistics": canonical_json(describe_statistics(self.statistics)),
            "files": canonical_json(self.files).replace(b"],", b"],\n"),
            "shards": b"[\n" + b",\n".join(map(canonical_json, shards)) + b"\n]",
        }
        content = b"{\n" + b",\n".join(b'"%s":%s' % (name.encode(), value) for name, value in members.items())
        return content + _seal(content)

    @classmethod
    def parse(cls, data: bytes, path: Path, layout: Layout, fingerprint: str) -> "Manifest":
        """Back from `encode`; `path` is for messages.

        Raises:
            CacheCorruptError: it is damaged, or of another cache.
        """
        content = data[: -len(_seal(b""))]
        if content + _seal(content) != data:
            raise CacheCorruptError(
                f"{path}: expected content with the sha256 at its end, found other bytes: give the extract command that"
                " made the cache once more, it makes the manifest again from the journal"
            )
        with malformed(path):
            record = json.loads(data)
            check_identity(record, path, layout, fingerprint)
            rows = parse_ranges(record["rows"], 0, layout.frames)
            shards = {}
            for (held, count), (shard, sizes, hashes) in zip(
                held_by_shard(rows, layout), record["shards"], strict=True
            ):
                if shard != held:
                    raise ValueError(f"shard {held}")
                shards[held] = parse_shard_files(sizes, hashes, layout, count)
            statistics = parse_statistics(record["statistics"]["cameras"], layout)
            return cls(rows=rows, files=parse_files(record["files"]), shards=shards, statistics=statistics)


def identity(layout: Layout, fingerprint: str) -> dict[str, Any]:
    """Members that begin journal and manifest: of which cache they are, and how its shards are cut."""
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "shard_frames": layout.shard_frames,
        "columns": [column.key for column in layout.columns],
    }


def check_identity(record: Any, path: Path, layout: Layout, fingerprint: str) -> None:
    """Compare those members.

    Raises:
        CacheCorruptError: one differs.
    """
    for name, expected in identity(layout, fingerprint).items():
        if record[name] != expected:
            raise CacheCorruptError(
                f"{path}: expected {name} {expected}, as zarr.json has it, found {record[name]}: files of two caches"
                " were mixed, or one is damaged; restore them from a copy"
            )


def begin_line(layout: Layout, fingerprint: str, files: Files) -> bytes:
    """The journal's first line: what a cache without shards holds."""
    return encode_line({"record": "begin", **identity(layout, fingerprint), "files": files})


def encode_line(record: Mapping[str, Any]) -> bytes:
    """A line of the journal: JSON whose last member is the crc32c of all bytes before it."""
    content = canonical_json(record)[:-1]
    return content + b',"crc32c":"%08x"}\n' % crc32c(content)


def decode_line(line: bytes) -> Any:
    """What a line says; None where its checksum does not fit."""
    tail = len(b',"crc32c":"00000000"}\n')
    content = line[:-tail]
    if line[-tail:] != b',"crc32c":"%08x"}\n' % crc32c(content):
        return None
    return json.loads(line)


def held_by_shard(rows: Ranges, layout: Layout) -> Iterator[tuple[int, int]]:
    """(shard, how many of the rows it holds) of the shards that hold any, in order."""
    for shard in layout.shards_of(rows):
        yield shard, count_rows(clip_ranges(rows, *layout.shard_rows(shard)))


def describe_statistics(statistics: Statistics) -> dict[str, Any]:
    """As JSON types: of each camera, and pooled over them."""
    cameras = {
        camera: {output: moments.to_dict() for output, moments in outputs.items()}
        for camera, outputs in statistics.items()
    }
    return {"pooled": {name: moments.to_dict() for name, moments in pool(statistics).items()}, "cameras": cameras}


def pool(statistics: Statistics) -> dict[str, Moments]:
    """Of each output over all cameras, merged in the order of the views."""
    names = next(iter(statistics.values()), {})
    return {name: Moments.merged(outputs[name] for outputs in statistics.values()) for name in names}


def parse_statistics(data: Any, layout: Layout) -> Statistics:
    """Moments of every column, from JSON types."""
    statistics: Statistics = {}
    for column in layout.columns:
        moments = Moments.from_dict(data[column.camera][column.output], column.output)
        statistics.setdefault(column.camera, {})[column.output] = moments
    if sum(map(len, data.values())) != len(layout.columns):
        raise ValueError("statistics of every camera's outputs")
    return statistics


def parse_ranges(data: Any, start: int, stop: int) -> Ranges:
    """Merged ranges of rows from `start` on, before `stop`, from JSON types."""
    ranges = tuple((first, last) for first, last in data)
    bounds = [bound for item in ranges for bound in item]
    ascending = all(a < b for a, b in itertools.pairwise(bounds))
    if not (all(type(bound) is int for bound in bounds) and ascending and start <= min(bounds, default=start)):
        raise ValueError(f"ascending ranges of rows from {start} on")
    if max(bounds, default=stop) > stop:
        raise ValueError(f"ranges of rows before {stop}")
    return ranges


def parse_shard_files(sizes: Any, hashes: Any, layout: Layout, rows: int) -> ShardFiles:
    """Files of a shard that holds so many rows, from JSON types."""
    bounds = layout.size_bounds(rows)
    fits = (type(size) is int and low <= size <= high for size, (low, high) in zip(sizes, bounds, strict=True))
    if rows < 1 or not all(fits):
        raise ValueError(f"files of {' '.join(f'{low} to {high}' for low, high in bounds)} bytes")
    digests = tuple(map(bytes.fromhex, hashes))
    if [len(digest) for digest in digests] != [sha256().digest_size] * len(bounds):
        raise ValueError(f"{len(bounds)} sha256")
    return ShardFiles(tuple(sizes), digests)


def parse_files(data: Any) -> Files:
    """Bytes and sha256 of files, from JSON types."""
    files = {name: (size, digest) for name, (size, digest) in data.items()}
    if not all(type(size) is int and type(digest) is str for size, digest in files.values()):
        raise ValueError("bytes and sha256 of files")
    return files


def check_shard(shard: Any, layout: Layout) -> int:
    """A shard's number, from JSON types."""
    if type(shard) is not int or not 0 <= shard < layout.shards:
        raise ValueError(f"a shard from 0 to {layout.shards - 1}")
    return shard


@contextlib.contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Say of which file it is that a record has not the expected form, although its checksum fits.

    Raises:
        CacheFormatError: instead of what reading JSON types raises.
    """
    try:
        yield
    except GeomcacheError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CacheFormatError(
            f"{path}: expected records of schema version {SCHEMA_VERSION}, found others"
            f" ({type(error).__name__}: {error}): another version of geomcache wrote it, or another program"
        ) from error


def _seal(content: bytes) -> bytes:
    """The end of a manifest: sha256 of all bytes before it."""
    return b',\n"sha256":"%s"\n}\n' % sha256(content).hexdigest().encode()
