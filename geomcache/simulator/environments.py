"""Environment types for LeRobot's commands: LIBERO with geometry or a moved camera, LIBERO-Plus, LIBERO-PRO.

    lerobot-eval --env.discover_packages_path=geomcache.simulator --env.type=libero_plus_variants ...

Importing this module registers them. They set LIBERO up by themselves, so that stock commands run them too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
from lerobot.envs.configs import EnvConfig
from lerobot.envs.configs import LiberoEnv as LiberoConfig
from lerobot.utils.constants import OBS_IMAGES

from geomcache.errors import UserInputError
from geomcache.simulator import libero, plus, pro
from geomcache.simulator.camera import UNMOVED, CameraMove, displacement
from geomcache.simulator.oracle import OracleOptions
from geomcache.simulator.simulation import Variation, environment_class, scene_camera
from geomcache.simulator.task import TaskFacts

# Options that choose tasks or add to the observation: what happens in an episode does not depend on them.
CHOICES = frozenset({"task", "task_ids", "axis", "of_tasks", "sample", "oracle_outputs", "oracle_grid"})


@EnvConfig.register_subclass("libero_geometry")
@dataclass
class LiberoGeometry(LiberoConfig):  # type: ignore[misc]  # LeRobot is not typed
    """LIBERO with true geometry in the observation, a moved camera, or both."""

    camera: str = ""
    """Move of the first view's camera as LIBERO-Plus names it: azimuth_elevation_scale_turnz_turny, in degrees and
    percent, such as 45_15_130_5_0. Empty leaves it where LIBERO has it."""

    oracle_outputs: str = ""
    """True geometry to add to the observation: ray, or ray,depth. Empty for none."""

    oracle_grid: str = "14x14"
    """Its grid, HxW."""

    def prepare(self) -> None:
        """Set LIBERO up and check the options.

        Raises:
            SimulatorError: LIBERO, its assets, a rendering library or the benchmark's files are missing.
            UserInputError: an option cannot be used.
        """
        if not (self.hard_reset and self.init_states):
            raise UserInputError(
                f"env.hard_reset, env.init_states: expected true for {self.type}, got false: leave them out"
            )
        libero.write_config(libero.find_package())
        self.tasks()
        self.oracle()
        libero.prepare_simulator()

    def tasks(self) -> dict[str, list[int]]:
        """Return the numbers of the tasks to run, by suite.

        Raises:
            UserInputError: a suite, task or option does not exist.
        """
        suites = suite_names(self.task)
        libero.check_tasks(self.task, self.task_ids)
        return {suite: libero.task_numbers(suite, self.task_ids) for suite in suites}

    def variation(self, suite: str, number: int) -> Variation:
        """Return how a task is built."""
        task = libero.task_files(suite, number)
        camera = CameraMove.parse(self.camera) if self.camera else None
        return Variation(
            name=task.name,
            language=task.language,
            bddl=task.bddl,
            init_states=task.init_states,
            camera=camera,
            facts=self.facts(suite, number),
        )

    def facts(self, suite: str, number: int) -> TaskFacts:
        """Return what a row of results says about a task."""
        task = libero.task_files(suite, number)
        if not self.camera:
            return TaskFacts(variant=task.name, base_task=task.name, description=task.language)
        move = CameraMove.parse(self.camera)
        moved, turned = displacement(move, scene_camera(plus.read_problem(task.bddl)))
        return TaskFacts(
            variant=f"{task.name}_view_{move}",
            base_task=task.name,
            axis="" if move == UNMOVED else "camera",
            camera=str(move),
            camera_moved_m=moved,
            camera_turned_deg=turned,
            description=task.language,
        )

    def view_keys(self) -> list[str]:
        """Return the names of the cameras in LeRobot's batch, in the order in which true geometry has them."""
        from lerobot.envs.utils import parse_camera_names

        names = self.camera_name_mapping or {"agentview_image": "image", "robot0_eye_in_hand_image": "image2"}
        return [f"{OBS_IMAGES}.{names[camera]}" for camera in parse_camera_names(self.camera_name)]

    def oracle(self) -> OracleOptions | None:
        """Return which true geometry the observation has."""
        return OracleOptions.parse(self.oracle_outputs, self.oracle_grid) if self.oracle_outputs else None

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """Make LeRobot's vector environments, by suite and task. Simulators start at the first reset."""
        self.prepare()
        return {
            suite: {
                number: _vectorised(
                    [partial(make_environment, self, suite, number, index, n_envs) for index in range(n_envs)],
                    use_async=use_async_envs and n_envs > 1,
                )
                for number in numbers
            }
            for suite, numbers in self.tasks().items()
        }


