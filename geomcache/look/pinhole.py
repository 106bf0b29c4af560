"""The camera that a ray map describes: its position, its orientation and its field of view.

Legend of shapes:  h, w grid   n = h * w cells

Depth Anything 3 (Lin et al., "Depth Anything 3: Recovering the Visual Space from Any Views", arXiv:2511.10647, the
section on the depth-ray representation) gives each cell a direction d and an origin t, in the first view's coordinates
(x right, y down, z ahead). A point at depth D is t + D d: d is not normalised, so D is depth along the optical axis.
For a pinhole camera d = R K^-1 p, with p = (x, y, 1) the position in the picture, R the rotation from camera to world,
and K upper triangular. Hence the fit: origin, the mean of t weighted by confidence; A = R K^-1, linear least squares of
d over p with the same weights; R and K from A's QR decomposition with a positive diagonal. x and y run from -1 to 1
over the picture. Upstream's own fit (`camray_to_caminfo` in depth_anything_3/utils/ray_utils.py) also searches for
outliers, and decomposes A as R times a lower triangle, the same if the optical axis meets the picture's centre.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import GeometryError


@dataclass(frozen=True, kw_only=True)
class Pinhole:
    """A camera, as far as a ray map describes it."""

    origin: NDArray[np.float64]  # [3] in world coordinates
    rotation: NDArray[np.float64]  # [3, 3] from camera to world
    intrinsics: NDArray[np.float64]  # [3, 3] K, in halves of the picture's sides
    residual: float
    """Root mean square of what the fit leaves of the directions, over that of the directions."""

    def pixel_intrinsics(self, height: int, width: int) -> NDArray[np.float64]:
        """Return K in pixels; (0, 0) is the upper left corner of a picture of this size."""
        to_pixels = np.array([[width / 2, 0.0, width / 2], [0.0, height / 2, height / 2], [0.0, 0.0, 1.0]])
        pixels: NDArray[np.float64] = to_pixels @ self.intrinsics
        return pixels

    @property
    def fields_of_view(self) -> tuple[float, float]:
        """Horizontal and vertical field of view in degrees, through the optical axis."""
        focal, centre = np.diag(self.intrinsics)[:2], self.intrinsics[:2, 2]
        horizontal, vertical = np.degrees(np.arctan((1 - centre) / focal) + np.arctan((1 + centre) / focal))
        return float(horizontal), float(vertical)


def mean_origin(ray: NDArray[Any], confidence: NDArray[Any] | None) -> NDArray[np.float64]:
    """Return the mean origin [..., 3] of rays [..., h, w, 6], weighted by `confidence` [..., h, w] if it is given."""
    origins = ray[..., 3:].astype(np.float64)
    weights = np.ones(ray.shape[:-1]) if confidence is None else confidence.astype(np.float64)
    total = (origins * weights[..., None]).sum(axis=(-3, -2))
    means: NDArray[np.float64] = total / weights.sum(axis=(-2, -1))[..., None]
    return means


def fit_pinhole(ray: NDArray[Any], confidence: NDArray[Any] | None) -> Pinhole:
    """Fit a camera to one view's rays [h, w, 6] and their confidence [h, w].

    Raises:
        GeometryError: no camera has these directions: they lie in a plane, or show the world mirrored.
    """
    places = cell_places(*ray.shape[:2]).reshape(-1, 3)  # [n, 3]
    directions = ray[..., :3].reshape(-1, 3).astype(np.float64)  # [n, 3]
    weights = np.ones(len(places)) if confidence is None else confidence.reshape(-1).astype(np.float64)
    root = np.sqrt(weights / weights.sum())[:, None]
    transposed = np.linalg.lstsq(root * places, root * directions, rcond=None)[0]
    rotation, upper = np.linalg.qr(transposed.T)
    signs = np.where(np.diag(upper) < 0, -1.0, 1.0)
    rotation, upper = rotation * signs, signs[:, None] * upper
    diagonal = np.diag(upper)
    if diagonal.min() < 1e-6 * max(diagonal.max(), 1e-6):
        raise GeometryError("ray directions: expected a pinhole camera's, found all in one plane")
    if np.linalg.det(rotation) < 0:
        raise GeometryError("ray directions: expected a pinhole camera's, found a mirrored world")
    left = root * (directions - places @ transposed)
    residual = float(np.linalg.norm(left) / np.linalg.norm(root * directions))
    intrinsics = np.linalg.inv(upper / upper[2, 2])
    return Pinhole(origin=mean_origin(ray, confidence), rotation=rotation, intrinsics=intrinsics, residual=residual)


def cell_places(height: int, width: int) -> NDArray[np.float64]:
    """Return the cells' centres as homogeneous coordinates [h, w, 3]: x and y from -1 to 1 over the picture, and 1."""
    x = (2 * np.arange(width) + 1) / width - 1
    y = (2 * np.arange(height) + 1) / height - 1
    return np.stack([*np.meshgrid(x, y), np.ones((height, width))], axis=-1)
