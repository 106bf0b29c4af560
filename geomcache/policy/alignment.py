"""The alignment loss: hidden states of the image tokens are drawn to the cached geometry of the same places.

    hidden states after layer N [B, V, n, D]  -> LayerNorm -> Linear -> GELU -> Linear -> [B, V, n, C]
    cached maps [B, V, h, w, ...]  -> standardised channels -> on the cells of the image tokens -> [B, V, n, C]

Idea and projector are those of Spatial Forcing (arXiv 2510.12276), where the target is a feature of VGGT and the loss a
cosine. There are two targets:

    geometry    the cached geometry itself: the squared error, weighted by DA3's confidence
    feature     DA3's features in the numbers of the cache's basis, as they are: 1 - cosine, as published
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from geomcache.adapter import channel_statistics, standardised
from geomcache.geometry import OUTPUTS, Geometry
from geomcache.policy.image_tokens import PictureArea, on_image_tokens
from geomcache.statistics import Moments

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the image tokens of a batch should tell."""

    values: Tensor  # [B, V, n, C] float32; geometry is standardised
    weights: Tensor  # [B, V, n, C] float32, of features [B, V, n, 1], from 0 to 1; 0 where there is nothing to learn
    known: Tensor  # [B, V, n] bool: tokens most of whose cell lies in the picture and has values


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The alignment loss of a batch."""

    losses: Tensor  # [B], whose mean is the loss: the weighted mean over all of the batch
    learned: Tensor  # [], without gradient: share of the target's weighted variance that is predicted; or mean cosine


class Projector(nn.Module):
    """The published projector from a token's hidden state to the C channels of a target."""

    def __init__(self, width: int, channels: int) -> None:
        """Build a fresh projector from hidden states of a width."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.output = nn.Linear(2 * width, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the predicted channels [..., C] of hidden states [..., D]."""
        normed = self.norm(hidden.to(self.hidden.weight.dtype))
        channels: Tensor = self.output(F.gelu(self.hidden(normed)))
        return channels


class GeometryProjector(Projector):
    """The projector to channels of geometry, with the target's statistics.

    Attributes:
        logged_as: what `Alignment.learned` is.
        mean: [C] float32 on the CPU, mean of each channel in the cache; no part of the state dict.
        std: [C] float32 on the CPU, standard deviation of each channel, with the adapter's floors.
    """

    logged_as = "geom_align_r2"

    def __init__(self, *, statistics: Mapping[str, Moments], width: int) -> None:
        """Build a fresh projector.

        Args:
            statistics: moments of each cached output of geometry, in the order of `OUTPUTS`.
            width: D, width of the hidden states.
        """
        mean, std = channel_statistics(statistics)
        super().__init__(width, len(mean))
        self.mean, self.std = mean, std

    def target(self, geometry: Geometry, areas: Sequence[PictureArea | None]) -> Target:
        """Return `geometry_target` by the statistics of the projector's cache."""
        return geometry_target(geometry, self.mean, self.std, areas)

    def align(self, hidden: Tensor, target: Target) -> Alignment:
        """Return the loss of hidden states [B, V, n, D]: the squared error, a weighted mean over the batch."""
        predicted = self(hidden).float()
        weights, total = target.weights, target.weights.sum().clamp(min=_TINY)
        errors = (weights * (predicted - target.values).square()).sum((1, 2, 3))  # [B]
        with torch.no_grad():
            of_channel = weights.sum((0, 1, 2)).clamp(min=_TINY)
            mean = (weights * target.values).sum((0, 1, 2)) / of_channel
            variance = (weights * (target.values - mean).square()).sum().clamp(min=_TINY)
        return Alignment(losses=len(errors) * errors / total, learned=1 - errors.detach().sum() / variance)


