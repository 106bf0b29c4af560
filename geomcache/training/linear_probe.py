"""A linear probe: how much of a quantity's change over time can be read off hidden states by one matrix.

Legend of shapes:  B batch   T places (image tokens of all views)   D width   C channels

Everything is measured from the mean of its own place over the fitted frames: that a ray depends on where in the picture
it is, and on the camera, is known without looking, and does not count.
"""

import torch
from torch import Tensor


class LinearProbe:
    """Ridge regression from hidden states [B, T, D] to targets [B, T, C], fitted and measured batch by batch.

    The normal equations are summed in float64, so that memory does not grow with the frames.
    """

    def __init__(self, places: int, width: int, channels: int, *, ridge: float = 1e-3) -> None:
        """Start without frames.

        Args:
            places: T.
            width: D.
            channels: C.
            ridge: penalty of the weights' squares, as a share of the hidden states' mean variance.
        """
        self._ridge = ridge
        self._frames = 0
        self._sum_x = torch.zeros(places, width, dtype=torch.float64)
        self._sum_y = torch.zeros(places, channels, dtype=torch.float64)
        self._xx = torch.zeros(width, width, dtype=torch.float64)
        self._xy = torch.zeros(width, channels, dtype=torch.float64)
        self._error = torch.zeros(channels, dtype=torch.float64)
        self._change = torch.zeros(channels, dtype=torch.float64)
        self._measured = 0

    def fit(self, hidden: Tensor, target: Tensor) -> None:
        """Add frames to those that the matrix is fitted to."""
        hidden, target = hidden.double(), target.double()
        flat = hidden.flatten(0, 1)
        self._frames += len(hidden)
        self._sum_x += hidden.sum(0)
        self._sum_y += target.sum(0)
        self._xx += flat.T @ flat
        self._xy += flat.T @ target.flatten(0, 1)

    def solve(self) -> None:
        """Compute the matrix [D, C], from what was added."""
        covariance = self._xx - self._sum_x.T @ self._sum_x / self._frames
        penalty = self._ridge * covariance.diagonal().mean().clamp(min=1e-30)
        penalised = covariance + penalty * torch.eye(len(covariance), dtype=torch.float64)
        self._weights = torch.linalg.solve(penalised, self._xy - self._sum_x.T @ self._sum_y / self._frames)

    def measure(self, hidden: Tensor, target: Tensor) -> None:
        """Add held-out frames to those that the matrix is measured by."""
        change = target.double() - self._sum_y / self._frames
        error = change - (hidden.double() - self._sum_x / self._frames) @ self._weights
        self._error += error.square().sum((0, 1))
        self._change += change.square().sum((0, 1))
        self._measured += change.shape[0] * change.shape[1]

    def r2(self, channels: slice) -> float | None:
        """Return the share of the channels' change that was read off; None where they do not change.

        Targets have unit variance over all of a cache. A change below 1e-6 of it is rounding.
        """
        change = float(self._change[channels].sum())
        if change < 1e-6 * self._measured:
            return None
        return 1 - float(self._error[channels].sum()) / change
