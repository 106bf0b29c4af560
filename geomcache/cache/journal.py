"""What of a cache is durable: the journal, a line for each shard while it grows, and the manifest that seals it.

Both are text with checksums of their own; docs/cache-format.md describes them. What the journal does not name does not
exist. Nothing in them is a path of a shard: those follow from the layout, so that no record can lead elsewhere.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomcache.cache import durable
from geomcache.cache.layout import Layout, ShardFiles, crc32c
from geomcache.cache.records import (
    Files,
    Statistics,
    check_identity,
    check_shard,
    identity,
    malformed,
    parse_files,
    parse_ranges,
    parse_shard_files,
    parse_statistics,
)
from geomcache.errors import CacheCorruptError
from geomcache.geometry import canonical_json
from geomcache.ranges import Ranges, count_rows, merge_ranges
from geomcache.statistics import Moments


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
