"""LeRobot's LIBERO environment with a scene that is varied, and with true geometry in the observation.

    Variation ──► VariedEnvironment = LeRobot's LiberoEnv, which builds hf-libero's scene
                    camera, robot start    before the model is built
                    noise                  on pictures, as LIBERO-Plus has it
                    geometry               sensors of robosuite, read in the same substep as the pictures

Everything that LeRobot's class does (initial states, settling, success) stays its own. LIBERO is imported when an
environment is made: this module can be imported without it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from geomcache.geometry import OUTPUTS, batch_key
from geomcache.simulator.camera import CameraMove, Pose
from geomcache.simulator.noise import noise_of
from geomcache.simulator.oracle import OracleOptions, map_shape, oracle_map
from geomcache.simulator.task import TaskFacts

FIRST_CAMERA = "agentview"  # what LIBERO-Plus moves, and the reference of true geometry
OBSERVATION_PREFIX = "observation."
PLACES = "seen_from_places"  # robosuite's name of what `watch_from` adds


class Task(NamedTuple):
    """A task as LIBERO describes it. Folders may be absolute: what LeRobot joins them to is dropped then."""

    name: str
    language: str
    problem: str
    problem_folder: str
    bddl_file: str
    init_states_file: str


@dataclass(frozen=True, kw_only=True)
class Variation:
    """A task, and what differs from it."""

    name: str
    language: str
    """The words that the policy is told."""
    bddl: Path
    init_states: Path
    is_layout: bool = False
    """True for LIBERO-Plus's layouts, whose file has one initial state, flat."""
    camera: CameraMove | None = None
    """Move of the first view's camera. None leaves its pose as LIBERO has it, without LIBERO-Plus's rounding."""
    robot_qpos: tuple[float, ...] | None = None
    """Joint angles in radians that the arm is built with; None for LIBERO's."""
    noise: int | None = None
    """Number of LIBERO-Plus's noise on the first view's pictures."""
    facts: TaskFacts = field(default_factory=lambda: TaskFacts(variant="", base_task=""))


class OneTask:
    """A suite of one task, as LeRobot's environment takes it."""

    def __init__(self, variation: Variation, number: int) -> None:
        task = Task(
            variation.name,
            variation.language,
            "Libero",
            str(variation.bddl.parent),
            variation.bddl.name,
            variation.init_states.name,
        )
        self._task = task
        # LeRobot reads initial states of `tasks[number]`, everything else of `get_task(number)`.
        self.tasks = {number: task._replace(problem_folder=str(variation.init_states.parent))}

    def get_task(self, _number: int) -> Task:
        """Return the task."""
        return self._task


