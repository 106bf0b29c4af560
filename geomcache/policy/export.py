"""Write a checkpoint that was trained with geometry and acts without it as a plain folder, for stock LeRobot."""

import dataclasses
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import draccus
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from geomcache.errors import ModelError, UserInputError, one_line
from geomcache.policy.checkpoint import checkpoint_file, checkpoint_part, has_adapter, part_prefix, read_config
from geomcache.policy.options import PARTS, SUFFIX

OURS = "geomcache"  # what the names of our processor steps begin with

logger = logging.getLogger(__name__)


def export_plain(checkpoint: str, output: Path) -> list[str]:
    """Write a checkpoint's network, configuration and processors as a folder of the plain policy, equal to the bit.

    What training with geometry added, the projector of the alignment loss, is left out. The folder appears when it is
    complete.

    Args:
        checkpoint: folder or Hub id of a checkpoint with geometry that acts without it.
        output: the folder to make.

    Returns:
        Lines for the user.

    Raises:
        ModelError: the checkpoint is not available, or is plain already.
        UserInputError: the policy acts by geometry tokens, its processors have steps of geomcache, or `output` exists.
    """
    if output.exists():
        raise UserInputError(f"output {output}: expected a new folder, found one: choose another or remove it")
    saved = read_config(checkpoint)
    kind = saved["type"]
    if not kind.endswith(SUFFIX):
        raise ModelError(
            f"policy {checkpoint}: expected a {kind}{SUFFIX} checkpoint, found plain {kind}: use it as it is"
        )
    kind = kind.removesuffix(SUFFIX)
    if has_adapter(saved):
        raise UserInputError(
            f"policy {checkpoint}: expected one that acts without geometry, found geom_mode={saved.get('geom_mode')}:"
            f" plain {kind} has no geometry tokens: train with --policy.geom_mode=align"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as draft:
        folder = Path(draft) / "policy"
        folder.mkdir()
        (folder / CONFIG_NAME).write_text(json.dumps(plain_config(saved), indent=4), encoding="utf-8")
        left_out = _copy_weights(checkpoint, folder)
        files = _copy_processors(checkpoint, folder)
        folder.rename(output)
    if saved.get("model_size") == "small":
        logger.warning(
            "policy %s: model_size=small: stock LeRobot has no %s of this size and cannot load %s",
            checkpoint,
            kind,
            output,
        )
    size = (output / SAFETENSORS_SINGLE_FILE).stat().st_size / 2**30
    return [
        f"written: {output}: plain {kind}, {size:.2f} GiB, with {', '.join(files) or 'no processors'}",
        f"left out: {', '.join(left_out) or 'nothing'}",
    ]


def plain_config(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` of the plain policy for one with geometry: LeRobot's own options, as they are."""
    kind = saved["type"].removesuffix(SUFFIX)
    plain_class = PreTrainedConfig.get_choice_class(kind)
    known = {field.name for field in dataclasses.fields(plain_class)}
    config = {name: value for name, value in saved.items() if name in known}
    draccus.decode(plain_class, config)  # LeRobot takes it
    return {"type": kind, **config}


def _copy_weights(checkpoint: str, folder: Path) -> list[str]:
    """Copy the network's tensors; return the names of those of geometry, which are left out."""
    prefixes = tuple(part_prefix(part) for part in PARTS)
    file = checkpoint_file(checkpoint, SAFETENSORS_SINGLE_FILE)
    try:
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            kept = {name: weights.get_tensor(name) for name in names if not name.startswith(prefixes)}
            save_file(kept, folder / SAFETENSORS_SINGLE_FILE, metadata=weights.metadata())
    except SafetensorError as error:
        raise ModelError(
            f"policy {checkpoint}: expected weights in {file.name}: {one_line(error)}: download the checkpoint again"
        ) from error
    return sorted(set(names) - set(kept))


def _copy_processors(checkpoint: str, folder: Path) -> list[str]:
    """Copy the processors with the files that they name; return the names of all."""
    copied = []
    for name in (POLICY_PREPROCESSOR_DEFAULT_NAME, POLICY_POSTPROCESSOR_DEFAULT_NAME):
        file = checkpoint_file(checkpoint, f"{name}.json")
        steps = json.loads(file.read_text(encoding="utf-8"))["steps"]
        ours = [step["registry_name"] for step in steps if str(step.get("registry_name", "")).startswith(OURS)]
        if ours:
            raise UserInputError(
                f"policy {checkpoint}: expected processor steps of LeRobot, found {', '.join(ours)} in {file.name}:"
                " stock LeRobot has none such: train with PaliGemma's tokenizer, or with --policy.tokenizer_name"
            )
        for each in (file.name, *(step["state_file"] for step in steps if "state_file" in step)):
            if Path(each).name != each:
                raise ModelError(f"policy {checkpoint}: expected a file's name in {file.name}, found {each!r:.200}")
            shutil.copyfile(checkpoint_file(checkpoint, each), folder / each)
            copied.append(each)
        # From LeRobot 0.6.2 on, a step may have a file or a folder next to these, such as its tokenizer.
        for each in {path for step in steps for path in step.get("artifacts", {}).values()} - {*copied}:
            if Path(each).is_absolute() or ".." in Path(each).parts:
                raise ModelError(f"policy {checkpoint}: expected a path within it in {file.name}, found {each!r:.200}")
            part = checkpoint_part(checkpoint, each)
            (shutil.copytree if part.is_dir() else shutil.copyfile)(part, folder / each)
            copied.append(each)
    return copied
