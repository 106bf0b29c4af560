"""Record demonstrations of a scripted expert in LIBERO: it picks a task's object up and drops it into the basket.

    python pipelines/record_expert.py --output DIR [--task 0] [--states 10:50] [--count 12] [--noise 0.3]

Works for the tasks of libero_object. The expert reads true positions out of the simulator, and its action is a function
of what can be seen: where the hand, the object and the basket are, and whether the object is held. It neither counts
nor waits, so that a policy which sees one frame can tell what comes next, wherever it is asked.

While the hand is on its way, down to the object too, the arm executes the expert's action plus a slow disturbance. What
is recorded is the expert's own action, for where the hand really is (DART, Laskey et al. 2017): a policy learns from it
how to come back. One that saw no disturbance close to the object closed its fingers 2 cm next to it.

Pictures are stored as they are, not as video: geometry of compressed pictures is not that of the pictures that the
policy acts on. An episode that does not succeed is left out.
"""

import argparse
import functools
import logging
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import GeomcacheError, UserInputError
from geomcache.ranges import parse_episodes, rows_of
from geomcache.simulator.environments import LiberoGeometry, make_environment
from geomcache.simulator.record import ACTION, STATE, state_of

SUITE = "libero_object"
FPS = 10  # as LIBERO's own datasets say, though the simulator runs at 20
STATES = 50  # that LIBERO has of each task
MAX_STEPS = 150
OPEN, CLOSED = -1.0, 1.0
# A full action moves the goal of the arm's controller by 5 cm: this gain puts the goal where the expert wants the hand.
GAIN = 20.0
ABOVE, GRASP, AT = 0.14, -0.003, 0.012  # metres over the object while approaching, when grasping; tolerance
CARRY, LOWER, IN_BASKET = 0.28, 0.20, 0.04  # metres over the basket while carrying and when releasing; tolerance
LIFTED, FREE = 0.12, 0.20  # metres over the floor: the hand begins to move sideways, and does so freely
PERSISTENCE = 0.8  # of the disturbance, from step to step

FrameOf = Callable[[dict[str, Any], NDArray[np.float32], NDArray[np.float32]], dict[str, Any]]
"""Makes a frame of an observation, the expert's action [7] in it, and the one that is executed."""

_PROCESS: dict[str, Any] = {}  # the environment of this process