class VariedMixin:
    """What a varied environment adds to LeRobot's `LiberoEnv`; see `environment_class`."""

    _env: Any
    camera_name: Sequence[str]
    observation_height: int
    observation_width: int

    def __init__(self, *, variation: Variation, oracle: OracleOptions | None, number: int, **options: Any) -> None:
        """Describe the environment; the simulator is started by the first reset.

        Args:
            variation: the task, and what differs.
            oracle: which true geometry the observation has; None for none.
            number: number of the task in its suite.
            options: those of LeRobot's `LiberoEnv`.
        """
        suite = OneTask(variation, number)
        super().__init__(task_suite=suite, task_id=number, is_libero_plus=variation.is_layout, **options)  # type: ignore[call-arg]  # of LiberoEnv
        self.variation, self.oracle = variation, oracle
        if oracle is not None:
            self.observation_space: Any = _with_maps(self.observation_space, oracle, len(self.camera_name))

    @property
    def mujoco_cameras(self) -> list[str]:
        """Return MuJoCo's names of the cameras, in the order of the views."""
        return [name.removesuffix("_image") for name in self.camera_name]

    def _ensure_env(self) -> None:
        """Build the plain scene as LeRobot does, and prepare it: the reset that follows builds it again, varied."""
        if self._env is not None:
            return
        super()._ensure_env()  # type: ignore[misc]  # of LiberoEnv
        environment: Any = self.__dict__["_env"]  # mypy takes it for None since the line above
        inner = environment.env
        if self.variation.camera is not None:
            inner._setup_camera = functools.partial(_set_up_camera, inner._setup_camera, self.variation.camera)
        if self.variation.robot_qpos is not None:
            inner.robot_configs[0]["initial_qpos"] = np.array(self.variation.robot_qpos)
        if self.oracle is not None:
            self._add_sensors(inner, self.oracle)
        if self.variation.noise is not None:
            _add_noise(environment, self.variation.noise)

    def _add_sensors(self, inner: Any, oracle: OracleOptions) -> None:
        """Add a sensor for each map. Sensors are read in order: after the pictures, in the same substep."""
        from robosuite.utils.observables import Observable, sensor

        if "depth" in oracle.outputs:
            inner.camera_depths = [True] * len(inner.camera_names)
            inner._observables = inner._setup_observables()
        names, aspect = self.mujoco_cameras, self.observation_width / self.observation_height
        for output in oracle.outputs:

            @sensor(modality=f"oracle_{output}")  # type: ignore[untyped-decorator]  # robosuite is not typed
            def read(cache: Mapping[str, Any], output: str = output) -> NDArray[np.float32]:
                if not cache:  # robosuite asks for the shape
                    return np.full(map_shape(output, oracle.grid_hw, len(names)), np.nan, np.float32)
                buffers = {name: cache[f"{name}_depth"][..., 0] for name in names} if output == "depth" else {}
                maps = oracle_map(output, inner.sim, names, grid_hw=oracle.grid_hw, aspect=aspect, buffers=buffers)
                return maps.astype(np.float32)

            inner.add_observable(Observable(name=batch_key(output), sensor=read, sampling_rate=inner.control_freq))

    def watch_from(self, poses: Sequence[Pose]) -> None:
        """Let `views_from` also tell what the first view's camera would see from other places. Call it before `reset`.

        The camera is placed there in the same substep in which the pictures are taken, and put back.
        """
        from robosuite.utils.observables import Observable, sensor

        self._ensure_env()
        inner, oracle, names = self.__dict__["_env"].env, self.oracle, self.mujoco_cameras
        assert oracle is not None
        assert names[0] == FIRST_CAMERA
        height, width = self.observation_height, self.observation_width
        options: dict[str, Any] = {"grid_hw": oracle.grid_hw, "aspect": width / height}

        @sensor(modality=PLACES)  # type: ignore[untyped-decorator]  # robosuite is not typed
        def look(cache: dict[str, Any]) -> NDArray[np.uint8]:
            pictures = np.zeros((len(poses), height, width, 3), np.uint8)
            shapes = {output: map_shape(output, oracle.grid_hw, len(names)) for output in oracle.outputs}
            maps = {output: np.zeros((len(poses), *shape), np.float16) for output, shape in shapes.items()}
            if cache:  # otherwise robosuite asks for the shape
                buffers = {name: cache[f"{name}_depth"][..., 0] for name in names if f"{name}_depth" in cache}
                for place, pose in enumerate(poses):
                    with camera_at(inner.sim, FIRST_CAMERA, pose):
                        pictures[place], depth = inner.sim.render(
                            camera_name=FIRST_CAMERA, width=width, height=height, depth=True
                        )
                        for output in oracle.outputs:
                            found = buffers | {FIRST_CAMERA: depth}
                            maps[output][place] = oracle_map(output, inner.sim, names, buffers=found, **options)
            cache.update({f"{PLACES}_{output}": values for output, values in maps.items()})
            return pictures

        inner.add_observable(Observable(name=PLACES, sensor=look, sampling_rate=inner.control_freq))
        for output in oracle.outputs:

            @sensor(modality=f"{PLACES}_{output}")  # type: ignore[untyped-decorator]
            def read(cache: dict[str, Any], output: str = output) -> NDArray[np.float16]:
                if f"{PLACES}_{output}" not in cache:
                    return np.zeros((len(poses), *map_shape(output, oracle.grid_hw, len(names))), np.float16)
                maps: NDArray[np.float16] = cache[f"{PLACES}_{output}"]
                return maps

            inner.add_observable(Observable(name=f"{PLACES}_{output}", sensor=read, sampling_rate=inner.control_freq))

    def views_from(self) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float16]]]:
        """Return pictures [P, H, W, 3] of the first view's camera at the P places, and each output's [P, V, h, w, ...].

        Pictures are upside down and mirrored, as LIBERO's own are.
        """
        assert self.oracle is not None
        current = self.__dict__["_env"].env._get_observations()
        return current[PLACES], {output: current[f"{PLACES}_{output}"] for output in self.oracle.outputs}

    def _format_raw_obs(self, raw_obs: Mapping[str, Any]) -> dict[str, Any]:
        """Add the maps to LeRobot's observation, under the names from which LeRobot makes those of the batch."""
        observation: dict[str, Any] = super()._format_raw_obs(raw_obs)  # type: ignore[misc]  # of LiberoEnv
        for output in () if self.oracle is None else self.oracle.outputs:
            observation[_observation_name(output)] = raw_obs[batch_key(output)].astype(np.float32)
        return observation


