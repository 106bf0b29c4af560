"""How two losses pull at the parameters that both reach: the sizes of their gradients, and the angle between them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def shared_parameters(network: nn.Module, layer: int) -> list[nn.Parameter]:
    """Return the trained parameters of the last part that the hidden states after a layer depend on.

    It is that layer of the language model, as in GradNorm (Chen et al., 2018); an earlier one, the image projection or
    the vision tower where later ones are frozen. The list is empty where none is trained.

    Args:
        network: LeRobot's `PaliGemmaWithExpertModel`.
        layer: number of the layer, from 1.
    """
    model: Any = network.paligemma.model  # type: ignore[union-attr]
    for part in (*reversed(model.language_model.layers[:layer]), model.multi_modal_projector, model.vision_tower):
        trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
        if trained:
            return trained
    return []


def compare_gradients(
    first: Tensor, second: Tensor, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norms of two losses' gradients, and the angle between the gradients in degrees.

    90 degrees: the losses do not care about one another; more: they pull apart. It is 90 where a gradient is zero.
    The graph of both losses stays. It costs a backward pass from each loss to these parameters.
    """
    device = first.device.type
    with torch.autocast(device, enabled=False):
        flat = [_flat_gradient(loss, parameters) for loss in (first, second)]
    norms = [gradient.norm() for gradient in flat]
    cosine = (flat[0] @ flat[1]) / (norms[0] * norms[1]).clamp(min=1e-30)
    return norms[0], norms[1], torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def _flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).float().flatten()
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
    )
