"""Geometry -> prefix tokens: the only trained part that geomcache adds to Pi0.5.

Legend of shapes:  B batch   V views   h, w cached grid   th, tw target grid   n = V*th*tw tokens   C channels   D width

    Geometry [B, V, h, w, ...] -> log of confidences -> (x - mean) / std of each channel -> resampled to [th, tw]
    -> flattened, views in order -> Linear C -> D -> times alpha -> tokens [B, n, D]
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from geomcache.geometry import OUTPUTS, Geometry
from geomcache.statistics import Moments

GEOMETRY_ATTENTION = ("full", "isolated")

# Values are rounded to float16, whose steps are up to 2^-10 of the value. A channel that varies by less than a step of
# its mean (a lone camera's rays, an origin that is always zero) holds rounding noise; dividing by its deviation would
# show that noise to the policy at full size.
RELATIVE_STD_FLOOR = 2.0**-10
ABSOLUTE_STD_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class GeometryTokens:
    """What is appended to Pi0.5's prefix."""

    embs: Tensor  # [B, n, D]
    pad_masks: Tensor  # [B, n] bool, all true
    att_masks: Tensor  # [B, n] bool; LeRobot's meaning: true opens a block that earlier tokens do not see


class GeometryTokenAdapter(nn.Module):
    """Standardise, resample, project and scale geometry; see the top of this file for the order of work.

    Attributes:
        alpha: [1], the learned scale of all tokens.
        view_embedding: [V, D], added to each view's tokens after scaling, zero at the start; None unless asked for.
        mean: [C] float32, of each channel in the cache.
        std: [C] float32, population standard deviation, at least 2^-10 of the mean's size and at least 1e-4.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        statistics: Mapping[str, Moments],
        views: int,
        width: int,
        target_hw: tuple[int, int],
        init_alpha: float,
        attention: str,
        modality_embedding: bool,
    ) -> None:
        """Build it with a fresh projection.

        Args:
            statistics: of each cached output, in the order of `OUTPUTS`; they also say which outputs there are.
            views: V.
            width: D, of the prefix.
            target_hw: (th, tw).
            init_alpha: alpha at the start.
            attention: of `GEOMETRY_ATTENTION`. ``full``: all prefix tokens see each other; ``isolated``: image and text
                do not see geometry.
            modality_embedding: learn an embedding for each view.
        """
        super().__init__()
        self.outputs = tuple(statistics)
        self.views = views
        self.target_hw = target_hw
        self.attention = attention
        mean = torch.tensor([value for moments in statistics.values() for value in moments.mean], dtype=torch.float64)
        std = torch.tensor([value for moments in statistics.values() for value in moments.std], dtype=torch.float64)
        std = torch.maximum(std, (RELATIVE_STD_FLOOR * mean.abs()).clamp(min=ABSOLUTE_STD_FLOOR))
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.projection = nn.Linear(len(mean), width)
        self.alpha = nn.Parameter(torch.tensor([init_alpha]))
        self.view_embedding = nn.Parameter(torch.zeros(views, width)) if modality_embedding else None

    def forward(self, geometry: Geometry) -> GeometryTokens:
        """Tokens of a batch.

        Args:
            geometry: torch, the outputs and views that the adapter was built for, any floating dtype and grid. It is
                computed in float32 up to the projection, which works in the dtype of its weights (or of autocast).
        """
        maps = self.resampled(geometry).to(self.projection.weight.dtype)  # [B, V, th*tw, C]
        tokens = self.alpha * self.projection(maps)  # [B, V, th*tw, D]
        if self.view_embedding is not None:
            tokens = tokens + self.view_embedding[:, None]
        embs = tokens.flatten(1, 2)  # [B, n, D]
        pad_masks = torch.ones(embs.shape[:2], dtype=torch.bool, device=embs.device)
        att_masks = torch.zeros_like(pad_masks)
        att_masks[:, 0] = self.attention == "isolated"
        return GeometryTokens(embs=embs, pad_masks=pad_masks, att_masks=att_masks)

    def resampled(self, geometry: Geometry) -> Tensor:
        """Standardised channels on the target grid, [B, V, th*tw, C] float32."""
        channels = []
        for name, values in geometry.items():
            shaped = values.float().reshape(*values.shape[:4], -1)  # [B, V, h, w, channels of this output]
            channels.append(shaped.log() if OUTPUTS[name].log else shaped)
        maps = torch.cat(channels, dim=-1)
        batch, views = maps.shape[:2]
        assert tuple(name for name, _ in geometry.items()) == self.outputs
        assert views == self.views
        maps = ((maps - self.mean) / self.std).flatten(0, 1).permute(0, 3, 1, 2)  # [B*V, C, h, w]
        # Antialiasing averages over the covered cells when shrinking; it is plain bilinear when enlarging.
        maps = F.interpolate(maps, size=self.target_hw, mode="bilinear", align_corners=False, antialias=True)
        return maps.flatten(2).transpose(1, 2).reshape(batch, views, -1, len(self.mean))
