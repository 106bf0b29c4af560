"""Half-open ranges of rows or episodes: merge, intersect, count, look up, name, parse and print."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import UserInputError

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) pairs. Merged ranges are not empty, ascend, and neither overlap nor touch."""


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return merged ranges of the same numbers."""
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
    """Return the part of merged ranges that lies in [start, stop)."""
    first = bisect_right(ranges, start, key=lambda item: item[1])
    last = bisect_left(ranges, stop, key=lambda item: item[0])
    return tuple((max(a, start), min(b, stop)) for a, b in ranges[first:last])


def common_ranges(ranges: Ranges, others: Ranges) -> Ranges:
    """Return the intersection of two merged ranges."""
    return tuple(part for start, stop in others for part in clip_ranges(ranges, start, stop))


def count_rows(ranges: Iterable[tuple[int, int]]) -> int:
    """Return how many numbers disjoint ranges contain."""
    return sum(stop - start for start, stop in ranges)


def rows_of(ranges: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the numbers in ranges, one by one: int64 [n]."""
    parts = [np.arange(start, stop, dtype=np.int64) for start, stop in ranges]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def locate(episode_start: NDArray[np.int64], row: int) -> tuple[int, int]:
    """Return the episode of a row, and the frame's number within it; `episode_start` are the first rows, int64 [E]."""
    episode = int(episode_start.searchsorted(row, "right")) - 1
    return episode, row - int(episode_start[episode])


def name_row(episode_start: NDArray[np.int64], row: int) -> str:
    """Return a row's name for messages."""
    episode, frame = locate(episode_start, row)
    return f"episode {episode} frame {frame}"


class RowSet:
    """A set of rows, for questions about many rows at once.

    Attributes:
        ranges: the merged ranges that it was made from.
        count: how many rows it contains.
    """

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        bounds = np.array(((-1, -1), *ranges), dtype=np.int64)  # an empty range first: each row has one at or before it
        self._starts = bounds[:, 0].copy()
        self._stops = bounds[:, 1].copy()
        lengths = self._stops - self._starts
        self._shifts = np.cumsum(lengths) - lengths - self._starts
        self.count = int(lengths.sum())

    def covers(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return for each range [start, stop), none of them empty, whether the set contains all of it."""
        preceding = self._starts.searchsorted(starts, "right") - 1
        return (starts >= 0) & (stops <= self._stops[preceding])

    def ranks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many rows of the set are smaller than each row; a negative number where the row is not in it."""
        preceding = self._starts.searchsorted(rows, "right") - 1
        return np.where(rows < self._stops[preceding], rows + self._shifts[preceding], -1)

    def rows_at(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows with these ranks, each from 0 to `count` - 1: the inverse of `ranks`."""
        containing = (self._starts + self._shifts).searchsorted(ranks, "right") - 1
        rows: NDArray[np.int64] = ranks - self._shifts[containing]
        return rows

    def count_before(self, row: int) -> int:
        """Return how many rows of the set are smaller than this one."""
        preceding = int(self._starts.searchsorted(row, "right")) - 1
        return int(min(row, self._stops[preceding]) + self._shifts[preceding]) if preceding >= 0 else 0


def parse_episodes(text: str | None, total: int) -> list[tuple[int, int]]:
    """Return the merged ranges of episodes that ``0:100``, ``7`` or ``0,3,5:8`` names; all of `total` for None.

    Raises:
        UserInputError: the text is malformed, empty, or out of range.
    """
    if text is None:
        return [(0, total)]
    ranges = []
    for part in map(str.strip, text.split(",")):
        match = re.fullmatch(r"([0-9]{1,18})(?::([0-9]{1,18}))?", part)
        if match is None:
            raise UserInputError(f"episodes: expected such as 0:100 or 0,3,5:8, got {text!r:.200}")
        start = int(match[1])
        stop = int(match[2]) if match[2] else start + 1
        if not start < stop <= total:
            raise UserInputError(f"episodes: expected a part of 0:{total}, got {part!r}")
        ranges.append((start, stop))
    return [*merge_ranges(ranges)]


def format_ranges(numbers: NDArray[np.int64]) -> str:
    """Return ascending numbers as text that `parse_episodes` takes, such as ``0:3,7``; `rows_of` expands ranges."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1) if len(numbers) else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}:{run[-1] + 1}" for run in runs)
