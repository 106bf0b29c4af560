"""Where the image tokens of Pi0.5 look, and what their hidden states are: two seams into LeRobot's network.

Legend of shapes:  B batch   V views   h, w cached grid   n image tokens of a camera   C channels   P prefix   D width

LeRobot scales a picture into a square, centres it on black, and cuts the square into patches; each patch is a token:

    picture [H, W]  ->  square [side, side]  ->  n = (side / 14)^2 tokens, row by row      (224 px: 16x16)

A cached map covers the picture, and no padding.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geomcache.geometry import PATCH_SIZE


@dataclass(frozen=True, kw_only=True)
class PictureArea:
    """The part of the square, in pixels, that a camera's picture fills."""

    side: int
    """Pixels of the square's side."""
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, height: int, width: int, side: int) -> "PictureArea":
        """Return where LeRobot's `resize_with_pad_torch` puts a picture of this size."""
        ratio = max(width / side, height / side)
        rows, columns = int(height / ratio), int(width / ratio)
        return cls(side=side, top=(side - rows) // 2, left=(side - columns) // 2, height=rows, width=columns)


def picture_areas(batch: Mapping[str, Any], keys: Sequence[str], side: int) -> list[PictureArea | None]:
    """Return where each camera's picture in a batch is in its square; None for a camera that the batch lacks.

    Args:
        batch: has [B, 3, H, W], or as LeRobot's policy also takes it [B, H, W, 3], of the cameras.
        keys: the cameras.
        side: pixels of the square's side.
    """
    shapes = [batch[key].shape[1:] if key in batch else None for key in keys]
    sizes = [None if shape is None else (shape[1:] if shape[0] == 3 else shape[:2]) for shape in shapes]
    return [None if size is None else PictureArea.of(size[0], size[1], side) for size in sizes]


def tokens_of_views(hidden: Tensor, keys: Sequence[str], present: Sequence[str], side: int) -> Tensor:
    """Return the image tokens of cameras among the prefix's hidden states [B, P, D], as [B, V, n, D].

    Args:
        hidden: hidden states of the prefix, which begins with the image tokens.
        keys: the cameras of the V views. Any tokens stand for those of a camera that is not present.
        present: the cameras in the order in which the prefix has them.
        side: pixels of the square's side.
    """
    count = (side // PATCH_SIZE) ** 2
    starts = [count * present.index(key) if key in present else 0 for key in keys]
    return torch.stack([hidden[:, start : start + count] for start in starts], dim=1)


def on_image_tokens(maps: Tensor, area: PictureArea) -> tuple[Tensor, Tensor]:
    """Resample maps of a camera's picture to the cells of its image tokens.

    Linear with antialiasing, as torch's `interpolate` does it: for a square picture the two agree.

    Args:
        maps: [B, h, w, C], float32.
        area: where the picture is.

    Returns:
        The maps on the tokens, [B, n, C], and the share of each token that lies in the picture, [n].
    """
    rows, row_share = _axis_weights(maps.shape[1], area.side, area.top, area.height, maps.device)
    columns, column_share = _axis_weights(maps.shape[2], area.side, area.left, area.width, maps.device)
    sampled = torch.einsum("ih,bhwc,jw->bijc", rows, maps, columns).flatten(1, 2)
    return sampled, (row_share[:, None] * column_share).flatten()


def _axis_weights(cells: int, side: int, offset: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each token's weights of the cells along one axis, [tokens, cells], and its share in the picture."""
    edges = (torch.arange(side // PATCH_SIZE + 1, dtype=torch.float64) * PATCH_SIZE - offset) / length
    whole = edges[1:] - edges[:-1]
    edges = edges.clamp(0, 1)  # of the picture
    width = edges[1:] - edges[:-1]
    center = (edges[1:] + edges[:-1]) / 2 * cells
    distance = (torch.arange(cells, dtype=torch.float64) + 0.5 - center[:, None]).abs()
    # A triangle as wide as the token, and at least as wide as a cell.
    weights = (1 - distance / (width * cells).clamp(min=1)[:, None]).clamp(min=0) * (width > 0)[:, None]
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    return weights.to(device, torch.float32), (width / whole).to(device, torch.float32)


def prefix_norms(network: nn.Module) -> list[nn.Module]:
    """Return the modules of LeRobot's `PaliGemmaWithExpertModel` whose inputs are the prefix's hidden states.

    The input of module k is [B, P, D] after k layers: the norm at the beginning of layer k + 1, and the last one's that
    of the end. Training and sampling both call them.
    """
    language: Any = network.paligemma.model.language_model  # type: ignore[union-attr]
    return [*(layer.input_layernorm for layer in language.layers), language.norm]


class HiddenStates:
    """Hidden states of the prefix after chosen layers, as a pass of the network leaves them behind.

    Hooks are part of the network from the start, so that a compiled network has them too. They keep something only
    inside of `kept`: the second pass that gradient checkpointing makes while it goes backward leaves nothing.
    """

    def __init__(self, network: nn.Module, layers: Sequence[int]) -> None:
        """Watch a network.

        Args:
            network: LeRobot's `PaliGemmaWithExpertModel`.
            layers: numbers of layers, 0 for what enters the first one.
        """
        self._open = False
        self._states: dict[int, Tensor] = {}
        norms = prefix_norms(network)
        self._hooks = [norms[layer].register_forward_pre_hook(partial(self._keep, layer)) for layer in layers]

    @contextlib.contextmanager
    def kept(self) -> Iterator[dict[int, Tensor]]:
        """While this lasts, keep what passes: hidden states [B, P, D] by layer, of the latest pass."""
        self._open = True
        try:
            yield self._states
        finally:
            self._open = False
            self._states = {}

    def _keep(self, layer: int, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._open:
            self._states[layer] = inputs[0]

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
