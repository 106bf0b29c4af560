"""The basis that DA3's features are projected by: the directions in which a sample of them is largest.

The features x [C] of all cells of a sample give the matrix of second moments E[x x'], without the mean taken away: what
is kept are inner products, and with them the cosines of the published loss. Of all orthonormal bases of D columns, its
first D eigenvectors lose least of the squared length, and of the matrix of all inner products (Eckart and Young, "The
approximation of one matrix by another of lower rank", 1936).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomcache.errors import UserInputError
from geomcache.geometry import MAX_FEATURE_DIM

DEFAULT_DIM = 128


class FeatureMoments:
    """The second moments of a sample of features, added up batch by batch in float64."""

    def __init__(self, width: int) -> None:
        """Start without features of so many numbers."""
        self.count = 0
        self._sum: Tensor = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features, float32 [n, width] on any device."""
        # Products of a batch's few thousand cells in float32; batches are added up in float64, which is slow on GPUs.
        self._sum += (features.T @ features).double().cpu()
        self.count += len(features)

    def basis(self, dim: int) -> NDArray[np.float32]:
        """Return the first `dim` eigenvectors, float32 [width, dim], those of the largest eigenvalues first.

        The largest entry of each is positive, so that the same moments give the same basis.

        Raises:
            UserInputError: there are not so many.
        """
        check_dim(dim, len(self._sum))
        vectors = torch.linalg.eigh(self._sum).eigenvectors.flip(1)[:, :dim]
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        basis: NDArray[np.float32] = (vectors * signs).float().contiguous().numpy()
        return basis

    def share_kept(self, basis: NDArray[np.float32]) -> float:
        """Return the share of the features' squared length that a basis keeps, 0 to 1."""
        columns = torch.from_numpy(basis).double()
        return float((columns * (self._sum @ columns)).sum() / self._sum.trace())


def unfitted_basis(width: int, dim: int) -> NDArray[np.float32]:
    """Return a basis that no features were looked at for, of the right size: for plans.

    Raises:
        UserInputError: there is none of so many columns.
    """
    check_dim(dim, width)
    return np.eye(width, dim, dtype=np.float32)


def check_dim(dim: int, width: int) -> None:
    """Refuse a number of columns that no basis has.

    Raises:
        UserInputError: it is below 1, or above the width of the features.
    """
    most = min(width, MAX_FEATURE_DIM)
    if not 1 <= dim <= most:
        raise UserInputError(
            f"feature-dim: expected 1 to {most}, of the {width} numbers that the backbone gives a patch, got {dim}"
        )
