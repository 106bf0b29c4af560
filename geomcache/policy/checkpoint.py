"""Load a checkpoint into a policy with geometry, or raise: no weight is left at a random value unasked.

LeRobot's own loaders for Pi0 and Pi0.5 print a line about a missing file, a missing key or a wrong shape and return the
model with random weights. Here each of them is an error. Keys of older checkpoints are still renamed by LeRobot's code.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import draccus
import httpx
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from geomcache.errors import ModelError, ModelNotFoundError, UserInputError, one_line
from geomcache.policy.options import (
    ADAPTER_NAME,
    FEATURE_PROJECTOR_NAME,
    PARTS,
    PROJECTOR_NAME,
    SUFFIX,
    GeometryOptions,
    check_same_spec,
    parts_of,
)
from geomcache.waits import hub_call

if TYPE_CHECKING:
    from geomcache.policy.geometry_policy import GeometryPolicy

PLAIN_TYPES = ("pi05", "pi0", "smolvla")  # LeRobot's policies that can have geometry
LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"

# Options of a trained part: with others its numbers mean something else.
PART_OPTIONS = {
    ADAPTER_NAME: ("geom_attention", "geom_target_hw", "geom_modality_embedding"),
    PROJECTOR_NAME: ("geom_align_layer",),
    FEATURE_PROJECTOR_NAME: ("geom_align_layer",),
}
# Entries of a configuration that belong to one run, machine, dataset or upload, and not to the policy.
RUN_OPTIONS = frozenset(
    {
        *("type", "device", "pretrained_path", "pretrained_revision", "use_peft", "input_features", "output_features"),
        *("action_feature_names", "push_to_hub", "repo_id", "private", "tags", "license"),
        *("geom_spec", "geom_statistics", "geom_fingerprint", "random_init"),
    }
)

logger = logging.getLogger(__name__)


def checkpoint_file(path: str, name: str, **hub: Any) -> Path:
    """Return a file of a checkpoint, in a folder or on the Hub. `hub` are options of `hf_hub_download`.

    Raises:
        ModelNotFoundError: the folder, Hub id or file does not exist, or the Hub cannot be reached.
        ModelError: the folder holds a LoRA adapter and not the file.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        if not file.is_file():
            if (Path(path) / LORA_CONFIG).is_file():
                raise ModelError(_lora_message(Path(path), name))
            entries = ", ".join(sorted(entry.name for entry in Path(path).iterdir())) or "nothing"
            raise ModelNotFoundError(
                f"policy {path}: expected {name} in this folder, found {entries}: give the folder of a checkpoint that"
                " holds config.json and model.safetensors, such as checkpoints/last/pretrained_model"
            )
        return file
    try:
        with hub_call(f"policy {path}: waiting for {name} from the Hub"):
            return Path(hf_hub_download(path, name, **hub))
    except (HfHubHTTPError, HFValidationError, OSError, httpx.HTTPError) as error:
        raise ModelNotFoundError(
            f"policy {path}: expected a folder, or a Hub id that can be reached, with {name}: {one_line(error)}: check"
            " the path, the network and, for a gated or private id, the token"
        ) from error


def checkpoint_part(path: str, name: str) -> Path:
    """Return a file or a folder of a checkpoint, in a folder or on the Hub.

    Raises:
        ModelNotFoundError: it does not exist, or the Hub cannot be reached.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            with hub_call(f"policy {path}: waiting for {name} from the Hub"):
                folder = Path(snapshot_download(path, allow_patterns=[name, f"{name}/*"]))
        except (HfHubHTTPError, HFValidationError, OSError, httpx.HTTPError) as error:
            raise ModelNotFoundError(
                f"policy {path}: expected a Hub id that can be reached, with {name}: {one_line(error)}: check the"
                " network and, for a gated or private id, the token"
            ) from error
    if not (folder / name).exists():
        raise ModelNotFoundError(f"policy {path}: expected {name} in it, found none: save or download it again")
    return folder / name


def _lora_message(folder: Path, name: str) -> str:
    try:
        base = json.loads((folder / LORA_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    return (
        f"policy {folder}: expected a full checkpoint with {name}, found a LoRA adapter of the base checkpoint"
        f" {base or 'that its adapter_config.json names'}: continue it with --policy.path={folder} (`geomcache train`),"
        f" evaluate it with `geomcache eval --policy {folder}`, or give the base checkpoint"
    )


def read_config(path: str, policy_type: str | None = None, **hub: Any) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``, of a policy that can be loaded.

    Args:
        path: folder or Hub id.
        policy_type: type of the policy with geometry that it goes into; None: any.
        hub: options of `hf_hub_download`.

    Raises:
        ModelNotFoundError: the file does not exist.
        ModelError: it is no JSON object, or of another policy.
    """
    file = checkpoint_file(path, CONFIG_NAME, **hub)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"policy {path}: expected JSON in {CONFIG_NAME}: {one_line(error)}") from error
    kind = config.get("type") if isinstance(config, dict) else None
    plain_types = PLAIN_TYPES if policy_type is None else (policy_type.removesuffix(SUFFIX),)
    loadable = [name for plain in plain_types for name in (plain, f"{plain}{SUFFIX}")]
    if kind not in loadable:
        names = " or ".join((", ".join(loadable[:-1]), loadable[-1]))
        raise ModelError(f"policy {path}: expected a checkpoint of {names}, found {kind!r}: give another checkpoint")
    assert isinstance(config, dict)
    return config


