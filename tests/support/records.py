"""Journal records of made-up shards."""

import hashlib

from geomcache.cache.journal import Commit
from geomcache.cache.layout import Layout, ShardFiles
from geomcache.ranges import count_rows
from geomcache.statistics import Moments
from tests.support.stores import make_maps, make_spec

SPEC = make_spec()
LAYOUT = Layout.of(SPEC, frames=90, shard_frames=16)
FINGERPRINT = "ab" * 32
FILES = {"episodes/start/c.0": (36, "cd" * 32)}


def commit(shard: int, rows: tuple[tuple[int, int], ...] | None = None) -> Commit:
    rows = rows or (LAYOUT.shard_rows(shard),)
    maps = make_maps(SPEC, [row for start, stop in rows for row in range(start, stop)])
    statistics = {
        camera: {name: Moments.of(name, values).to_dict() for name, values in outputs.items()}
        for camera, outputs in maps.items()
    }
    digests = tuple(hashlib.sha256(bytes([shard, n])).digest() for n in range(7))
    return Commit(shard, rows, ShardFiles(sizes(count_rows(rows)), digests), statistics)


def sizes(rows: int) -> tuple[int, ...]:
    """Bytes of a shard's files that hold so many rows."""
    ray, conf, index = rows * (3 * 4 * 6 * 2 + 4), rows * (3 * 4 * 2 + 4), 16 * 16 + 4
    tables = 16 * 4 * 4 + 4, 16 * 2 * 8 + 4, 16 * 2 * 48 + 4
    return ray + index, conf + index, ray + index, conf + index, *tables
