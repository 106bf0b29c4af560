"""Write scripted demonstrations of the tasks of libero_object: actions and states, without pictures.

    python pipelines/worth/demonstrate.py --output DIR [--tasks 0:10] [--states 0:3] [--noise 0.15] [--processes 2]

`pipelines/record_demonstrations.py` replays them under any camera. An arm executes the demonstrator's action and a
slowly varying disturbance; the recorded action is the demonstrator's answer to where the arm really is (DART, Laskey et
al., "DART: Noise Injection for Robust Imitation Learning", 2017): a policy that is trained on it learns to come back.
What was executed is recorded too, for the replay. An attempt that does not solve the task is made again, with other
disturbances; after ATTEMPTS of them the demonstration is left out.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.ranges import parse_episodes, rows_of
from geomcache.simulator.environments import LiberoGeometry, make_environment
from geomcache.simulator.record import ACTION, EXECUTED, INITIAL_STATE, STATE, state_of
from pipelines.worth.design import SUITE, TASKS

STATES = 50  # initial states that LIBERO has for each task
MAX_STEPS = 260
ATTEMPTS = 3
NEVER_HZ = 1e-9
GAIN = 10.0  # of the controller, in action units for each metre
OPEN, CLOSED = -1.0, 1.0
UP = np.array([0.0, 0.0, 1.0])
FPS = 10  # what LIBERO's own datasets say
PHASES = ("reach", "descend", "grasp", "lift", "carry", "lower", "release")
ABOVE_M, LIFT_M, CARRY_M, DROP_M, GRASP_M = 0.14, 0.26, 0.28, 0.20, 0.005  # heights over object or basket, metres


@dataclass
class Demonstrator:
    """A script that brings an object to a basket, phase by phase."""

    phase: str = "reach"
    waited: int = 0
    """Steps in this phase."""
    grasped_at: NDArray[np.float64] | None = None

    def act(self, hand: NDArray[Any], thing: NDArray[Any], basket: NDArray[Any]) -> NDArray[np.float32]:
        """Return the action [7] for places of the hand, the object and the basket, [3] in metres."""
        lifted_from = hand if self.grasped_at is None else self.grasped_at
        goal, gripper = {
            "reach": (thing + ABOVE_M * UP, OPEN),
            "descend": (thing + GRASP_M * UP, OPEN),
            "grasp": (hand, CLOSED),
            "lift": (lifted_from + LIFT_M * UP, CLOSED),
            "carry": (basket + CARRY_M * UP, CLOSED),
            "lower": (basket + DROP_M * UP, CLOSED),
            "release": (hand, OPEN),
        }[self.phase]
        action = np.zeros(7, np.float32)
        action[:3], action[6] = np.clip((goal - hand) * GAIN, -1, 1), gripper
        self._advance(float(np.linalg.norm(goal - hand)), hand)
        return action

    def _advance(self, distance: float, hand: NDArray[Any]) -> None:
        """Go on to the next phase when this one's goal, `distance` metres away, is reached or cannot be."""
        self.waited += 1
        is_done = {
            "reach": distance < 0.015 or self.waited > 80,
            "descend": distance < 0.01 or self.waited > 40,
            "grasp": self.waited >= 8,
            "lift": distance < 0.03 or self.waited > 40,
            "carry": distance < 0.02 or self.waited > 60,
            "lower": distance < 0.02 or self.waited > 20,
            "release": False,
        }[self.phase]
        if is_done:
            if self.phase == "grasp":
                self.grasped_at = hand.copy()
            self.phase, self.waited = PHASES[PHASES.index(self.phase) + 1], 0


def demonstrate(task: int, state: int, noise: float) -> list[dict[str, Any]]:
    """Return the frames of a demonstration that solves a task from an initial state; none if no attempt does."""
    for attempt in range(ATTEMPTS):
        if frames := try_once(task, state, noise, attempt):
            return frames
    return []


