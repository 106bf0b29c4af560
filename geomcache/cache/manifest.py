"""The manifest: what a sealed cache holds."""

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


def _seal(content: bytes) -> bytes:
    """The end of a manifest: sha256 of all bytes before it."""
    return b',\n"sha256":"%s"\n}\n' % sha256(content).hexdigest().encode()
