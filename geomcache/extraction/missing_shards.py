"""Find shards whose files are gone, so that an extraction makes them again instead of calling the cache complete."""

import logging
from collections.abc import Sequence
from pathlib import Path

from geomcache.cache.header import Header
from geomcache.cache.journal import Journal
from geomcache.cache.manifest import JOURNAL
from geomcache.cache.writer import StoreWriter

logger = logging.getLogger(__name__)


def drop_missing_shards(writer: StoreWriter) -> int:
    """Drop the committed shards that lack a file or have one of another size; return how many.

    Only names and sizes are compared: `geomcache verify` reads the bytes.
    """
    header = Header.read(writer.path)
    journal = Journal(writer.path / JOURNAL, header.layout, header.fingerprint)
    journal.read()
    dropped = 0
    for shard, commit in journal.commits.items():
        problem = _find_problem(writer.path, header.layout.files(shard), commit.files.sizes)
        if problem is not None and writer.drop(shard, commit.files, problem):
            logger.warning("%s: shard %d is made again: %s", writer.path, shard, problem)
            dropped += 1
    return dropped


def _find_problem(folder: Path, names: Sequence[str], sizes: Sequence[int]) -> str | None:
    for name, expected in zip(names, sizes, strict=True):
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != expected:
            return f"{name}: expected {expected} bytes, found {size}"
    return None