def try_once(task: int, state: int, noise: float, attempt: int) -> list[dict[str, Any]]:
    """Return the frames of one attempt, each with other disturbances; none if it does not solve the task."""
    from lerobot.processor.env_processor import LiberoProcessorStep

    config = LiberoGeometry(task=SUITE, observation_height=32, observation_width=32)  # pictures are not looked at
    config.prepare()
    environment: Any = make_environment(config, SUITE, task, state, 1)
    try:
        observation, _ = environment.reset(seed=state)
        world = environment._env.env
        for camera in world.camera_names:  # LIBERO keeps the pictures it has: rendering takes most of a step
            world.modify_observable(f"{camera}_image", "sampling_rate", NEVER_HZ)
        target, basket = world.obj_of_interest[:2]
        demonstrator, generator = Demonstrator(), np.random.default_rng([state, task, attempt])
        disturbance: NDArray[np.float64] = np.zeros(3)
        frames: list[dict[str, Any]] = []
        for _ in range(MAX_STEPS):
            raw = world._get_observations()
            still = demonstrator.phase in ("grasp", "release")
            action = demonstrator.act(raw["robot0_eef_pos"], raw[f"{target}_pos"], raw[f"{basket}_pos"])
            executed = action.copy()
            if not still:
                disturbance = 0.8 * disturbance + 0.6 * noise * generator.standard_normal(3)
                executed[:3] = np.clip(action[:3] + disturbance, -1, 1)
            frames.append(
                {
                    STATE: state_of(LiberoProcessorStep(), observation),
                    ACTION: action,
                    EXECUTED: executed,
                    INITIAL_STATE: np.array([state], np.int64),
                    "task": environment.task_description,
                }
            )
            observation, _, _, _, info = environment.step(executed)
            if info["is_success"]:
                return frames
        return []
    finally:
        environment.close()


def write(episodes: Sequence[Sequence[dict[str, Any]]], folder: Path) -> None:
    """Write demonstrations as a LeRobotDataset."""
    from lerobot.datasets import LeRobotDataset

    features = {
        STATE: {"dtype": "float32", "shape": (8,), "names": None},
        ACTION: {"dtype": "float32", "shape": (7,), "names": None},
        EXECUTED: {"dtype": "float32", "shape": (7,), "names": None},
        INITIAL_STATE: {"dtype": "int64", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create(
        f"geomcache/{folder.name}", fps=FPS, features=features, root=folder, robot_type="panda", use_videos=False
    )
    for frames in episodes:
        for frame in frames:
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the LeRobotDataset")
    parser.add_argument("--tasks", default="0:10", help="numbers, such as 0:4,7 (%(default)s)")
    parser.add_argument("--states", default="0:3", help="initial states of each (%(default)s)")
    parser.add_argument("--noise", type=float, default=0.15, help="deviation of what disturbs the arm (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="%(default)s")
    arguments = parser.parse_args()
    tasks, states = (
        [int(number) for number in rows_of(parse_episodes(text, total))]
        for text, total in ((arguments.tasks, TASKS), (arguments.states, STATES))
    )
    runs = [(task, state, arguments.noise) for state, task in product(states, tasks)]
    LiberoGeometry(task=SUITE).prepare()  # writes LIBERO's configuration once
    with multiprocessing.get_context("spawn").Pool(min(arguments.processes, len(runs))) as pool:
        episodes = pool.starmap(demonstrate, runs, chunksize=1)
    for (task, state, _), frames in zip(runs, episodes, strict=True):
        print(f"task {task}, state {state}: {f'{len(frames)} frames' if frames else 'not solved, left out'}")
    solved = [frames for frames in episodes if frames]
    if not solved:
        sys.exit("demonstrate.py: no demonstration solved its task: use less --noise")
    write(solved, arguments.output)
    print(f"{arguments.output}: {len(solved)} demonstrations, {sum(map(len, solved))} frames")


if __name__ == "__main__":
    main()
