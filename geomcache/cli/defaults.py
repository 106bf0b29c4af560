"""What the commands choose where none is named. Each choice is logged in a line, with the option that changes it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from geomcache.errors import CacheNotFoundError, UserInputError
from geomcache.extraction.options import DEFAULT_DATASET
from geomcache.lerobot_options import given

if TYPE_CHECKING:
    from geomcache.cache.store import GeometryStore

LIBERO_POLICY = "lerobot/pi05_libero_base"
"""Pi0.5 that has seen LIBERO's robot, for datasets of it."""
POLICY = "lerobot/pi05_base"
OUTPUT = Path("outputs/pi05_geometry")

logger = logging.getLogger(__name__)


def choose_dataset(root: Path | None) -> str:
    """Return the dataset of an extraction that names none.

    Raises:
        UserInputError: a folder is given; its dataset has a name of its own, by which training finds it.
    """
    if root is not None:
        raise UserInputError(
            f"dataset: expected a name for the dataset in --root {root}, found none: give it with --dataset OWNER/NAME"
        )
    logger.info("dataset: %s; choose another with --dataset, a local copy with --root", DEFAULT_DATASET)
    return DEFAULT_DATASET


def choose_cache(folder: Path) -> Path:
    """Return the only cache in a folder, sealed or not.

    Raises:
        CacheNotFoundError: there is none.
        UserInputError: there are several; the message lists them.
    """
    caches = sorted(
        group.parent
        for group in folder.glob("[!.]*/zarr.json")  # a hidden one is the draft of another command
        if b'"geomcache"' in group.read_bytes()
    )
    if not caches:
        raise CacheNotFoundError(
            "cache: expected one in the current folder, found none: make one with"
            " `geomcache extract --model DA3-LARGE`, or name one with --cache"
        )
    names = ", ".join(cache.name for cache in caches)
    if len(caches) > 1:
        raise UserInputError(
            f"cache: expected one in the current folder, found {len(caches)}: {names}: name one with --cache"
        )
    logger.info("cache: %s, the only one in the current folder; choose another with --cache", names)
    return caches[0]


def with_training_choices(cache: Path, lerobot_args: Sequence[str], store: "GeometryStore | None" = None) -> list[str]:
    """Return the options of `lerobot-train` with what they leave open: dataset, policy, precision and output folder.

    A configuration file (``--config_path``) names all of them, and nothing is added.

    Args:
        cache: path of the run's cache.
        lerobot_args: options as on the command line.
        store: the cache, open; None opens the one at the path.

    Raises:
        UserInputError: the output folder of a run that names none exists.
        CacheError: the cache cannot be opened.
    """
    from geomcache.cache.store import GeometryStore

    store = store or GeometryStore.open(cache)  # before LeRobot is imported: a wrong path is reported at once

    args = list(lerobot_args)
    if given("config_path", args):
        return args
    args += _dataset(store, cache, args)
    args += _tolerance(cache, args)
    own_size = given("policy.path", args) or given("policy.model_size", args) or _is_smolvla(args)
    args += _policy(args)
    if not own_size:
        args += _precision(args)
    return args + _output(cache, args)


def _dataset(store: "GeometryStore", cache: Path, args: Sequence[str]) -> list[str]:
    """Choose the dataset that the cache was made of: its folder if it was one, otherwise the Hub's at that commit."""
    from geomcache.extraction.run_config import recorded_run

    if given("dataset.repo_id", args):
        return []
    repo_id, where = store.dataset.repo_id, ""
    chosen = [f"--dataset.repo_id={repo_id}"]
    if not given("dataset.root", args):
        root, revision = recorded_run(cache).get("root"), store.dataset.revision
        if root is not None:
            chosen.append(f"--dataset.root={root}")
            where = f" in {root}"
        elif revision is not None and not given("dataset.revision", args):
            chosen.append(f"--dataset.revision={revision}")
            where = f" at {revision}"
    _say("dataset: %s%s, which the cache was made of; choose another with --dataset.repo_id", repo_id, where)
    return chosen


def _tolerance(cache: Path, args: Sequence[str]) -> list[str]:
    """Choose the tolerance of time stamps that the dataset was read with, where it is not LeRobot's default."""
    from geomcache.extraction.run_config import recorded_run
    from geomcache.frames.reader import TOLERANCE_S

    tolerance = recorded_run(cache).get("tolerance_s")
    if given("tolerance_s", args) or tolerance in (None, str(TOLERANCE_S)):
        return []
    _say("tolerance_s: %s, with which the cache was made; change it with --tolerance_s", tolerance)
    return [f"--tolerance_s={tolerance}"]


def _policy(args: Sequence[str]) -> list[str]:
    """Choose the plain Pi0.5 to start from, with its own options, unless an option says what the policy is."""
    from lerobot.configs.parser import parse_arg

    if any(given(f"policy.{name}", args) for name in ("path", "pretrained_path", "type", "model_size", "random_init")):
        return []
    dataset = (parse_arg("dataset.repo_id", args) or "").rpartition("/")[2]
    policy = LIBERO_POLICY if "libero" in dataset.lower() else POLICY
    _say("policy: starts from %s; choose another with --policy.path", policy)
    return [f"--policy.path={policy}"]


def _is_smolvla(args: Sequence[str]) -> bool:
    """Return whether the options ask for a new SmolVLA, which is small and has no options of its precision."""
    from lerobot.configs.parser import parse_arg

    return (parse_arg("policy.type", args) or "").startswith("smolvla")


def _precision(args: Sequence[str]) -> list[str]:
    """Choose what lets a GPU hold the full-size Pi0.5."""
    import torch
    from lerobot.configs.parser import parse_arg

    device = parse_arg("policy.device", args) or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith("cuda"):
        return []
    chosen = []
    for name, value, other in (("dtype", "bfloat16", "float32"), ("gradient_checkpointing", "true", "false")):
        if not given(f"policy.{name}", args):
            chosen.append(f"--policy.{name}={value}")
            _say("%s: %s, on %s; change it with --policy.%s=%s", name, value, device, name, other)
    return chosen


def _output(cache: Path, args: Sequence[str]) -> list[str]:
    from geomcache.training.trainer import resume_note

    if given("output_dir", args):
        return []
    if OUTPUT.exists():
        raise UserInputError(
            f"output_dir: expected a new folder, found {OUTPUT}: choose another with --output_dir; of the run in it:"
            f" {resume_note(cache, OUTPUT)}"
        )
    _say("output: %s; choose another folder with --output_dir", OUTPUT)
    return [f"--output_dir={OUTPUT}"]


def _say(line: str, *values: object) -> None:
    """Log a choice; of the processes of a distributed run, in the main one."""
    from geomcache.training.trainer import is_main_process

    if is_main_process():
        logger.info(line, *values)
