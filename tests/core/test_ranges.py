"""Ranges of rows, against Python's sets and lists."""

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomcache.errors import UserInputError
from geomcache.ranges import (
    RowSet,
    clip_ranges,
    common_ranges,
    count_rows,
    format_ranges,
    merge_ranges,
    parse_episodes,
    rows_of,
)

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda item: (item[0], item[0] + item[1])))


def as_set(parts: Iterable[tuple[int, int]]) -> set[int]:
    return {row for start, stop in parts for row in range(start, stop)}


@settings(deadline=None)
@given(ranges, ranges, st.integers(0, 70), st.integers(0, 70))
def test_ranges_behave_like_sets(one: list[tuple[int, int]], other: list[tuple[int, int]], a: int, b: int) -> None:
    merged = merge_ranges(one)
    assert as_set(merged) == as_set(one)
    assert all(start < stop for start, stop in merged)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(merged))
    assert count_rows(merged) == len(as_set(one))
    assert as_set(clip_ranges(merged, min(a, b), max(a, b))) == as_set(one) & set(range(min(a, b), max(a, b)))
    assert common_ranges(merged, merge_ranges(other)) == merge_ranges(
        (row, row + 1) for row in as_set(one) & as_set(other)
    )
    assert rows_of(merged).tolist() == sorted(as_set(one))


@settings(deadline=None)
@given(ranges)
def test_row_set_behaves_like_a_sorted_list(parts: list[tuple[int, int]]) -> None:
    held = RowSet(merge_ranges(parts))
    members = sorted(as_set(parts))
    rows = np.arange(-3, 80)
    assert held.count == len(members)
    assert held.ranks(rows).clip(min=-1).tolist() == [
        members.index(row) if row in members else -1 for row in rows.tolist()
    ]
    assert held.rows_at(np.arange(held.count)).tolist() == members
    assert held.covers(rows, rows + 1).tolist() == [row in members for row in rows.tolist()]
    assert held.covers(rows, rows + 3).tolist() == [{row, row + 1, row + 2} <= set(members) for row in rows.tolist()]
    assert [held.count_before(row) for row in range(80)] == [sum(r < row for r in members) for row in range(80)]


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        (None, [(0, 9)]),
        ("0:9", [(0, 9)]),
        ("7", [(7, 8)]),
        ("0,3,5:8", [(0, 1), (3, 4), (5, 8)]),
        ("5:8, 0:2,2:4,3:6", [(0, 8)]),
    ],
)
def test_episodes_are_parsed(text: str | None, ranges: list[tuple[int, int]]) -> None:
    assert parse_episodes(text, 9) == ranges


@pytest.mark.parametrize("text", ["", "a", "3:", ":3", "5:3", "3:3", "9", "0:10", "-1", "1.5", "0,,1", "²", "9" * 5000])
def test_episodes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UserInputError, match="episodes: .*" + (text[:30] or "''")):
        parse_episodes(text, 9)


def test_no_ranges_hold_no_rows() -> None:
    rows = rows_of(())
    assert (rows.shape, rows.dtype) == ((0,), np.dtype(np.int64))
    assert format_ranges(rows) == ""


def test_formatted_episodes_parse_to_the_same() -> None:
    numbers = np.array([0, 1, 2, 7, 9, 10])
    assert format_ranges(numbers) == "0:3,7,9:11"
    expanded = [n for first, last in parse_episodes("0:3,7,9:11", 11) for n in range(first, last)]
    assert expanded == numbers.tolist()
