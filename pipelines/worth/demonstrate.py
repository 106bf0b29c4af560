"""Write scripted demonstrations of the tasks of libero_object: actions and states, without pictures.

    python pipelines/worth/demonstrate.py --output DIR [--tasks 0:10] [--states 0:3] [--noise 0.3] [--processes 2]

`pipelines/record_demonstrations.py` replays them under any camera. The expert is `pipelines/record_expert.py`'s, and
its arm is disturbed in the same way. What was executed is recorded too, for the replay. An attempt that does not solve
the task is made again, with other disturbances; after ATTEMPTS of them the demonstration is left out.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.ranges import parse_episodes, rows_of
from geomcache.simulator.environments import LiberoGeometry, make_environment
from geomcache.simulator.record import ACTION, EXECUTED, INITIAL_STATE, STATE, state_of
from pipelines.record_expert import FPS, STATES, perform
from pipelines.worth.design import SUITE, TASKS

ATTEMPTS = 3
NEVER_HZ = 1e-9


def demonstrate(task: int, state: int, noise: float) -> list[dict[str, Any]]:
    """Return the frames of a demonstration that solves a task from an initial state; none if no attempt does."""
    for attempt in range(ATTEMPTS):
        if frames := try_once(task, state, noise, attempt):
            return frames
    return []


def try_once(task: int, state: int, noise: float, attempt: int) -> list[dict[str, Any]]:
    """Return the frames of one attempt, each with other disturbances; none if it does not solve the task."""
    from lerobot.processor.env_processor import LiberoProcessorStep

    def frame_of(
        observation: dict[str, Any], action: NDArray[np.float32], executed: NDArray[np.float32]
    ) -> dict[str, Any]:
        return {
            STATE: state_of(LiberoProcessorStep(), observation),
            ACTION: action,
            EXECUTED: executed,
            INITIAL_STATE: np.array([state], np.int64),
            "task": environment.task_description,
        }

    config = LiberoGeometry(task=SUITE, observation_height=32, observation_width=32)  # pictures are not looked at
    config.prepare()
    environment: Any = make_environment(config, SUITE, task, state, 1)
    try:
        observation, _ = environment.reset(seed=state)
        world = environment._env.env
        for camera in world.camera_names:  # LIBERO keeps the pictures it has: rendering takes most of a step
            world.modify_observable(f"{camera}_image", "sampling_rate", NEVER_HZ)
        return perform(environment, observation, noise, np.random.default_rng([state, task, attempt]), frame_of)
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
    parser.add_argument("--noise", type=float, default=0.3, help="of the disturbance, in action units (%(default)s)")
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
