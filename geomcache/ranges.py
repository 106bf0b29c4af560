"""Half-open ranges of rows or episodes: merge, intersect, count, look up, parse and print."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import (
    UserInputError,
)

Ranges = tuple[tuple[int, int], ...]


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same rows, in order, each once, neighbours joined. Empty ranges vanish."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return tuple(merged)


def clip_ranges(ranges: Ranges, start: int, stop: int) -> Ranges:
    """The part of merged ranges from `start` on, before `stop`."""
    first = bisect_right(ranges, start, key=lambda item: item[1])
    last = bisect_left(ranges, stop, key=lambda item: item[0])
    return tuple((max(a, start), min(b, stop)) for a, b in ranges[first:last])


def common_ranges(ranges: Ranges, others: Ranges) -> Ranges:
    """Rows that are in both merged ranges."""
    return tuple(part for start, stop in others for part in clip_ranges(ranges, start, stop))


def count_rows(ranges: Iterable[tuple[int, int]]) -> int:
    """How many rows disjoint ranges hold."""
    return sum(stop - start for start, stop in ranges)


def rows_of(ranges: Ranges) -> NDArray[np.int64]:
    """The rows of merged ranges, one by one: int64 [n]."""
    return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in ranges])


class RowSet:
    """Rows that are there, for questions about many rows at once."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        bounds = np.array(
            ((-1, -1), *ranges), dtype=np.int64
        )  # an empty range in front, so that every row is behind one
        self._starts = bounds[:, 0].copy()
        self._stops = bounds[:, 1].copy()
        lengths = self._stops - self._starts
        self._shifts = np.cumsum(lengths) - lengths - self._starts
        self.count = int(lengths.sum())

    def covers(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each range, none of them empty, is there from end to end."""
        at = self._starts.searchsorted(starts, "right") - 1
        return (starts >= 0) & (stops <= self._stops[at])

    def ranks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many rows of the set lie before each row; negative where the row is not in the set."""
        at = self._starts.searchsorted(rows, "right") - 1
        return np.where(rows < self._stops[at], rows + self._shifts[at], -1)

    def rows_at(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of these ranks, each from 0 to `count` - 1: the other way round."""
        at = (self._starts + self._shifts).searchsorted(ranks, "right") - 1
        rows: NDArray[np.int64] = ranks - self._shifts[at]
        return rows

    def count_before(self, row: int) -> int:
        """How many rows of the set lie before this one."""
        at = int(self._starts.searchsorted(row, "right")) - 1
        return int(min(row, self._stops[at]) + self._shifts[at]) if at >= 0 else 0


def parse_episodes(text: str | None, total: int) -> list[tuple[int, int]]:
    """Ranges (first, last + 1) of episodes out of ``0:100``, ``7`` or ``0,3,5:8``, sorted and merged; all for None.

    Raises:
        UserInputError: malformed, empty, or out of range.
    """
    if text is None:
        return [(0, total)]
    ranges = []
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        if not first.isdecimal() or (colon and not last.isdecimal()):
            raise UserInputError(f"episodes: expected such as 0:100 or 0,3,5:8, got {text!r}")
        start, stop = int(first), int(last) if colon else int(first) + 1
        if not start < stop <= total:
            raise UserInputError(f"episodes: expected a part of 0:{total}, got {part.strip()!r}")
        ranges.append((start, stop))
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def format_ranges(numbers: NDArray[np.int64]) -> str:
    """Sorted numbers as ``0:3,7``, the form that `geomcache extract --episodes` takes."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1) if len(numbers) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}:{run[-1] + 1}" for run in runs)
