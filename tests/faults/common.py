"""What a cache holds after a fault, compared with what was written into it. No torch."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from tests.support.stores import expected, fill, open_writer

SHORT = (20, 12)  # frames of the episodes: two shards of 16
LONG = (200, 120)  # twenty shards

Figure = Callable[[str], None]


def few_or_many(name: str, few: int, many: int) -> pytest.MarkDecorator:
    """The count of a test: few in the normal suite, many behind `make faults`."""
    long = (pytest.mark.slow, pytest.mark.timeout(1800))
    return pytest.mark.parametrize(name, [few, pytest.param(many, marks=long)])


def held_rows(path: Path) -> set[int]:
    """The rows that a cache says it has. Every one of them is read and compared: a wrong number fails the test."""
    with GeometryStore.open(path) as store:
        held = [row for start, stop in store.rows for row in range(start, stop)]
        if held:
            wanted = expected(store.spec, held)
            for name, values in store.batch(held).items():
                assert np.array_equal(values, wanted[name]), f"{path}: a wrong number in {name}"
    return {*held}


def assert_finished(path: Path, lengths: tuple[int, ...]) -> None:
    """The cache is whole, sealed and clean, and no shard was made twice since it was last dropped."""
    assert held_rows(path) == {*range(sum(lengths))}
    assert verify(path).problems == ()
    assert not [*path.rglob("*.tmp")]
    there: set[int] = set()
    for line in (path / "journal.jsonl").read_bytes().splitlines():
        record = json.loads(line)
        if record["record"] == "commit":
            assert record["shard"] not in there
            there.add(record["shard"])
        elif record["record"] == "drop":
            there.remove(record["shard"])


def finish(path: Path, lengths: tuple[int, ...]) -> None:
    """Go on after a fault, as the next run does, to the end."""
    with open_writer(path, lengths=lengths) as writer:
        fill(writer)
        assert writer.seal()
    assert_finished(path, lengths)


def flip_bit(path: Path, bit: int) -> None:
    """In place: descriptors that are open see it."""
    file = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(file, 1, bit // 8)
        os.pwrite(file, bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
    finally:
        os.close(file)
