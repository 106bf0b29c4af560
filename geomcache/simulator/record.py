"""Record demonstrations again in LIBERO, seen by moved cameras, together with a cache of their true geometry.

    a LeRobotDataset's actions ──► LIBERO, from the same initial state ──► LeRobotDataset of new pictures
                                   the camera moved as asked               cache: oracle:mujoco, same frames

The simulator is deterministic: the same actions give the same motion. That it did is compared: the hand's recorded
states, and success at the end.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.writer import StoreWriter
from geomcache.errors import DatasetError, UserInputError
from geomcache.frames.signature import sign_pictures
from geomcache.frames.source import open_dataset
from geomcache.ranges import rows_of
from geomcache.simulator import libero, plus
from geomcache.simulator.camera import CameraMove, Pose
from geomcache.simulator.environments import LiberoGeometry, make_environment
from geomcache.simulator.oracle import oracle_spec
from geomcache.simulator.simulation import scene_camera

STATE, ACTION = "observation.state", "action"
EXECUTED = "executed_action"  # optional column: what the simulator was given, where `action` is what a policy learns
INITIAL_STATE = "initial_state"  # optional column: number of the initial state that the episode began in
STATE_TOLERANCE = 1e-3  # metres and radians; a replay of the same initial state stays within 1e-5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """What is replayed."""

    name: str
    """For messages."""
    task: int
    """Number of the task in its suite."""
    initial_state: int
    actions: NDArray[np.float32]  # [T, 7]
    executed: NDArray[np.float32]  # [T, 7]; the actions, unless the demonstrator was disturbed
    states: NDArray[np.float32]  # [T, 8] before each action


def read_demonstrations(
    repo_id: str, root: Path | None, suite: str, episodes: Sequence[int] | None
) -> list[Demonstration]:
    """Read the demonstrations of a suite's tasks out of a LeRobotDataset.

    A column `initial_state` says which initial state an episode began in. Without it, the first episode of a task is
    taken to begin in the state 0, the second in 1, and so on; `record` finds out if that is wrong. A column
    `executed_action` has what the simulator was given, if that was not `action`.

    Args:
        repo_id: name of the dataset.
        root: its folder, if it is on this machine.
        suite: name of the suite.
        episodes: numbers of the episodes to return; None for all.

    Raises:
        DatasetError: an episode's task is none of the suite.
    """
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset(repo_id, root=root, download_videos=False)
    table = dataset.hf_dataset.with_format("numpy")
    numbers = {libero.task_files(suite, number).language: number for number in libero.task_numbers(suite, None)}
    counted: dict[str, int] = {}
    demonstrations = []
    for row in dataset.meta.episodes:
        (text, *_), episode = row["tasks"], int(row["episode_index"])
        if text not in numbers:
            raise DatasetError(
                f"dataset {repo_id}: episode {episode}: expected a task of {suite} ({', '.join(numbers)}), found"
                f" {text!r}"
            )
        state = counted[text] = counted.get(text, -1) + 1
        if episodes is not None and episode not in episodes:
            continue
        part = table[int(row["dataset_from_index"]) : int(row["dataset_to_index"])]
        demonstrations.append(
            Demonstration(
                name=f"{repo_id} episode {episode}",
                task=numbers[text],
                initial_state=int(np.asarray(part[INITIAL_STATE]).flat[0]) if INITIAL_STATE in part else state,
                actions=np.asarray(part[ACTION], np.float32),
                executed=np.asarray(part[EXECUTED if EXECUTED in part else ACTION], np.float32),
                states=np.asarray(part[STATE], np.float32),
            )
        )
    return demonstrations


def record(
    demonstrations: Sequence[Demonstration],
    cameras: Sequence[str],
    config: LiberoGeometry,
    folder: Path,
    cache: Path,
    *,
    fps: int = 10,
    as_images: bool = False,
) -> None:
    """Replay every demonstration, seen by all cameras at once, and write a dataset and its cache.

    Episodes are in the order of the demonstrations, and for each in that of the cameras.

    Args:
        demonstrations: what to replay.
        cameras: moves of the first view's camera, as `LiberoGeometry.camera` has them.
        config: one suite, the pictures' size, and which true geometry to cache.
        folder: of the new LeRobotDataset; it must not exist.
        cache: path of the new cache.
        fps: of the new dataset; LIBERO's own datasets say 10.
        as_images: keep pictures as they are instead of as video, which loses detail and takes longer to write.

    Raises:
        UserInputError: no geometry was asked for, or a demonstration does not repeat.
        SimulatorError: LIBERO cannot be started.
    """
    from lerobot.datasets import LeRobotDataset

    options = config.oracle()
    if options is None:
        raise UserInputError("oracle_outputs: expected ray or ray,depth to cache, got none")
    config.prepare()
    keys = config.view_keys()
    features = _features(keys, demonstrations[0], config, as_images=as_images)
    repo_id = f"geomcache/{folder.name}"
    dataset = LeRobotDataset.create(
        repo_id, fps=fps, features=features, root=folder, robot_type="panda", use_videos=not as_images
    )
    maps: dict[str, list[NDArray[np.float16]]] = {output: [] for output in options.outputs}
    for demonstration in demonstrations:
        began = time.monotonic()
        moments = list(replay(demonstration, config, cameras))
        logger.info("%s: replayed in %.0f s", demonstration.name, time.monotonic() - began)
        for place, camera in enumerate(cameras):
            for frame in (moment[place] for moment in moments):
                for output, values in frame.maps.items():
                    maps[output].append(values)
                pictures = dict(zip(keys, frame.pictures, strict=True))
                dataset.add_frame({**pictures, STATE: frame.state, ACTION: frame.action, "task": frame.task})
            dataset.save_episode()
            logger.info("%s, camera %s: %d frames", demonstration.name, camera or "as it is", len(moments))
    dataset.finalize()
    write_cache(repo_id, folder, cache, keys, config, {output: np.stack(values) for output, values in maps.items()})


def _features(
    keys: Sequence[str], demonstration: Demonstration, config: LiberoGeometry, *, as_images: bool
) -> dict[str, dict[str, Any]]:
    """Return the columns of the new dataset, as LeRobot describes them."""
    picture = {
        "dtype": "image" if as_images else "video",
        "shape": (config.observation_height, config.observation_width, 3),
        "names": ["height", "width", "channels"],
    }
    features: dict[str, dict[str, Any]] = {key: dict(picture) for key in keys}
    features[STATE] = {"dtype": "float32", "shape": demonstration.states.shape[1:], "names": None}
    features[ACTION] = {"dtype": "float32", "shape": demonstration.actions.shape[1:], "names": None}
    return features


def write_cache(
    repo_id: str,
    folder: Path,
    path: Path,
    keys: Sequence[str],
    config: LiberoGeometry,
    maps: dict[str, NDArray[np.float16]],
) -> None:
    """Write the cache of a recorded dataset; `maps` has each output's [N, V, h, w, ...]."""
    options = config.oracle()
    assert options is not None
    dataset, _ = open_dataset(repo_id, root=folder, cameras=keys)
    spec = oracle_spec(dataset.cameras, options)
    with StoreWriter.create_or_open(
        path,
        spec,
        dataset.spec,
        dataset.reader.episode_length,
        [(0, dataset.spec.frames)],
        identities=dataset.identities,
    ) as writer:
        while (claim := writer.claim()) is not None:
            rows = rows_of(claim.rows)
            by_camera = {
                key: {output: values[rows, view] for output, values in maps.items()} for view, key in enumerate(keys)
            }
            pictures = dataset.reader.read(int(rows[0]), int(rows[-1]) + 1).images
            writer.commit(claim, by_camera, sign_pictures(pictures))
        writer.seal()