@functools.cache
def environment_class() -> type:
    """Return `VariedMixin` on LeRobot's `LiberoEnv`, which imports LIBERO."""
    from lerobot.envs.libero import LiberoEnv

    return type("VariedEnvironment", (VariedMixin, LiberoEnv), {})


@contextlib.contextmanager
def camera_at(simulation: Any, name: str, pose: Pose) -> Iterator[None]:
    """While this lasts, a camera that is fixed in the world is at another place. Nothing else changes."""
    import mujoco

    model, data = simulation.model, simulation.data
    camera = model.camera_name2id(name)
    before = model.cam_pos[camera].copy(), model.cam_quat[camera].copy()

    def place(position: NDArray[np.float64], quaternion: NDArray[np.float64]) -> None:
        model.cam_pos[camera], model.cam_quat[camera] = position, quaternion
        mujoco.mj_camlight(model._model, data._data)

    place(pose.position, pose.quaternion / np.linalg.norm(pose.quaternion))  # MuJoCo's compiler does that to a scene's
    try:
        yield
    finally:
        place(*before)


def _observation_name(output: str) -> str:
    return batch_key(output).removeprefix(OBSERVATION_PREFIX)


def _with_maps(space: Any, oracle: OracleOptions, views: int) -> Any:
    from gymnasium import spaces

    maps = {
        _observation_name(output): spaces.Box(-np.inf, np.inf, map_shape(output, oracle.grid_hw, views), np.float32)
        for output in oracle.outputs
    }
    return spaces.Dict({**space.spaces, **maps})


def _add_noise(environment: Any, number: int) -> None:
    """Make `step` and `reset` of hf-libero's environment blur the first view, as LIBERO-Plus's do."""
    noise, name = noise_of(number), f"{FIRST_CAMERA}_image"
    step, reset = environment.step, environment.reset

    def noisy_reset() -> Any:
        observation = reset()
        observation[name] = noise(observation[name])
        return observation

    def noisy_step(action: Any) -> Any:
        observation, *rest = step(action)
        observation[name] = noise(observation[name])
        return observation, *rest

    environment.step, environment.reset = noisy_step, noisy_reset


def _set_up_camera(upstream: Callable[[Any], None], move: CameraMove, arena: Any) -> None:
    """Place the cameras as LIBERO does, then move the first one."""
    upstream(arena)
    camera = arena.worldbody.find(f"./camera[@name='{FIRST_CAMERA}']")
    position, quaternion = (np.array([float(part) for part in camera.get(key).split()]) for key in ("pos", "quat"))
    moved = move.apply(Pose(position=position, quaternion=quaternion))
    arena.set_camera(FIRST_CAMERA, pos=list(moved.position), quat=list(moved.quaternion))


class _Arena:
    """What LIBERO places cameras in, to ask where it would place them."""

    def __init__(self) -> None:
        self.poses: dict[str, Pose] = {}

    def set_camera(self, camera_name: str, pos: Any, quat: Any, camera_attribs: Any = None) -> None:  # noqa: ARG002
        """Keep the pose."""
        self.poses[camera_name] = Pose(position=np.array(pos, float), quaternion=np.array(quat, float))


@functools.cache
def scene_camera(problem: str) -> Pose:
    """Return where LIBERO places the first view's camera in a kind of scene, ``libero_floor_manipulation`` for one."""
    from libero.libero.envs.bddl_base_domain import TASK_MAPPING

    arena = _Arena()
    TASK_MAPPING[problem]._setup_camera(None, arena)
    return arena.poses[FIRST_CAMERA]


def maps_of(observation: Mapping[str, Any]) -> dict[str, NDArray[np.float16]]:
    """Return the true geometry in an observation, float16 [V, h, w, ...] of each output."""
    return {
        output: observation[_observation_name(output)].astype(np.float16)
        for output in OUTPUTS
        if _observation_name(output) in observation
    }