logger = logging.getLogger("geomcache")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the new LeRobotDataset")
    parser.add_argument("--task", type=int, default=0, help="number in libero_object; %(default)s")
    parser.add_argument("--states", default="0:50", help="initial states to begin in, such as 10:50; %(default)s")
    parser.add_argument("--count", type=int, help="episodes to record, of the first states that succeed; all")
    parser.add_argument("--noise", type=float, default=0.3, help="of the disturbance, in units of actions; %(default)s")
    parser.add_argument("--size", type=int, default=128, help="of the pictures, in pixels; %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="that simulate at the same time; %(default)s")
    arguments = parser.parse_args()
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    config = LiberoGeometry(
        task=SUITE, observation_height=arguments.size, observation_width=arguments.size, task_ids=[arguments.task]
    )
    states = [int(state) for state in rows_of(parse_episodes(arguments.states, STATES))]
    try:
        record(
            config,
            arguments.task,
            states,
            arguments.count or len(states),
            arguments.noise,
            arguments.output,
            arguments.processes,
        )
    except GeomcacheError as error:
        sys.exit(f"record_expert.py: {error}")


def record(
    config: LiberoGeometry, task: int, states: list[int], count: int, noise: float, folder: Path, processes: int
) -> None:
    """Write a LeRobotDataset of `count` episodes, from the first initial states in which the expert succeeds.

    Raises:
        UserInputError: it succeeds in too few of them.
        SimulatorError: LIBERO cannot be started.
    """
    from lerobot.datasets import LeRobotDataset

    config.prepare()
    names = ["height", "width", "channels"]
    picture = {"dtype": "image", "shape": (config.observation_height, config.observation_width, 3), "names": names}
    features: dict[str, dict[str, Any]] = {key: dict(picture) for key in config.view_keys()}
    features[STATE] = {"dtype": "float32", "shape": (8,), "names": None}
    features[ACTION] = {"dtype": "float32", "shape": (7,), "names": None}
    dataset = LeRobotDataset.create(
        f"geomcache/{folder.name}", fps=FPS, features=features, root=folder, robot_type="panda"
    )
    with multiprocessing.get_context("spawn").Pool(min(processes, len(states)), start, (config, task)) as pool:
        episodes = pool.imap(functools.partial(demonstrate, config, task, noise), states)
        for state, frames in zip(states, episodes, strict=True):
            if not frames:
                logger.info("task %d from initial state %d: not solved in %d steps, left out", task, state, MAX_STEPS)
                continue
            for frame in frames:
                dataset.add_frame(frame)
            dataset.save_episode()
            logger.info("task %d from initial state %d: %d frames", task, state, len(frames))
            if dataset.num_episodes == count:
                break
        else:
            raise UserInputError(
                f"states: expected enough to solve the task {count} times, solved it {dataset.num_episodes} times: give"
                " more of them, or use less --noise"
            )
    dataset.finalize()


def start(config: LiberoGeometry, task: int) -> None:
    """Make the environment of this process; the simulator is started by its first reset."""
    _PROCESS["environment"] = make_environment(config, SUITE, task, 0, 1)


def demonstrate(config: LiberoGeometry, task: int, noise: float, state: int) -> list[dict[str, Any]]:
    """Return the frames of an episode from an initial state, as LeRobot's datasets have them; none if it fails."""
    from lerobot.processor.env_processor import LiberoProcessorStep

    def frame_of(observation: dict[str, Any], action: NDArray[np.float32], _: NDArray[np.float32]) -> dict[str, Any]:
        pictures = zip(config.view_keys(), observation["pixels"].values(), strict=True)
        return {
            **{key: np.ascontiguousarray(pixels[::-1, ::-1]) for key, pixels in pictures},
            STATE: state_of(LiberoProcessorStep(), observation),
            ACTION: action,
            "task": environment.task_description,
        }

    environment = _PROCESS["environment"]
    environment.init_state_id = state
    observation, _ = environment.reset(seed=state)
    return perform(environment, observation, noise, np.random.default_rng([task, state]), frame_of)


def perform(
    environment: Any, observation: dict[str, Any], noise: float, generator: np.random.Generator, frame_of: FrameOf
) -> list[dict[str, Any]]:
    """Let the expert act, disturbed, and return what `frame_of` makes of each step, from its first `observation` on.

    There are no frames if the task is not solved after `MAX_STEPS` steps: the disturbance may knock the object over.
    """
    disturbance: NDArray[np.float64] = np.zeros(3)
    frames: list[dict[str, Any]] = []
    for _ in range(MAX_STEPS):
        action, moving = act(environment._env.env)
        disturbance = next_disturbance(disturbance, noise, generator)
        executed = action.copy()
        if moving:
            executed[:3] = np.clip(action[:3] + disturbance, -1, 1)
        frames.append(frame_of(observation, action, executed))
        observation, _, _, _, info = environment.step(executed)
        if info["is_success"]:
            return frames
    return []


def next_disturbance(
    disturbance: NDArray[np.float64], noise: float, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return what disturbs the arm after `disturbance`, [3] in units of actions, of which `noise` is the deviation."""
    new = generator.normal(0, noise * np.sqrt(1 - PERSISTENCE**2), 3)
    return PERSISTENCE * disturbance + new


def act(world: Any) -> tuple[NDArray[np.float32], bool]:
    """Return the expert's action [7], and whether the hand is on its way: then it may be disturbed.

    `world` is robosuite's environment. An action is a shift of the controller's goal in units of 5 cm, a rotation,
    which stays zero, and the gripper.
    """
    seen = world._get_observations()
    target, basket = world.obj_of_interest[:2]
    hand, thing, bin_ = seen["robot0_eef_pos"], seen[f"{target}_pos"], seen[f"{basket}_pos"]
    held = world._check_grasp(gripper=world.robots[0].gripper, object_geoms=world.objects_dict[target])
    if held:
        goal, gripper, moving = _carry(hand, bin_)
    elif np.linalg.norm((thing - bin_)[:2]) < 2 * IN_BASKET:  # released: it falls
        goal, gripper, moving = np.array([*bin_[:2], hand[2]]), OPEN, False
    else:
        goal, gripper, moving = _approach(hand, thing)
    action = np.zeros(7, np.float32)
    action[:3] = np.clip((goal - hand) * GAIN, -1, 1)
    action[6] = gripper
    return action, moving


def _approach(hand: NDArray[np.float64], thing: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, bool]:
    """Move over the object and come down as through a funnel: the lower the hand, the closer it must be."""
    aside = float(np.linalg.norm((thing - hand)[:2]))
    goal = np.array([*thing[:2], thing[2] + GRASP + np.clip(4 * (aside - AT), 0, ABOVE)])
    if np.abs(goal - hand).max() < AT and aside < AT:
        return goal, CLOSED, False
    return goal, OPEN, True


def _carry(hand: NDArray[np.float64], bin_: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, bool]:
    """Lift, move over the basket, come down, and let go."""
    aside = float(np.linalg.norm((bin_ - hand)[:2]))
    height = LOWER + np.clip(2 * (aside - IN_BASKET / 2), 0, CARRY - LOWER)
    sideways = float(np.clip((hand[2] - LIFTED) / (FREE - LIFTED), 0, 1))
    goal = np.array([*(hand[:2] + sideways * (bin_ - hand)[:2]), bin_[2] + height])
    if aside < IN_BASKET and hand[2] < bin_[2] + LOWER + IN_BASKET:
        return goal, OPEN, False
    return goal, CLOSED, sideways > 0


if __name__ == "__main__":
    main()
