"""Test the parts of `make e2e-libero` without a simulator: the expert, the errors' arithmetic, the script."""

import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines import action_errors, record_expert
from tests.support.datasets import ROOT

SCRIPT = ROOT / "pipelines" / "e2e_libero.sh"


class World:
    """A hand of no size, an object on the floor and a basket, moved as robosuite's controller would move them."""

    SPEED = 0.012  # metres a step at full action
    CLOSING = 5  # steps

    def __init__(self, hand: Sequence[float]) -> None:
        self.hand, self.thing, self.basket = (np.array(p) for p in (hand, (-0.12, -0.24, 0.05), (0.01, 0.25, 0.01)))
        self.closed = 0
        self.robots, self.objects_dict = [SimpleNamespace(gripper=None)], {"soup": None}
        self.obj_of_interest = ["soup", "basket"]

    def _get_observations(self) -> dict[str, NDArray[np.float64]]:
        return {"robot0_eef_pos": self.hand, "soup_pos": self.thing, "basket_pos": self.basket}

    def _check_grasp(self, gripper: Any, object_geoms: Any) -> bool:
        return self.closed >= self.CLOSING and self.reaches()

    def reaches(self) -> bool:
        return bool(np.abs(self.hand - self.thing)[:2].max() < 0.015 and abs(self.hand[2] - self.thing[2]) < 0.02)

    def step(self, action: NDArray[np.float32]) -> None:
        held = self._check_grasp(None, None)
        self.closed = min(self.CLOSING, self.closed + 1) if action[6] > 0 else 0
        shift = np.clip(action[:3] / record_expert.GAIN, -self.SPEED, self.SPEED)
        self.hand = self.hand + shift
        if held and self.closed:
            self.thing = self.thing + shift


@pytest.mark.parametrize("hand", [(-0.15, 0.0, 0.25), (-0.05, -0.2, 0.12), (0.1, 0.2, 0.3)])
def test_the_expert_carries_the_object_into_the_basket(hand: Sequence[float]) -> None:
    world, highest = World(hand), 0.0
    for _ in range(record_expert.MAX_STEPS):
        action, _ = record_expert.act(world)
        assert np.abs(action).max() <= 1
        world.step(action)
        highest = max(highest, world.thing[2])
    assert np.abs(world.thing - world.basket)[:2].max() < record_expert.IN_BASKET
    assert world.thing[2] < highest - 0.03  # it was lowered before it was let go
    assert world.closed == 0


def test_the_expert_neither_counts_nor_waits() -> None:
    world = World((-0.12, -0.24, 0.055))  # at the object, open
    first, second = (record_expert.act(world)[0] for _ in range(2))
    assert first[6] == second[6] == record_expert.CLOSED
    np.testing.assert_array_equal(first, second)
    world.closed = World.CLOSING  # what is seen differs, and with it the action
    assert record_expert.act(world)[0][2] == 1


class Environment:
    """`World` as LeRobot wraps an environment; solved when the object is let go in the basket, if it can be solved."""

    def __init__(self, *, solvable: bool = True) -> None:
        self.world, self.solvable = World((-0.15, 0.0, 0.25)), solvable
        self._env = SimpleNamespace(env=self.world)

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.world.step(action)
        inside = np.abs(self.world.thing - self.world.basket)[:2].max() < record_expert.IN_BASKET
        solved = self.solvable and bool(inside) and not self.world.closed
        return {"hand": self.world.hand}, 0.0, False, False, {"is_success": solved}