@EnvConfig.register_subclass("libero_plus_variants")
@dataclass
class LiberoPlusVariants(LiberoGeometry):
    """Variants of LIBERO-Plus. Numbers of tasks are those of its own list, whatever else is chosen."""

    task: str = "libero_object"
    """Suites, separated by commas: libero_spatial, libero_object, libero_goal, libero_10."""

    axis: str = "camera"
    """What differs: camera, robot, language, noise or layout_level."""

    of_tasks: str = ""
    """A regular expression that is searched in the names of variants; empty for all."""

    sample: int | None = None
    """So many variants of each suite, at equal distances in LIBERO-Plus's order; None for all."""

    def tasks(self) -> dict[str, list[int]]:
        """Return the numbers of the variants to run, by suite.

        Raises:
            UserInputError: a suite, variant or option does not exist.
        """
        if self.camera:
            raise UserInputError(
                f"env.camera: expected none with {self.type}, whose variants move it, got {self.camera}"
            )
        return {
            suite: plus.select(suite, self.axis, self.of_tasks, self.task_ids, self.sample)
            for suite in suite_names(self.task)
        }

    def variation(self, suite: str, number: int) -> Variation:
        """Return how a variant is built."""
        return plus.variation(suite, number)

    def facts(self, suite: str, number: int) -> TaskFacts:
        """Return what a row of results says about a variant."""
        return plus.facts(suite, number)


@EnvConfig.register_subclass("libero_pro")
@dataclass
class LiberoPro(LiberoGeometry):
    """Suites of LIBERO-PRO, such as libero_goal_swap."""

    task: str = "libero_goal_swap"
    """Suites, separated by commas: libero_{spatial,object,goal,10}_{lan,swap,task,object}."""

    def tasks(self) -> dict[str, list[int]]:
        """Return the numbers of the tasks to run, by suite.

        Raises:
            UserInputError: a suite, task or option does not exist.
        """
        if self.camera:
            raise UserInputError(f"env.camera: expected none with {self.type}, got {self.camera}: leave it out")
        chosen = {}
        for suite in suite_names(self.task):
            count = len(pro.task_names(suite))
            for number in self.task_ids or ():
                if not 0 <= number < count:
                    raise UserInputError(f"env.task_ids: expected 0 to {count - 1} for {suite}, got {number}")
            chosen[suite] = sorted(set(self.task_ids)) if self.task_ids is not None else list(range(count))
        return chosen

    def variation(self, suite: str, number: int) -> Variation:
        """Return how a task is built."""
        return pro.variation(suite, number)

    def facts(self, suite: str, number: int) -> TaskFacts:
        """Return what a row of results says about a task."""
        return pro.facts(suite, number)


def suite_names(text: str) -> list[str]:
    """Split the names of suites at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def make_environment(config: LiberoGeometry, suite: str, number: int, index: int, n_envs: int) -> gym.Env[Any, Any]:
    """Make one environment of a task, in the process that runs it.

    Args:
        config: the options.
        suite: the task's suite.
        number: the task's number in it.
        index: of the environment among those of the task; its first episode starts from this initial state.
        n_envs: how many the task has; the following episodes skip so many initial states.
    """
    options = {key: value for key, value in config.gym_kwargs.items() if key != "task_ids"}
    environment: gym.Env[Any, Any] = environment_class()(
        variation=config.variation(suite, number),
        oracle=config.oracle(),
        number=number,
        task_suite_name=_steps_suite(suite),
        camera_name=config.camera_name,
        episode_length=config.episode_length,
        episode_index=index,
        n_envs=n_envs,
        control_mode=config.control_mode,
        camera_name_mapping=config.camera_name_mapping,
        **options,
    )
    return environment


def _steps_suite(suite: str) -> str:
    """Return the suite of LIBERO whose number of steps is taken, such as ``libero_goal`` for ``libero_goal_swap``."""
    return next((base for base in plus.SUITES if suite.startswith(base)), suite)


def _vectorised(makers: list[Callable[[], gym.Env[Any, Any]]], *, use_async: bool) -> Any:
    """Return LeRobot's kind of vector environment. NEXT_STEP is what its environments of LIBERO have."""
    if use_async:
        from lerobot.envs.utils import _LazyAsyncVectorEnv

        return _LazyAsyncVectorEnv(makers)
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)


def task_facts(config: Any) -> Callable[[str, int], TaskFacts]:
    """Return what tells the facts of a task of any environment of LeRobot's, by suite and number."""
    if isinstance(config, LiberoGeometry):
        return config.facts
    if config.type == "libero":
        return _plain_facts
    return lambda suite, number: TaskFacts(variant=f"{suite} {number}", base_task=f"{suite} {number}")


def _plain_facts(suite: str, number: int) -> TaskFacts:
    task = libero.task_files(suite, number)
    return TaskFacts(variant=task.name, base_task=task.name, description=task.language)
