"""What the tests of pushing and pulling share: a cache of few files, and comparisons of folders."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache.store import GeometryStore
from geomcache.cache.writer import StoreWriter
from tests.support.stores import claim_rows, commit, expected, fill, make_maps, make_spec, open_writer

SPEC = make_spec(cameras=("observation.images.front",), outputs=("ray",))
RAY = "observation.images.front/ray"
BEGIN_FILES = 11 + 5  # metadata; coordinates, and start, length and identity of the episodes
SHARD_FILES = 4  # rays, checksums, and two of the pictures' signatures
FILES = BEGIN_FILES + 6 * SHARD_FILES
CONTROL = 3
EVERYTHING = ((0, 90),)
EPISODES = ((0, 20), (20, 50), (50, 75), (75, 90))  # shards are of 16 rows


def make_small_store(
    path: Path, wanted: Iterable[tuple[int, int]] | None = None, *, shift: int = 0, codec: str = "raw"
) -> Path:
    """A sealed cache of one camera's rays; with a shift the same rows have other numbers, as of another GPU."""
    with open_writer(path, wanted, spec=SPEC, codec=codec) as writer:
        if shift:
            fill_shifted(writer, shift)
        else:
            fill(writer)
        assert writer.seal()
    return path


def fill_shifted(writer: StoreWriter, shift: int) -> None:
    while (claim := writer.claim()) is not None:
        commit(writer, claim, make_maps(writer.spec, [row + shift for row in claim_rows(claim)]))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which does not travel."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_reads(path: Path, rows: list[int]) -> None:
    with GeometryStore.open(path) as store:
        np.testing.assert_array_equal(store.batch(rows).ray, expected(SPEC, rows)["ray"])


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the log tells the user."""
    package, handler = logging.getLogger("geomcache"), _Lines()
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    yield handler.lines
    package.removeHandler(handler)
    package.setLevel(level)