def test_a_disturbed_arm_is_recorded_with_what_the_expert_would_do() -> None:
    environment = Environment()
    start = {"hand": environment.world.hand}
    frames = record_expert.perform(
        environment,
        start,
        0.3,
        np.random.default_rng(0),
        lambda observation, action, executed: {"hand": observation["hand"], "action": action, "executed": executed},
    )
    assert 20 < len(frames) < record_expert.MAX_STEPS
    np.testing.assert_array_equal(frames[0]["hand"], start["hand"])
    repeated = World(start["hand"].tolist())
    for frame in frames:  # what was executed leads to what was seen, where the expert acts as recorded
        np.testing.assert_array_equal(repeated.hand, frame["hand"])
        np.testing.assert_array_equal(record_expert.act(repeated)[0], frame["action"])
        repeated.step(frame["executed"])
    moved = [frame for frame in frames if (frame["action"] != frame["executed"]).any()]
    assert len(moved) > len(frames) / 2
    assert all((frame["action"][3:] == frame["executed"][3:]).all() for frame in frames)
    failed = record_expert.perform(
        Environment(solvable=False), start, 0.0, np.random.default_rng(0), lambda *step: {"step": step}
    )
    assert failed == []


def test_errors_are_paired_by_frame_and_drawn_by_episode() -> None:
    # Two episodes with sums 4 of 2 and 6 of 2. A quarter of all draws has the first alone (2 times as large), a quarter
    # the second alone (3 times), the others both (2.5 times).
    errors = action_errors.Errors(
        episodes=np.array([0, 0, 1]), arms={"right": np.array([1.0, 1.0, 2.0]), "swapped": np.array([1.0, 3.0, 6.0])}
    )
    assert errors.times("swapped") == (2.5, 2.0, 3.0)
    assert errors.times("right") == (1.0, 1.0, 1.0)
    table = errors.lines()
    assert table[1].split() == ["right", "1.3333", "1.00"]
    assert table[2].split() == ["swapped", "3.3333", "2.50", "[2.00,", "3.00]", "66.7%"]


def test_another_frame_is_of_another_episode() -> None:
    episodes = np.repeat([0, 1, 2], [5, 1, 4])
    assert (episodes[action_errors.frames_of_others(episodes)] != episodes).all()


COMMANDS = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
if [[ "$*" == *action_errors.py* ]]; then echo geometry; echo "${MESSAGE:-}" >&2; exit "${ERRORS_CODE:-0}"; fi
if [[ "$*" == *evaluate_ablations.py* ]]; then echo "-- success"; fi
if [[ "$*" == *train_with_average.py* ]]; then echo "INFO step:100"; fi
"""


def run(folder: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script with commands that do nothing; return how it ended, and what it called."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("python", "geomcache"):
        (programs / name).write_text(COMMANDS)
        (programs / name).chmod((programs / name).stat().st_mode | stat.S_IXUSR)
    calls = folder / "calls"
    calls.write_text("")
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "OUT": str(folder / "out"),
        "SEEDS": "5,6",
    } | variables
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    return done, calls.read_text().splitlines()


def test_a_missed_bound_ends_with_1_after_all_seeds(tmp_path: Path) -> None:
    done, calls = run(tmp_path, ERRORS_CODE="1", MESSAGE="geometry swapped: 1.1 times")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["geometry swapped: 1.1 times"] * 2
    for step in ("action_errors.py", "evaluate_ablations.py"):
        policies = [f"/{seed}/policy" for call in calls if step in call for seed in (5, 6) if f"/{seed}/policy" in call]
        assert policies == ["/5/policy", "/6/policy"]


def test_a_broken_command_ends_at_once(tmp_path: Path) -> None:
    done, calls = run(tmp_path, ERRORS_CODE="2", MESSAGE="policy: no such folder")
    assert done.returncode == 2
    assert "policy: no such folder" in done.stderr
    assert "action_errors.py" in calls[-1]


def test_a_second_run_does_not_record_or_train_again(tmp_path: Path) -> None:
    first, all_calls = run(tmp_path)
    second, calls = run(tmp_path)
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(all_calls) == 3 + 2 * 3  # demonstrations, DA3, cache; training, errors, closed loop of each seed
    assert len(calls) == 2 * 2
    changed, _ = run(tmp_path, STEPS="7")
    assert changed.returncode == 2
    assert "steps 7" in changed.stderr
