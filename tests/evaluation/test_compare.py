"""Comparison of runs: what does not pair is refused; differences, intervals and tests against hand-worked figures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geomcache.errors import UserInputError
from geomcache.evaluation.compare import Comparison, compare, measure, pair, paired_interval
from geomcache.evaluation.comparison_page import lines, write_page
from geomcache.evaluation.episodes import Episode, EpisodeLog
from tests.support.results import make_identity, make_row


def write(file: Path, rows: list[Episode]) -> Path:
    with EpisodeLog(file, make_identity()) as log:
        log.append(rows)
    return file


def pairs_of(first: list[int], second: list[int], tasks: list[int] | None = None) -> list[tuple[Episode, Episode]]:
    """Pairs with these outcomes; each pair is a task of its own unless `tasks` says otherwise."""
    tasks = tasks or list(range(len(first)))
    return [
        tuple(make_row(number, success=bool(each), base_task=f"task {task}") for each in outcomes)  # type: ignore[misc]
        for number, (task, *outcomes) in enumerate(zip(tasks, first, second, strict=True))
    ]


# ---- the test ----


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        # Fagerland, Lydersen, Laake, "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better
        # than exact conditional" (2013), airway hyper-responsiveness before and after stem cell transplantation
        (1, 7, 0.0703),
        (0, 5, 2 / 2**5),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_p_is_of_mcnemars_exact_test(only_first: int, only_second: int, p: float) -> None:
    first = [1] * only_first + [0] * only_second + [1, 1, 0]
    second = [0] * only_first + [1] * only_second + [1, 1, 0]
    found = measure("all", pairs_of(first, second))
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.p == pytest.approx(p, abs=5e-5)
    assert (found.interval is None) == (only_first + only_second == 0)


# ---- the interval ----


def test_the_interval_draws_tasks_and_episodes_in_them() -> None:
    # Two tasks of two episodes: one that the second run alone solves, one without a difference. A draw has the mean 0
    # (one in four), 1/2 (two in four) or 1 (one in four), so that 2.5 % and 97.5 % of all draws are at 0 and at 1.
    differences, tasks = np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])
    interval = paired_interval(differences, tasks)
    assert (interval.low, interval.high) == (0.0, 1.0)
    assert paired_interval(differences, tasks) == interval  # nothing is drawn anew
    # The same episodes as four tasks: the mean is k/4, k of the binomial distribution of 4 and 1/2, which is 0 and 4 in
    # one draw of 16 each.
    four = paired_interval(differences, np.arange(4))
    assert (four.low, four.high) == (0.0, 1.0)
    # 64 episodes of one task: single ones are drawn, and the interval is about that of a normal distribution.
    halves = paired_interval(np.repeat([1, 0], 32), np.zeros(64, np.int64))
    half = 1.959964 * 0.5 / 8
    assert halves.low == pytest.approx(0.5 - half, abs=0.02)
    assert halves.high == pytest.approx(0.5 + half, abs=0.02)
    # Two tasks that are alike say as little as one of as many episodes: whole tasks would all have the mean 1/2.
    alike = paired_interval(np.tile([1, 0], 32), np.repeat([0, 1], 32))
    assert alike.low == pytest.approx(halves.low, abs=0.02)
    assert alike.high == pytest.approx(halves.high, abs=0.02)
    # 32 tasks of 32 episodes with one outcome each are worth 32 episodes: 0 or 1, and no more is known of each.
    apart = paired_interval(np.repeat(np.tile([1, 0], 16), 32), np.repeat(np.arange(32), 32))
    half = 1.959964 * 0.5 / np.sqrt(32)
    assert apart.low == pytest.approx(0.5 - half, abs=0.02)
    assert apart.high == pytest.approx(0.5 + half, abs=0.02)


def test_tasks_weigh_by_their_episodes() -> None:
    # Three tasks with the differences 1 of 1, 0 of 3 and 0 of 3: every draw that lacks the first has the mean 0, the
    # highest is three times the first, 3/3.
    interval = paired_interval(np.array([1, 0, 0, 0, 0, 0, 0]), np.array([0, 1, 1, 1, 2, 2, 2]))
    assert (interval.low, interval.high) == (0.0, 1.0)
    found = measure("all", pairs_of([0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1]))
    assert (found.first_rate, found.second_rate, found.difference, found.tasks) == (0.0, 0.25, 0.25, 2)


# ---- pairs ----


def test_episodes_pair_by_suite_variant_and_seed_whatever_their_order() -> None:
    first = [make_row(task, episode, success=task == 0) for task in (0, 1) for episode in (0, 1)]
    second = [make_row(task, episode, success=True, weights="other") for task in (1, 0) for episode in (1, 0)]
    paired = pair(first, second, "a", "b")
    assert len(paired) == 4
    for one, other in paired:
        assert (one.variant, one.seed) == (other.variant, other.seed)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"world": "0e" * 6}, "world"),
        ({"environment": "libero"}, "environment"),
        ({"variant": "another"}, "1 are missing, such as libero_object variant 0 with seed 1000"),
        ({"seed": 7}, "seed 1000"),
        ({"suite": "libero_goal"}, "libero_object variant 0"),
    ],
)
def test_runs_that_do_not_pair_are_refused(other: dict[str, str], named: str) -> None:
    with pytest.raises(UserInputError, match=f"b: .*{named}"):
        pair([make_row()], [make_row(**other)], "a", "b")  # type: ignore[arg-type]


def test_a_run_that_is_not_finished_is_refused_in_both_orders() -> None:
    whole, part = [make_row(task) for task in range(3)], [make_row(0)]
    with pytest.raises(UserInputError, match=r"b: expected the 3 episodes of a, 2 are missing"):
        pair(whole, part, "a", "b")
    with pytest.raises(UserInputError, match=r"b: expected the 3 episodes of a, 2 are missing"):
        pair(part, whole, "b", "a")
    with pytest.raises(UserInputError, match="b: expected episodes"):
        pair(whole, [], "a", "b")


# ---- files ----


@pytest.fixture
def compared(tmp_path: Path) -> tuple[Comparison, ...]:
    moved, turned = [0.0, 0.0, 0.2, 0.25, 0.3, 1.2], [0.0, 8.0, 0.0, 5.0, 0.0, 0.0]
    axes = ["robot", "robot", "camera", "camera", "camera", "camera"]
    outcomes = {"without": [1, 1, 1, 0, 0, 0], "with": [1, 0, 1, 1, 1, 0]}
    files = [
        write(
            tmp_path / f"{name}.csv",
            [
                make_row(
                    number,
                    success=bool(success),
                    axis=axes[number],
                    camera_moved_m=moved[number],
                    camera_turned_deg=turned[number],
                )
                for number, success in enumerate(successes)
            ],
        )
        for name, successes in outcomes.items()
    ]
    return compare(files)


def test_groups_are_axes_and_distances_of_the_camera(compared: tuple[Comparison, ...]) -> None:
    (comparison,) = compared
    assert (comparison.first, comparison.second) == ("without", "with")
    assert [(each.group, each.pairs, each.only_first, each.only_second) for each in comparison.differences] == [
        ("all", 6, 1, 2),
        ("camera", 4, 0, 2),
        ("robot", 2, 1, 0),
        ("camera not moved", 1, 0, 0),
        ("camera turned in place", 1, 1, 0),
        ("camera moved 0 to 0.25 m", 2, 0, 1),
        ("camera moved 0.25 to 0.5 m", 1, 0, 1),
        ("camera moved over 1 m", 1, 0, 0),
    ]
    assert comparison.whole.first_rate == pytest.approx(0.5)
    assert comparison.whole.second_rate == pytest.approx(4 / 6)


def test_the_page_has_the_numbers_and_the_plot(compared: tuple[Comparison, ...], tmp_path: Path) -> None:
    page, plot = write_page(compared, tmp_path / "out")
    text = page.read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| all |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["all", "6", "6", "50.0%", "66.7%", "+16.7"]
    assert cells[-3:] == ["1", "2", "1"]  # p of 1 against 2: 2 * (1 + 3) / 8
    assert f"]({plot.name})" in text
    assert "Not comparable" in text
    with Image.open(plot) as image:
        assert image.size[0] > 500
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 5  # axes, points and lines
    printed = list(lines(compared))
    assert printed[2].split()[:4] == ["all", "6", "6", "50.0%"]


def test_one_file_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="at least two"):
        compare([write(tmp_path / "a.csv", [make_row()])])
