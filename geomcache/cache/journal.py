"""The journal: an append-only log with a line for each shard that was committed or dropped.

It is text, each line with a checksum of its own; docs/cache-format.md describes it. A shard that it does not name does
not exist. It contains no path of a shard: the layout gives those, so that no record can lead outside the cache.
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
    """The record that a shard is durable."""

    shard: int
    rows: Ranges
    files: ShardFiles
    statistics: Mapping[str, Any]
    """`Statistics` of its rows as JSON types: a cache has thousands of shards, and reads these once."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
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
    """The record that a shard no longer exists and has to be made again."""

    shard: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {"record": "drop", "shard": self.shard, "reason": self.reason}


class Journal:
    """The state of a cache: the sum of its journal's lines.

    Attributes:
        files: the files that the cache was created with.
        commits: the last commit of each shard that exists.
        dropped_rows: the rows of each shard that was dropped and has not been made again.
        incomplete_nbytes: bytes after the last good line: an append that was interrupted, and never acknowledged.
    """

    def __init__(self, path: Path, layout: Layout, fingerprint: str) -> None:
        self.path = path
        self.files: Files = {}
        self.commits: dict[int, Commit] = {}
        self.dropped_rows: dict[int, Ranges] = {}
        self.incomplete_nbytes = 0
        self._layout, self._fingerprint = layout, fingerprint
        self._length = 0  # bytes of the good lines

    def read(self) -> set[int]:
        """Read what was appended since the last call; return the shards that it concerns.

        Raises:
            CacheFormatError: a line has a good checksum and another form.
            CacheCorruptError: a line is damaged, or the journal is missing or another cache's.
        """
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(self._length)
                data = file.read()
        except FileNotFoundError:
            raise CacheCorruptError(
                f"{self.path}: expected the journal, found none: restore it from a copy, or create the cache again with"
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
        self.incomplete_nbytes = len(data) - good
        return {self._take(record) for record in records}

    def _split(self, data: bytes) -> tuple[int, list[Any]]:
        """Return the length of the good lines at the front, and their records."""
        records: list[Any] = []
        good = position = 0
        while (end := data.find(b"\n", position) + 1) > 0:
            with malformed(self.path):
                record = decode_line(data[position:end])
            if record is not None and good < position:
                raise CacheCorruptError(
                    f"{self.path}: expected lines with their checksums, found a damaged one at byte"
                    f" {self._length + good}: restore the file from a copy, or create the cache again with"
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
                self.dropped_rows.pop(shard, None)
            elif kind == "drop" and shard in self.commits:
                self.dropped_rows[shard] = self.commits.pop(shard).rows
            else:
                raise ValueError("commit, or drop of a shard that is there")
        return int(shard)

    def repair(self) -> int:
        """Cut off what follows the last good line; return how many bytes. Only under the journal's lock."""
        cut = self.incomplete_nbytes
        if cut:
            with durable.file_errors(self.path), durable.synchronised(durable.open_file(self.path, 0)) as descriptor:
                durable.truncate(descriptor, self._length)
            self.incomplete_nbytes = 0
        return cut

    def append(self, record: Commit | Drop) -> None:
        """Append a line and make it durable. Only under the journal's lock, after `read` and `repair`."""
        line = encode_line(record.to_dict())
        with durable.file_errors(self.path):
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
        """Return the rows of all shards that exist."""
        return merge_ranges(part for commit in self.commits.values() for part in commit.rows)

    @property
    def shards(self) -> dict[int, ShardFiles]:
        """Return the files of the shards that exist, by number, as `Manifest.shards`."""
        return {shard: commit.files for shard, commit in self.commits.items()}

    def statistics(self) -> Statistics:
        """Return the statistics of all rows, merged in the order of the shards; empty if there are none."""
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
    """Return the journal's first line, which names the files that the cache was created with."""
    return encode_line({"record": "begin", **identity(layout, fingerprint), "files": files})


def encode_line(record: Mapping[str, Any]) -> bytes:
    """Return a line of the journal: JSON whose last member is the crc32c of all bytes before it."""
    content = canonical_json(record)[:-1]
    return content + b',"crc32c":"%08x"}\n' % crc32c(content)


def decode_line(line: bytes) -> Any:
    """Return the record of a line; None if its checksum does not fit."""
    tail = len(b',"crc32c":"00000000"}\n')
    content = line[:-tail]
    if line[-tail:] != b',"crc32c":"%08x"}\n' % crc32c(content):
        return None
    return json.loads(line)
