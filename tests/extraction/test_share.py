"""Equal shares of the shards: what the ranks of datatrove make, together and alone."""

from pathlib import Path

import pytest

from geomcache.extraction.run import Share
from tests.support.stores import make_store, open_writer

LENGTHS = (20, 30, 25, 15)  # six shards of 16


@pytest.mark.parametrize("count", [1, 2, 4, 6, 9])
def test_shares_are_all_shards_each_once_and_in_one_piece(tmp_path: Path, count: int) -> None:
    path = make_store(tmp_path / "cache.zarr", [(0, 20)])  # whatever was made already
    rows = [(0, 90)]
    with open_writer(path, rows) as writer:
        shares = [sorted(Share(rank, count).shards(writer, rows)) for rank in range(count)]
    assert sorted(shard for share in shares for shard in share) == [0, 1, 2, 3, 4, 5]
    for share in shares:
        assert share == list(range(share[0], share[-1] + 1)) if share else count > 6
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_dropped_shard_that_nobody_asked_for_goes_with_the_one_before_it(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache.zarr")
    with open_writer(path) as writer:
        commit = writer._journal.commits[5]
        assert writer.drop(5, commit.files, "test")
    with open_writer(path, [(0, 64)]) as writer:
        shares = [Share(rank, 2).shards(writer, [(0, 64)]) for rank in range(2)]
    assert shares == [{0, 1}, {2, 3, 5}]
