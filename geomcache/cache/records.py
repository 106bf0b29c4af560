"""The JSON records that the journal and the manifest share, and the checks of those that come from elsewhere."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from geomcache.cache.layout import SCHEMA_VERSIONS, Layout, ShardFiles
from geomcache.errors import CacheCorruptError, CacheFormatError, GeomcacheError, one_line
from geomcache.ranges import Ranges, clip_ranges, count_rows
from geomcache.statistics import Moments

_MAX_FILE_NBYTES = 1 << 50
_SHA256 = re.compile("[0-9a-f]{64}")

Files = dict[str, tuple[int, str]]
"""Relative path -> (bytes, sha256 in hexadecimal) of metadata, coordinates and episode table."""

Statistics = dict[str, dict[str, Moments]]
"""Camera -> output -> moments over the rows that the cache has."""


def identity(layout: Layout, fingerprint: str) -> dict[str, Any]:
    """Return the members that begin journal and manifest: which cache they belong to, and how its shards are cut."""
    return {
        "schema_version": layout.schema_version,
        "fingerprint": fingerprint,
        "shard_frames": layout.shard_frames,
        "columns": [column.key for column in layout.columns],
    }


def check_identity(record: Any, path: Path, layout: Layout, fingerprint: str) -> None:
    """Compare the members of `identity` with a record.

    Raises:
        CacheCorruptError: one differs.
    """
    for name, expected in identity(layout, fingerprint).items():
        if record[name] != expected:
            raise CacheCorruptError(
                f"{path}: expected {name} {expected}, as zarr.json has it, found {record[name]!r:.200}: files of two"
                " caches were mixed, or one is damaged; restore them from a copy"
            )


def held_by_shard(rows: Ranges, layout: Layout) -> Iterator[tuple[int, int]]:
    """Yield (shard, how many of the rows it holds) of the shards that hold any, in order."""
    for shard in layout.shards_of(rows):
        yield shard, count_rows(clip_ranges(rows, *layout.shard_rows(shard)))


def describe_statistics(statistics: Statistics) -> dict[str, Any]:
    """Return statistics of each camera, and pooled over all cameras, as JSON types."""
    cameras = {
        camera: {output: moments.to_dict() for output, moments in outputs.items()}
        for camera, outputs in statistics.items()
    }
    return {"pooled": {name: moments.to_dict() for name, moments in pool(statistics).items()}, "cameras": cameras}


def pool(statistics: Statistics) -> dict[str, Moments]:
    """Return the moments of each output over all cameras, merged in the order of the views."""
    names = next(iter(statistics.values()), {})
    return {name: Moments.merged(outputs[name] for outputs in statistics.values()) for name in names}


def parse_statistics(data: Any, layout: Layout) -> Statistics:
    """Return the moments of every column from JSON types.

    Raises:
        CacheFormatError: they are malformed.
        ValueError, KeyError, TypeError, AttributeError: they are not of every column.
    """
    statistics: Statistics = {}
    for column in layout.columns:
        moments = Moments.from_dict(data[column.camera][column.output], column.output)
        statistics.setdefault(column.camera, {})[column.output] = moments
    if sum(map(len, data.values())) != len(layout.columns):
        raise ValueError("statistics of every camera's outputs")
    return statistics


def parse_ranges(data: Any, start: int, stop: int) -> Ranges:
    """Return merged ranges of rows in [start, stop) from JSON types.

    Raises:
        ValueError, TypeError: they are none.
    """
    ranges = tuple((first, last) for first, last in data)
    bounds = [bound for item in ranges for bound in item]
    ascending = all(a < b for a, b in itertools.pairwise(bounds))
    if not (all(type(bound) is int for bound in bounds) and ascending and start <= min(bounds, default=start)):
        raise ValueError(f"ascending ranges of rows from {start} on")
    if max(bounds, default=stop) > stop:
        raise ValueError(f"ranges of rows before {stop}")
    return ranges


def parse_shard_files(sizes: Any, hashes: Any, layout: Layout, rows: int) -> ShardFiles:
    """Return the files of a shard that holds so many rows from JSON types.

    Raises:
        ValueError, TypeError: they are none.
    """
    bounds = layout.size_bounds(rows)
    fits = (type(size) is int and low <= size <= high for size, (low, high) in zip(sizes, bounds, strict=True))
    if rows < 1 or not all(fits):
        raise ValueError(f"files of {' '.join(f'{low} to {high}' for low, high in bounds)} bytes")
    digests = tuple(map(bytes.fromhex, hashes))
    if [len(digest) for digest in digests] != [sha256().digest_size] * len(bounds):
        raise ValueError(f"{len(bounds)} sha256")
    return ShardFiles(tuple(sizes), digests)


def parse_files(data: Any) -> Files:
    """Return (bytes, sha256) of files by their paths from JSON types.

    Raises:
        ValueError, TypeError, AttributeError: they are none.
    """
    files = {name: (size, digest) for name, (size, digest) in data.items()}
    for size, digest in files.values():
        if type(size) is not int or not 0 <= size <= _MAX_FILE_NBYTES or not _SHA256.fullmatch(digest):
            raise ValueError(f"0 to {_MAX_FILE_NBYTES} bytes and a sha256 of each file")
    return files


def check_shard(shard: Any, layout: Layout) -> int:
    """Return a shard's number from JSON types.

    Raises:
        ValueError: it is none.
    """
    if type(shard) is not int or not 0 <= shard < layout.shards:
        raise ValueError(f"a shard from 0 to {layout.shards - 1}")
    return shard


@contextlib.contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Name the file whose records have a good checksum and another form.

    Raises:
        CacheFormatError: instead of what parsing JSON types raises.
    """
    try:
        yield
    except GeomcacheError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CacheFormatError(
            f"{path}: expected records of schema version {' or '.join(map(str, SCHEMA_VERSIONS))}, found others"
            f" ({type(error).__name__}: {one_line(error)}): another version of geomcache wrote it, or another program"
        ) from error