@dataclass(frozen=True, kw_only=True)
class RecordedFrame:
    """What is seen before an action, and the action."""

    pictures: tuple[NDArray[np.uint8], ...]  # of each view [H, W, 3], as LeRobot's datasets have them
    maps: dict[str, NDArray[np.float16]]  # of each output, [V, h, w, ...]
    state: NDArray[np.float32]  # [8]
    action: NDArray[np.float32]  # [7]
    task: str


def replay(
    demonstration: Demonstration, config: LiberoGeometry, cameras: Sequence[str] = ("",)
) -> Iterator[tuple[RecordedFrame, ...]]:
    """Yield the frames of a demonstration, seen by each of the cameras.

    Raises:
        UserInputError: the hand moves in another way than recorded, or the task is not solved at the end.
    """
    from lerobot.processor.env_processor import LiberoProcessorStep

    environment: Any = make_environment(config, config.task, demonstration.task, demonstration.initial_state, 1)
    try:
        environment.watch_from([_pose(environment.variation.bddl, camera) for camera in cameras])
        observation, _ = environment.reset(seed=demonstration.initial_state)
        solved = False
        for number, (action, executed) in enumerate(zip(demonstration.actions, demonstration.executed, strict=True)):
            state = state_of(LiberoProcessorStep(), observation)
            off = np.abs(state - demonstration.states[number]).max()
            if off > STATE_TOLERANCE:
                raise UserInputError(
                    f"{demonstration.name}: expected the recorded state in frame {number}, it is {off:.2g} off: its"
                    f" initial state is not {demonstration.initial_state}, or it was recorded in another simulator"
                )
            firsts, maps = environment.views_from()
            others = [_upright(pixels) for pixels in list(observation["pixels"].values())[1:]]
            yield tuple(
                RecordedFrame(
                    pictures=(_upright(first), *others),
                    maps={output: values[place] for output, values in maps.items()},
                    state=state,
                    action=action,
                    task=environment.task_description,
                )
                for place, first in enumerate(firsts)
            )
            observation, _, _, _, info = environment.step(executed)
            solved |= info["is_success"]
        if not solved:
            raise UserInputError(
                f"{demonstration.name}: expected it to solve the task from the initial state"
                f" {demonstration.initial_state}, it did not: leave it out, or give it its own initial state"
            )
    finally:
        environment.close()


def _pose(bddl: Path, camera: str) -> Pose:
    """Return where a camera of `LiberoGeometry.camera` is in a task's scene."""
    pose = scene_camera(plus.read_problem(bddl))
    return CameraMove.parse(camera).apply(pose) if camera else pose


def _upright(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pixels[::-1, ::-1])  # LeRobot's LiberoProcessorStep turns them so


def state_of(step: Any, observation: dict[str, Any]) -> NDArray[np.float32]:
    """Return the state [8] that LeRobot makes of LIBERO's observation; `step` is LeRobot's `LiberoProcessorStep`."""
    import torch

    robot = observation["robot_state"]
    parts = {
        "eef": {name: torch.from_numpy(np.asarray(robot["eef"][name]))[None] for name in ("pos", "quat")},
        "gripper": {"qpos": torch.from_numpy(np.asarray(robot["gripper"]["qpos"]))[None]},
    }
    state: NDArray[np.float32] = step.observation({"observation.robot_state": parts})[STATE][0].numpy()
    return state
