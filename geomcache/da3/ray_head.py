"""The ray-only forward of Depth Anything 3's head: no depth chain, and one of four auxiliary outputs.

It runs upstream's own modules (``depth_anything_3/model/dualdpt.py``) on the same numbers: on the CPU in float32 the
rays are equal to the bit. A level of the pyramid is computed when it is needed, and let go after. Tests compare it with
the whole head, and notice when upstream's code changes.
"""

from typing import Any, cast

from torch import Tensor


def ray_forward(head: Any, features: list[Tensor], height: int, width: int) -> dict[str, Tensor]:
    """Return what ``DualDPT.forward`` gives as ``ray`` and ``ray_conf``, and compute nothing that they do not need.

    Args:
        head: a ``DualDPT``.
        features: four of [N, S, patches, C], from the backbone.
        height: of the images, pixels.
        width: of the images, pixels.

    Returns:
        ``ray`` [N, S, 8*height/14, 8*width/14, 6] and ``ray_conf`` [N, S, 8*height/14, 8*width/14].
    """
    scenes, views, _, channels = features[0].shape
    scratch = head.scratch

    def with_positions(x: Tensor) -> Tensor:
        return cast("Tensor", head._add_pos_embed(x, width, height)) if head.pos_embed else x

    def level(stage: int) -> Tensor:  # 0 is the finest
        x = head.norm(features[head.intermediate_layer_idx[stage]].flatten(0, 1))
        x = x.permute(0, 2, 1).reshape(-1, channels, height // head.patch_size, width // head.patch_size)
        x = head.resize_layers[stage](with_positions(head.projects[stage](x)))
        return cast("Tensor", scratch.get_submodule(f"layer{stage + 1}_rn")(x))

    lateral = level(2)
    fused = scratch.refinenet4_aux(level(3), size=lateral.shape[2:])
    for stage, refine in ((1, scratch.refinenet3_aux), (0, scratch.refinenet2_aux)):
        finer = level(stage)
        fused = refine(fused, lateral, size=finer.shape[2:])
        lateral = finer
    fused = scratch.refinenet1_aux(fused, lateral)
    fused = with_positions(scratch.output_conv1_aux[-1](fused))
    logits = scratch.output_conv2_aux[-1](fused).permute(0, 2, 3, 1)
    logits = logits.reshape(scenes, views, *logits.shape[1:])
    return {
        "ray": head._apply_activation_single(logits[..., :-1], "linear"),
        "ray_conf": head._apply_activation_single(logits[..., -1], head.conf_activation),
    }