def trained_parts(saved: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the geometry's modules that a checkpoint with this ``config.json`` holds."""
    if not saved["type"].endswith(SUFFIX) or not saved.get("use_geom_prefix", True):
        return frozenset()
    return parts_of(saved.get("geom_mode", "prefix"), saved.get("geom_align_target", "geometry"))


def has_adapter(saved: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint with this ``config.json`` holds a trained geometry adapter: it acts by geometry."""
    return ADAPTER_NAME in trained_parts(saved)


def part_prefix(part: str) -> str:
    """Return what the keys of a module's weights begin with."""
    return f"model.{part}."


def adopt_geometry(config: GeometryOptions, saved: Mapping[str, Any]) -> None:
    """Compare the run's geometry with that of a checkpoint's trained parts, and take over spec and statistics.

    A checkpoint without parts that the run has changes nothing, even where it has the spec of other ones.

    Raises:
        CacheMismatchError: the parts were trained with geometry made in another way.
    """
    if trained_parts(saved) & config.parts and saved.get("geom_spec") is not None:
        if config.geom_spec is None:
            config.geom_spec = saved["geom_spec"]
        check_same_spec(cached=config.geom_spec, checkpoint=saved["geom_spec"])
        config.geom_statistics = saved.get("geom_statistics")  # what the parts standardised by


def check_options(
    config: GeometryOptions, saved: Mapping[str, Any], path: str, is_given: Callable[[str], bool]
) -> None:
    """Compare a run's options with those of the checkpoint whose weights it starts from (`pretrained_path`).

    LeRobot takes the weights alone and leaves every option at its default. Differences are logged in one line; those
    that change what a trained part sees must have been given: `is_given` says so of an option's name.

    Raises:
        UserInputError: an option of a trained part was not given and differs from the checkpoint's.
    """
    own = draccus.encode(config)
    differing = {
        name: (own[name], value)
        for name, value in saved.items()
        if name in own and name not in RUN_OPTIONS and own[name] != value
    }
    for part in sorted(trained_parts(saved) & config.parts):
        for name in PART_OPTIONS[part]:
            if name in differing and not is_given(f"policy.{name}"):
                value, trained = (json.dumps(each) for each in differing[name])
                raise UserInputError(
                    f"policy.{name}: expected {trained}, which the {PARTS[part].split()[1]} of {path} was trained with,"
                    f" got the default {value}: keep the checkpoint's options with --policy.path={path} instead of"
                    f" --policy.pretrained_path, or give --policy.{name}"
                )
    if differing:
        listed = ", ".join(
            f"{name}={json.dumps(run)} (checkpoint: {json.dumps(was)})" for name, (run, was) in differing.items()
        )
        logger.warning(
            "policy %s: options of this run differ from the checkpoint's own: %s: keep the checkpoint's with"
            " --policy.path=%s instead of --policy.pretrained_path",
            path,
            listed,
            path,
        )


def load_weights(policy: "GeometryPolicy", path: str, file: Path, *, trained: frozenset[str]) -> None:
    """Load a weight file: every parameter and buffer comes from it, except those of fresh parts of the geometry.

    Args:
        policy: the policy.
        path: the checkpoint's name, for messages.
        file: the weight file.
        trained: names of the parts that the checkpoint has; others of the policy stay as they are.

    Raises:
        ModelError: the file is damaged, or a key is missing, unexpected or of the wrong shape.
    """
    try:
        loaded = load_file(file)
    except SafetensorError as error:
        raise ModelError(
            f"policy {path}: expected weights in {file.name}: {one_line(error)}: download the checkpoint again"
        ) from error
    state = policy.completed_weights(loaded)
    own = policy.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    parts = policy.config.parts
    fresh = {part: {key for key in missing if key.startswith(part_prefix(part))} for part in parts - trained}
    # A part that is switched off is left out on purpose.
    unused = {part: {key for key in unexpected if key.startswith(part_prefix(part))} for part in PARTS.keys() - parts}
    misfits = {
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    }
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in (
            ("lacks", missing.difference(*fresh.values())),
            ("has unknown", unexpected.difference(*unused.values())),
            ("does not fit:", misfits),
        )
        if keys
    ]
    if problems:
        raise ModelError(
            f"policy {path}: expected weights for this configuration, the checkpoint {'; '.join(problems)}: load it"
            " with the options that it was trained with"
        )
    policy.load_state_dict(state, strict=False)
    for part, keys in sorted(fresh.items()):
        name = PARTS[part]
        logger.info("policy %s has no %s: the %s starts fresh (%s)", path, name, name.split()[1], _some(keys))
    for part, keys in sorted(unused.items()):
        if keys:
            why = f"geom_mode is {policy.config.geom_mode}" if parts else "use_geom_prefix is false"
            logger.warning("policy %s has a %s: it is left out, %s", path, PARTS[part], why)


def _some(keys: Iterable[str]) -> str:
    """Name at most five, and count the others."""
    names = sorted(keys)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
