"""The manifest, which seals a cache: its rows, files and statistics."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from geomcache.cache.layout import Layout, ShardFiles
from geomcache.cache.records import (
    Files,
    Statistics,
    check_identity,
    describe_statistics,
    held_by_shard,
    identity,
    malformed,
    parse_files,
    parse_ranges,
    parse_shard_files,
    parse_statistics,
)
from geomcache.errors import CacheCorruptError
from geomcache.geometry import canonical_json
from geomcache.ranges import Ranges

JOURNAL, MANIFEST = "journal.jsonl", "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a sealed cache."""

    rows: Ranges
    """The rows that it has."""
    files: Files
    """Metadata, coordinates and episode table."""
    shards: dict[int, ShardFiles]
    """The files of each shard that has rows, by its number."""
    statistics: Statistics
    """Moments over all rows."""

    def encode(self, layout: Layout, fingerprint: str) -> bytes:
        """Return the content of ``manifest.json``."""
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
        """Read what `encode` returned; `path` is for messages.

        Raises:
            CacheCorruptError: it is damaged, or of another cache.
            CacheFormatError: it has a good checksum and another form.
        """
        content = data[: -len(_seal(b""))]
        if content + _seal(content) != data:
            raise CacheCorruptError(
                f"{path}: expected content with the sha256 at its end, found other bytes: run the extract command that"
                " made the cache again: it makes the manifest from the journal"
            )
        with malformed(path):
            record = json.loads(data)
            check_identity(record, path, layout, fingerprint)
            rows = parse_ranges(record["rows"], 0, layout.frames)
            shards = {}
            for (shard, count), (number, sizes, hashes) in zip(
                held_by_shard(rows, layout), record["shards"], strict=True
            ):
                if number != shard or type(number) is not int:
                    raise ValueError(f"shard {shard}")
                shards[shard] = parse_shard_files(sizes, hashes, layout, count)
            statistics = parse_statistics(record["statistics"]["cameras"], layout)
            return cls(rows=rows, files=parse_files(record["files"]), shards=shards, statistics=statistics)


def _seal(content: bytes) -> bytes:
    """Return the end of a manifest: the sha256 of all bytes before it."""
    return b',\n"sha256":"%s"\n}\n' % sha256(content).hexdigest().encode()
