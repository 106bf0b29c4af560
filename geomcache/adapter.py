"""Turn geometry into prefix tokens: the only trained part that geomcache adds to Pi0.5.

Legend of shapes:  B batch   V views   h, w cached grid   th, tw target grid   n = V*th*tw tokens   C channels   D width

    Geometry [B, V, h, w, ...] -> log of confidences -> (x - mean) / std of each channel -> resampled to [th, tw]
    -> flattened, views in order -> Linear C -> D -> times alpha -> tokens [B, n, D]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from geomcache.geometry import OUTPUTS, Geometry
from geomcache.statistics import Moments

GEOMETRY_ATTENTION = ("full", "isolated")
STATISTICS = ("mean", "std")  # what the state dict carries next to the parameters

# Values are rounded to float16, whose steps are up to 2^-10 of the value. A channel that varies by less than a step of
# its mean (a lone camera's rays, an origin that is always zero) holds rounding noise; dividing by its deviation would
# show that noise to the policy at full size.
RELATIVE_STD_FLOOR = 2.0**-10
ABSOLUTE_STD_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class GeometryTokens:
    """Tokens to append to Pi0.5's prefix, with their masks."""

    embs: Tensor  # [B, n, D]
    pad_masks: Tensor  # [B, n] bool, false for cells without a value
    att_masks: Tensor  # [B, n] bool; LeRobot's meaning: true opens a block that earlier tokens do not see


class GeometryTokenAdapter(nn.Module):
    """Module that standardises, resamples, projects and scales geometry; the top of this file has the order of work.

    The statistics are part of the state dict and yet no buffers: FSDP's mixed precision and `.to(dtype)` cast buffers,
    and bfloat16 moves the mean of a channel that varies little by as much as its deviation.

    Attributes:
        alpha: [1], the learned scale of all tokens.
        view_embedding: [V, D], added to each view's tokens after scaling, zero at the start; None unless asked for.
        mean: [C] float32 on the CPU, mean of each channel in the cache.
        std: [C] float32 on the CPU, population standard deviation, at least 2^-10 of the mean's size and at least 1e-4.
    """

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
        """Build the adapter with a fresh projection.

        Args:
            statistics: moments of each cached output, in the order of `OUTPUTS`; their names are the adapter's outputs.
            views: V, views a frame.
            width: D, width of the prefix.
            target_hw: (th, tw), token grid of each view.
            init_alpha: alpha at the start.
            attention: one of `GEOMETRY_ATTENTION`. ``full``: all prefix tokens see each other; ``isolated``: image and
                text do not see geometry.
            modality_embedding: learn an embedding for each view.
        """
        super().__init__()
        self.outputs = tuple(statistics)
        self.views = views
        self.target_hw = target_hw
        self.attention = attention
        self.mean, self.std = channel_statistics(statistics)
        self.projection = nn.Linear(len(self.mean), width)
        self.alpha = nn.Parameter(torch.tensor([init_alpha]))
        self.view_embedding = nn.Parameter(torch.zeros(views, width)) if modality_embedding else None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {f"{prefix}{name}": getattr(self, name).clone() for name in STATISTICS}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {name: state_dict[f"{prefix}{name}"] for name in STATISTICS if f"{prefix}{name}" in state_dict}
        missing_keys += [f"{prefix}{name}" for name in STATISTICS if strict and name not in own]
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for name, value in own.items():
            if value.shape != getattr(self, name).shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: copying a param with shape {list(value.shape)} from checkpoint,"
                    f" the shape in current model is {list(getattr(self, name).shape)}."
                )
            else:
                setattr(self, name, value.detach().to("cpu", torch.float32, copy=True))

    def forward(self, geometry: Geometry) -> GeometryTokens:
        """Return the tokens of a batch.

        Args:
            geometry: torch, the outputs and views that the adapter was built for, any floating dtype and grid. It is
                computed in float32 up to the projection, which works in the dtype of its weights (or of autocast).
        """
        maps, has_value = self._resampled(geometry)
        maps = maps.to(self.projection.weight.dtype)  # [B, V, th*tw, C]
        tokens = self.alpha * self.projection(maps)  # [B, V, th*tw, D]
        if self.view_embedding is not None:
            tokens = tokens + self.view_embedding[:, None]
        att_masks = torch.zeros_like(has_value)
        att_masks[:, 0] = self.attention == "isolated"
        return GeometryTokens(embs=tokens.flatten(1, 2), pad_masks=has_value, att_masks=att_masks)

    def resampled(self, geometry: Geometry) -> Tensor:
        """Return the standardised channels on the target grid, [B, V, th*tw, C] float32."""
        return self._resampled(geometry)[0]

    def _resampled(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Return the channels [B, V, th*tw, C], and which tokens have a value: most of their cells do, [B, n] bool."""
        maps = standardised(geometry, self.mean, self.std)
        batch, views = maps.shape[:2]
        assert tuple(name for name, _ in geometry.items()) == self.outputs
        assert views == self.views
        if geometry.valid is not None:
            maps = maps.masked_fill(~geometry.valid[..., None], 0.0)
        maps = self._resized(maps)
        tokens = maps.flatten(2).transpose(1, 2).reshape(batch, views, -1, len(self.mean))
        if geometry.valid is None:
            return tokens, torch.ones(batch, views * tokens.shape[2], dtype=torch.bool, device=tokens.device)
        share = self._resized(geometry.valid[..., None].float()).reshape(batch, views, -1)  # of cells with a value
        # Where all cells have a value, the numbers stay those of a batch without a mask, to the bit.
        return tokens / torch.where(share > 1 - 1e-6, 1.0, share.clamp(min=1e-6))[..., None], (share > 0.5).flatten(1)

    def _resized(self, maps: Tensor) -> Tensor:
        """Resample maps [B, V, h, w, C] to [B*V, C, th, tw]."""
        channels_first = maps.flatten(0, 1).permute(0, 3, 1, 2)
        # Antialiasing averages over the covered cells when shrinking; it is plain bilinear when enlarging.
        return F.interpolate(channels_first, size=self.target_hw, mode="bilinear", align_corners=False, antialias=True)


def channel_statistics(statistics: Mapping[str, Moments]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [C] float32 of the outputs' channels, the deviation with its floors."""
    mean = torch.tensor([value for moments in statistics.values() for value in moments.mean], dtype=torch.float64)
    std = torch.tensor([value for moments in statistics.values() for value in moments.std], dtype=torch.float64)
    std = torch.maximum(std, (RELATIVE_STD_FLOOR * mean.abs()).clamp(min=ABSOLUTE_STD_FLOOR))
    return mean.float(), std.float()


def standardised(geometry: Geometry, mean: Tensor, std: Tensor) -> Tensor:
    """Return the channels of all outputs, [B, V, h, w, C] float32: logarithms of confidences, then (x - mean) / std."""
    channels = []
    for name, values in geometry.items():
        shaped = values.float().reshape(*values.shape[:4], -1)  # [B, V, h, w, channels of this output]
        channels.append(shaped.log() if OUTPUTS[name].log else shaped)
    maps = torch.cat(channels, dim=-1)
    mean, std = (constant.to(maps.device, non_blocking=True) for constant in (mean, std))
    return (maps - mean) / std
