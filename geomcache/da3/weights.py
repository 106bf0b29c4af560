"""Load weights from a safetensors file: every tensor with its shape, or an error. Nothing stays random."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from geomcache.errors import ModelError

# What converts to float32 without a scale. Quantised weights would become wrong numbers.
_DTYPES = ("F64", "F32", "F16", "BF16")

logger = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"weights {path}: expected a file that can be read, got {error.strerror}") from None


def load_weights(network: nn.Module, path: Path, *, prefix: str, unused: set[str], device: torch.device) -> None:
    """Give a network its weights, in float32 on a device, without gradients and in evaluation mode.

    The network's own tensors are replaced, not filled, so it can be built on the meta device. On the CPU the new ones
    are views of the mapped file. One line of the log counts the file's names that the network does not have, and those
    of `unused` that the file does not have.

    Args:
        network: all of its parameters and buffers are read.
        path: a safetensors file.
        prefix: what the file writes before the network's names.
        unused: names of the file that belong to parts of the model that are not built.
        device: where the weights go.

    Raises:
        ModelError: it is no safetensors file, or tensors are missing, have another shape, or are not plain floating
            point numbers.
    """
    shapes = {prefix + name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    shared: dict[int, list[str]] = {}  # the names of each tensor
    for name, tensor in network.state_dict(keep_vars=True).items():
        shared.setdefault(id(tensor), []).append(prefix + name)
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            # save_pretrained writes a tensor of several names once. If the file has all of them, upstream's loading
            # ends with the last.
            sources = [next((name for name in reversed(names) if name in found), None) for names in shared.values()]
            missing = [names[0] for names, source in zip(shared.values(), sources, strict=True) if source is None]
            wrong = [
                _misfit(source, file.get_slice(source), shapes[source]) for source in sources if source is not None
            ]
            unknown = sorted(found - unused - shapes.keys())
            if missing or any(wrong):
                raise ModelError(
                    f"weights {path}: expected all {len(shared)} tensors of backbone and head"
                    f"{_first(', missing', missing)}{_first(', not fitting', filter(None, wrong))}"
                    f"{_first(', unknown', unknown)}: are config.json and weights of the same model, and all of it?"
                )
            tensors = [file.get_tensor(source).to(device, torch.float32) for source in sources]
    except SafetensorError as error:
        raise ModelError(
            f"weights {path}: expected a whole safetensors file, found none ({error}): get it again"
        ) from None
    groups = zip(shared.values(), tensors, strict=True)
    network.load_state_dict(
        {name.removeprefix(prefix): tensor for names, tensor in groups for name in names}, assign=True
    )
    network.to(device).requires_grad_(requires_grad=False).eval()
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    absent = sorted(unused - found)
    logger.log(
        logging.WARNING if unknown or absent else logging.INFO,
        "weights %s: %d tensors of backbone and head loaded; of parts that are not run, %d left out%s%s",
        path,
        len(tensors),
        len(unused & found),
        _first(", missing", absent),
        _first("; unknown to the network", unknown),
    )


def _misfit(name: str, part: Any, shape: list[int]) -> str | None:
    """Return what is wrong with a tensor of the file; None if it fits."""
    if part.get_shape() == shape and part.get_dtype() in _DTYPES:
        return None
    return f"{name} of {part.get_dtype()} {part.get_shape()}, expected {shape}"


def _first(what: str, items: Iterable[str], shown: int = 3) -> str:
    """Return ``, missing 12: a, b, c ...``, or nothing if there are no items."""
    names = list(items)
    if not names:
        return ""
    return f"{what} {len(names)}: {', '.join(names[:shown])}{' ...' if len(names) > shown else ''}"