class FeatureProjector(Projector):
    """The projector to cached features, whose direction alone counts: arXiv 2510.12276, equation 5.

    Attributes:
        logged_as: what `Alignment.learned` is.
    """

    logged_as = "geom_align_cosine"

    def target(self, geometry: Geometry, areas: Sequence[PictureArea | None]) -> Target:
        """Return `feature_target`."""
        return feature_target(geometry, areas)

    def align(self, hidden: Tensor, target: Target) -> Alignment:
        """Return the loss of hidden states [B, V, n, D]: 1 - cosine, a mean over the known tokens of the batch."""
        cosines = F.cosine_similarity(self(hidden).float(), target.values, dim=-1)  # [B, V, n]
        weights = target.weights[..., 0]
        total = weights.sum().clamp(min=_TINY)
        losses = (weights * (1 - cosines)).sum((1, 2))  # [B]
        mean = (weights * cosines.detach()).sum() / total
        return Alignment(losses=len(losses) * losses / total, learned=mean)


@torch.no_grad()
def geometry_target(geometry: Geometry, mean: Tensor, std: Tensor, areas: Sequence[PictureArea | None]) -> Target:
    """Return what the image tokens of a batch should tell. No gradient leads into it.

    Args:
        geometry: torch. Features are left out.
        mean: [C], as of `channel_statistics`.
        std: [C].
        areas: for each view, where the policy sees its picture; None for a camera that the batch lacks.
    """
    geometry = geometry.without_feature()
    return _target(standardised(geometry, mean, std), confidence_weights(geometry), geometry.valid, areas)


@torch.no_grad()
def feature_target(geometry: Geometry, areas: Sequence[PictureArea | None]) -> Target:
    """Return the features that the image tokens of a batch should tell. No gradient leads into it.

    They are resampled linearly, as published, and neither standardised nor weighted by a confidence.

    Args:
        geometry: torch, with features.
        areas: as in `geometry_target`.
    """
    assert geometry.feature is not None
    maps = geometry.feature.float()  # [B, V, h, w, C]
    return _target(maps, maps.new_ones(*maps.shape[:4], 1), geometry.valid, areas)


def _target(maps: Tensor, weights: Tensor, valid: Tensor | None, areas: Sequence[PictureArea | None]) -> Target:
    """Return maps [B, V, h, w, C] and their weights on the image tokens; `valid` is [B, V, h, w] bool."""
    valid = maps.new_ones(maps.shape[:4]) if valid is None else valid.float()
    side = next(area for area in areas if area is not None).side
    views = [
        _on_tokens(maps[:, view], weights[:, view], valid[:, view], area or PictureArea.of(side, side, side))
        for view, area in enumerate(areas)
    ]
    values, weights, known = (torch.stack(parts, dim=1) for parts in zip(*views, strict=True))
    known = known & torch.tensor([area is not None for area in areas], device=known.device)[:, None]
    return Target(values=values, weights=weights * known[..., None], known=known)


def confidence_weights(geometry: Geometry) -> Tensor:
    """Return how far each channel of each cell counts, [B, V, h, w, C] float32 from 0 to 1.

    A ray counts by its confidence, and so does a depth: 1 - 1 / confidence. DA3's confidence is 1 + exp(x)
    (`expp1` in its heads), so that this is the logistic function of x: 0 for "not known", 1 for "certain", while the
    confidence itself has no upper end. The channels of a confidence count fully: that a cell is not known, is known.
    """
    weights = []
    for name, values in geometry.items():
        confidence = None if OUTPUTS[name].log else getattr(geometry, f"{name}_conf")
        cell = values.new_ones(values.shape[:4]).float() if confidence is None else 1 - 1 / confidence.float()
        weights.append(cell[..., None].expand(*cell.shape, len(OUTPUTS[name].channels)))
    return torch.cat(weights, dim=-1)


def _on_tokens(maps: Tensor, weights: Tensor, valid: Tensor, area: PictureArea) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and weights [B, n, C] of one view, of its cells with a value, and which tokens are known [B, n]."""
    mask = valid[..., None]
    share, in_picture = on_image_tokens(mask, area)  # [B, n, 1], [n]
    values, _ = on_image_tokens(maps * mask, area)
    confidences, _ = on_image_tokens(weights * mask, area)
    known = (share[..., 0] > 0.5) & (in_picture > 0.5)
    share = share.clamp(min=_TINY)
    return values / share, confidences / share, known
