"""Load a checkpoint into `pi05_geometry`, or say why it cannot be: nothing is left at random values unasked.

LeRobot's own loader for Pi0.5 reports a missing file, a missing key or a wrong shape as a printed line and returns the
model with random weights. Here all of them are errors; what fixes the keys of older checkpoints is still LeRobot's.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from geomcache.errors import ModelError, ModelNotFoundError, one_line
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig, check_same_spec

ADAPTER_NAME = "geometry_adapter"
ADAPTER_PREFIX = f"model.{ADAPTER_NAME}."
LOADABLE = ("pi05", "pi05_geometry")

logger = logging.getLogger(__name__)


def checkpoint_file(path: str, name: str, **hub: Any) -> Path:
    """A file of a checkpoint, in a folder or on the Hub.

    Args:
        path: folder or Hub id.
        name: of the file.
        hub: ``revision`` and other options of `hf_hub_download`.

    Raises:
        ModelNotFoundError: there is no such folder, Hub id or file, or no way to the Hub.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        if not file.is_file():
            found = ", ".join(sorted(entry.name for entry in Path(path).iterdir())) or "nothing"
            raise ModelNotFoundError(
                f"policy {path}: expected {name} in this folder, found {found}: give the folder of a checkpoint that"
                " holds config.json and model.safetensors, such as checkpoints/last/pretrained_model"
            )
        return file
    try:
        return Path(hf_hub_download(path, name, **hub))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelNotFoundError(
            f"policy {path}: expected a folder, or a Hub id that can be reached, with {name}: {one_line(error)}: check"
            " the path, the network and, for a gated or private id, the token"
        ) from error


def read_config(path: str, **hub: Any) -> dict[str, Any]:
    """A checkpoint's ``config.json``, of a policy that can be loaded.

    Raises:
        ModelNotFoundError: it is not there.
        ModelError: it is no JSON object, or of another policy.
    """
    file = checkpoint_file(path, CONFIG_NAME, **hub)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"policy {path}: expected JSON in {CONFIG_NAME}: {one_line(error)}") from error
    kind = config.get("type") if isinstance(config, dict) else None
    if kind not in LOADABLE:
        raise ModelError(
            f"policy {path}: expected a checkpoint of {' or '.join(LOADABLE)}, found {kind!r}: give another checkpoint"
        )
    assert isinstance(config, dict)
    return config


def adopt_geometry(config: PI05GeometryConfig, saved: Mapping[str, Any]) -> bool:
    """Compare the run's geometry with that of a checkpoint's configuration, and take over its statistics.

    Returns:
        Whether the checkpoint has an adapter.

    Raises:
        CacheMismatchError: the checkpoint was trained with geometry made in another way.
    """
    trained = saved["type"] == "pi05_geometry" and saved.get("use_geom_prefix", True)
    if trained and config.use_geom_prefix and saved.get("geom_spec") is not None:
        if config.geom_spec is None:
            config.geom_spec = saved["geom_spec"]
        check_same_spec(cached=config.geom_spec, checkpoint=saved["geom_spec"])
        config.geom_statistics = saved.get("geom_statistics")  # what the adapter standardised by
    return bool(trained)


def load_weights(policy: PI05Policy, path: str, file: Path, *, has_adapter: bool) -> None:
    """Load a weight file; afterwards every parameter and buffer comes from it, a new adapter's excepted.

    Args:
        policy: what to load into.
        path: of the checkpoint, for messages.
        file: ``model.safetensors``.
        has_adapter: whether the checkpoint was trained with geometry. If not, the policy's adapter stays as it is.

    Raises:
        ModelError: the file is damaged, or a key is missing, unexpected or of the wrong shape.
    """
    try:
        loaded = load_file(file)
    except SafetensorError as error:
        raise ModelError(
            f"policy {path}: expected weights in {file.name}: {one_line(error)}: fetch the checkpoint again"
        ) from error
    fixed: dict[str, Tensor] = policy._fix_pytorch_state_dict_keys(loaded, policy.config)
    state = {key if key.startswith("model.") else f"model.{key}": value for key, value in fixed.items()}
    own = policy.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    fresh = set() if has_adapter else {key for key in missing if key.startswith(ADAPTER_PREFIX)}
    # An adapter that is there and switched off is left out on purpose.
    unused = set() if policy.config.use_geom_prefix else {key for key in unexpected if key.startswith(ADAPTER_PREFIX)}
    misfits = {
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    }
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in (("lacks", missing - fresh), ("has unknown", unexpected - unused), ("does not fit:", misfits))
        if keys
    ]
    if problems:
        raise ModelError(
            f"policy {path}: expected weights for this configuration, the checkpoint {'; '.join(problems)}: load it"
            " with the options that it was trained with"
        )
    policy.load_state_dict(state, strict=False)
    if fresh:
        logger.info("policy %s has no geometry adapter: the adapter starts fresh (%s)", path, _some(fresh))
    if unused:
        logger.warning("policy %s has a geometry adapter: it is left out, use_geom_prefix is false", path)


def _some(keys: Iterable[str]) -> str:
    """At most five names, and how many more there are."""
    names = sorted(keys)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
