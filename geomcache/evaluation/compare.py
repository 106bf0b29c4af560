"""Compare evaluations that ran the same episodes: a difference in success with its interval, and a test.

Episodes are paired by suite, variant and seed. The interval is that of a bootstrap which draws tasks, and then episodes
of each: episodes of a task have the same goal and objects, so they are not independent, and few tasks alone would make
an interval too narrow (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). The test is
McNemar's, exact: of the pairs that differ, half would go either way if both policies were equally good (McNemar, "Note
on the sampling error of the difference between correlated proportions or percentages", Psychometrika, 1947).
"""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import UserInputError
from geomcache.evaluation.episodes import Episode, read_episodes

RESAMPLES = 9999
LEVEL = 0.95
MOVED_M = (0.25, 0.5, 1.0)  # bounds of the groups by distance of the camera, in metres
EVERYTHING = "all"
_MOVES = (
    "camera not moved",
    "camera turned in place",
    *(f"camera moved {over:g} to {up_to:g} m" for over, up_to in itertools.pairwise((0.0, *MOVED_M))),
    f"camera moved over {MOVED_M[-1]:g} m",
)

Key = tuple[str, str, int]
"""Suite, variant, seed."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Bounds of a difference."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Success of the second run minus that of the first, over a group of pairs."""

    group: str
    pairs: int
    tasks: int
    first_rate: float
    second_rate: float
    only_first: int
    """Pairs in which only the first run succeeded."""
    only_second: int
    interval: Interval | None
    """None where no pair differs: nothing can be drawn from that."""
    p: float
    """Of McNemar's exact test, two-sided; 1 where no pair differs."""

    @property
    def difference(self) -> float:
        """Return the difference of the rates."""
        return self.second_rate - self.first_rate


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs, compared."""

    first: str
    second: str
    """Names of the runs."""
    differences: tuple[Difference, ...]
    """Over all pairs, then by axis, then by distance of the camera."""

    @property
    def whole(self) -> Difference:
        """Return the difference over all pairs."""
        return self.differences[0]


def compare(files: Sequence[Path]) -> tuple[Comparison, ...]:
    """Compare each file of results with the first.

    Raises:
        UserInputError: a file cannot be read, or does not have the same episodes in the same world as the first.
    """
    if len(files) < 2:
        raise UserInputError("compare: expected at least two files of results, got one: give the runs to compare")
    first, *others = [read_episodes(file) for file in files]
    names = [_name(file, files) for file in files]
    return tuple(
        Comparison(first=names[0], second=name, differences=tuple(_groups(pair(first, rows, str(files[0]), str(file)))))
        for name, rows, file in zip(names[1:], others, files[1:], strict=True)
    )


def pair(
    first: Sequence[Episode], second: Sequence[Episode], first_name: str, second_name: str
) -> list[tuple[Episode, Episode]]:
    """Pair the episodes of two runs by suite, variant and seed.

    Raises:
        UserInputError: they ran in environments of other options, or one lacks episodes of the other.
    """
    for name, rows in ((first_name, first), (second_name, second)):
        if not rows:
            raise UserInputError(f"{name}: expected episodes, found none")
    for field in ("environment", "world"):
        values = [sorted({getattr(episode, field) for episode in rows}) for rows in (first, second)]
        if values[0] != values[1]:
            raise UserInputError(
                f"{second_name}: expected {field} {', '.join(values[0])}, as in {first_name}, found"
                f" {', '.join(values[1])}: evaluate both with the same options of the environment"
            )
    by_key, others = _by_key(first, first_name), _by_key(second, second_name)
    _require_all(by_key, others, first_name, second_name)
    _require_all(others, by_key, second_name, first_name)
    return [(episode, others[key]) for key, episode in sorted(by_key.items())]


def _require_all(wanted: Mapping[Key, Episode], found: Mapping[Key, Episode], wanted_name: str, name: str) -> None:
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        suite, variant, seed = missing[0]
        raise UserInputError(
            f"{name}: expected the {len(wanted)} episodes of {wanted_name}, {len(missing)} are missing, such as {suite}"
            f" {variant} with seed {seed}: run its `geomcache eval` again to resume it, or evaluate both on the same"
            " variants and seeds"
        )


def _by_key(rows: Sequence[Episode], name: str) -> dict[Key, Episode]:
    found: dict[Key, Episode] = {}
    for episode in rows:
        key = episode.suite, episode.variant, episode.seed
        if key in found:
            raise UserInputError(f"{name}: expected each episode once, found {' '.join(map(str, key))} twice")
        found[key] = episode
    return found


def _name(file: Path, files: Sequence[Path]) -> str:
    """Return the shortest part of a path that tells the files apart."""
    stems = [each.stem for each in files]
    return file.stem if len(set(stems)) == len(files) else file.parent.name or str(file)


def _groups(pairs: Sequence[tuple[Episode, Episode]]) -> Iterator[Difference]:
    yield measure(EVERYTHING, pairs)
    axes = sorted({episode.axis for episode, _ in pairs})
    if len(axes) > 1:
        for axis in axes:
            yield measure(axis or "unchanged", [each for each in pairs if each[0].axis == axis])
    if any(episode.camera_moved_m for episode, _ in pairs):
        for group in _MOVES:
            chosen = [each for each in pairs if _move(each[0]) == group]
            if chosen:
                yield measure(group, chosen)


def _move(episode: Episode) -> str:
    """Return the group of an episode by how the camera stands to its pose in the base task."""
    if episode.camera_moved_m:
        return _MOVES[2 + bisect.bisect_left(MOVED_M, episode.camera_moved_m)]
    return _MOVES[1 if episode.camera_turned_deg else 0]


def measure(group: str, pairs: Sequence[tuple[Episode, Episode]]) -> Difference:
    """Measure the difference over pairs of episodes."""
    from scipy.stats import binomtest

    outcomes = np.array([(first.success, second.success) for first, second in pairs], dtype=np.int64)  # [n, 2]
    tasks = np.unique([f"{first.suite}/{first.base_task}" for first, _ in pairs], return_inverse=True)[1]
    differences = outcomes[:, 1] - outcomes[:, 0]
    only_first, only_second = int((differences < 0).sum()), int((differences > 0).sum())
    discordant = only_first + only_second
    return Difference(
        group=group,
        pairs=len(pairs),
        tasks=int(tasks.max()) + 1,
        first_rate=float(outcomes[:, 0].mean()),
        second_rate=float(outcomes[:, 1].mean()),
        only_first=only_first,
        only_second=only_second,
        interval=paired_interval(differences, tasks) if discordant else None,
        p=float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0,
    )


def paired_interval(differences: NDArray[np.int64], tasks: NDArray[np.int64]) -> Interval:
    """Return the 95 % percentile interval of the mean difference, by a bootstrap of tasks and of episodes in them.

    Args:
        differences: of each pair, [n], -1, 0 or 1.
        tasks: number of each pair's task, [n], from 0 without gaps.
    """
    if len(differences) == 1:  # nothing to draw from
        return Interval(low=-1.0, high=1.0)
    generator = np.random.default_rng(0)  # the same interval at every run
    values = np.array([-1, 0, 1])
    outcomes = np.array(
        [[((differences == value) & (tasks == task)).sum() for value in values] for task in np.unique(tasks)]
    )
    counts = outcomes.sum(1)  # [tasks]
    drawn = generator.integers(len(counts), size=(RESAMPLES, len(counts)))
    # Episodes of a task that are drawn with replacement have a multinomial distribution of outcomes.
    found = generator.multinomial(counts[drawn], (outcomes / counts[:, None])[drawn])  # [RESAMPLES, tasks, 3]
    means = (found @ values).sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(low=float(low), high=float(high))
