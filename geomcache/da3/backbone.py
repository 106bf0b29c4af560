"""The forward of Depth Anything 3's backbone with rotary tables that are made once for a size.

Upstream's blocks ask the device for ``int(positions.max())`` twice each, from `rope_start` on, so that a GPU stops 32
times in a forward of DA3-LARGE. Here upstream's modules (``depth_anything_3/model/dinov2``) run on the same numbers,
with the cosines and sines of every token made before. Tests compare both forwards, and notice when upstream's code
changes.

In float32 the features are equal to upstream's to the bit, on a CPU (tests) and on a GPU (benchmarks/RESULTS.md). Under
autocast to bfloat16 it depends on what upstream's tables are:

- On CUDA, ``einsum`` is among the operations that autocast casts (``AT_FORALL_LOWER_PRECISION_FP`` in
  ``ATen/autocast_mode.h``): upstream's angles are rounded to bfloat16, their cosines are float32. Tables made in
  autocast, as `engine` makes them, are the same ones.
- On a CPU, autocast leaves ``einsum`` in float32, but norms give bfloat16, and upstream makes its tables in the dtype
  of its tokens, which moves angles by degrees. Here they are float32.

Legend:  N scenes   S views of a scene   n tokens of a view (one for the camera, then its patches)   C channels
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Rotation(NamedTuple):
    """Cosines and sines of tokens' positions, each float32 [tokens, channels of a head]."""

    cosine: Tensor
    sine: Tensor

    def repeat(self, views: int) -> "Rotation":
        """Return the tables of all tokens of a scene, whose views have the same positions."""
        return Rotation(self.cosine.repeat(views, 1), self.sine.repeat(views, 1))


class RotaryTables(NamedTuple):
    """The rotations of one view's tokens: by their place among its patches, and without it."""

    local: Rotation
    """For attention within a view."""
    scene: Rotation
    """For attention over all views of a scene: every patch has the same position, and the camera token another."""

    @classmethod
    def make(cls, backbone: Any, height: int, width: int, device: torch.device) -> "RotaryTables | None":
        """Compute the tables of a size with upstream's frequencies, in the precision of the current autocast.

        Args:
            backbone: a ``DinoV2``.
            height: of the images, pixels.
            width: of the images, pixels.
            device: where the tables go.

        Returns:
            None for a network without rotary embeddings.
        """
        network = backbone.pretrained
        if network.rope is None:
            return None
        rows, columns = height // network.patch_size, width // network.patch_size
        patches = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device)) + 1
        camera = patches.new_zeros(1, 2)
        channels = network.embed_dim // network.num_heads // 2  # one half for rows, the other for columns

        def rotation(positions: Tensor, largest: int) -> Rotation:
            tables = network.rope._compute_frequency_components(channels, largest + 1, device, torch.float32)
            return Rotation(*(torch.cat([table[positions[:, 0]], table[positions[:, 1]]], dim=-1) for table in tables))

        return cls(
            local=rotation(torch.cat([camera, patches]), max(rows, columns)),
            scene=rotation(torch.cat([camera, torch.ones_like(patches)]), 1),
        )


def block_forward(block: Any, x: Tensor, rotation: Rotation | None) -> Tensor:
    """Return what upstream's ``Block.forward`` gives outside of training.

    Args:
        block: a ``Block``.
        x: float32 [batch, tokens, C].
        rotation: of each token; None for a block without rotary embeddings.

    Returns:
        float32 [batch, tokens, C]
    """
    attention = block.attn
    batch, tokens, channels = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(block.norm1(x)).reshape(batch, tokens, 3, heads, channels // heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [batch, heads, tokens, channels of a head] each
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rotation is not None:
        query, key = _rotate(query, rotation), _rotate(key, rotation)
    # Under autocast a norm's output is float32 on CUDA, and a rotated one is everywhere.
    mixed = scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
    x = x + block.ls1(attention.proj(mixed.transpose(1, 2).reshape(batch, tokens, channels)))
    return x + block.ls2(block.mlp(block.norm2(x)))  # type: ignore[no-any-return]


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs of channels of [..., tokens, channels]: two quarters by rows, two by columns."""
    first, second, third, fourth = x.chunk(4, dim=-1)
    return x * rotation.cosine + torch.cat([-second, first, -fourth, third], dim=-1) * rotation.sine


BlockForward = Callable[[Any, Tensor, Rotation | None], Tensor]


def backbone_forward(
    backbone: Any, images: Tensor, tables: RotaryTables | None, run_block: BlockForward = block_forward
) -> list[Tensor]:
    """Return the features that ``DinoV2.forward`` gives with the first view as the reference.

    Args:
        backbone: a ``DinoV2``.
        images: float32 [N, S, 3, H, W].
        tables: for this size.
        run_block: `block_forward`, or a compiled one.

    Returns:
        Of each of ``backbone.out_layers``, [N, S, patches, C] or, where upstream concatenates, [N, S, patches, 2 C].
    """
    network = backbone.pretrained
    scenes, views = images.shape[:2]
    x = network.prepare_tokens_with_masks(images)  # [N, S, n, C]
    tokens, channels = x.shape[2:]
    local = x  # after the last block that saw each view alone
    scene = tables.scene.repeat(views) if tables is not None else None
    features = []
    for number, block in enumerate(network.blocks):
        alternates = network.alt_start != -1 and number >= network.alt_start
        if alternates and number == network.alt_start:
            x[:, :, 0] = _camera_tokens(network, scenes, views)
        rotates = tables is not None and number >= network.rope_start
        if alternates and number % 2 == 1:
            joined = run_block(block, x.reshape(scenes, views * tokens, channels), scene if rotates else None)
            x = joined.reshape(scenes, views, tokens, channels)
        else:
            alone = x.reshape(scenes * views, tokens, channels)
            alone = run_block(block, alone, tables.local if tables is not None and rotates else None)
            x = local = alone.reshape(scenes, views, tokens, channels)
        if number in backbone.out_layers:
            normalised = network.norm(x)
            taken = torch.cat([local, normalised], dim=-1) if network.cat_token else normalised
            features.append(taken[:, :, network.patch_start_idx + network.num_register_tokens :])
    return features


def _camera_tokens(network: Any, scenes: int, views: int) -> Tensor:
    """Return the token of each view, [N, S, C]: one for the reference, another for the rest."""
    reference, others = network.camera_token[:, :1], network.camera_token[:, 1:]
    return torch.cat([reference.expand(scenes, -1, -1), others.expand(scenes, views - 1, -1)], dim=1)
