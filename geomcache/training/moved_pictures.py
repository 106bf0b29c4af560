"""Augmentation that moves pixels, with the cached geometry moved along.

    picture ─┬─ LeRobot's image transforms ──► moved picture
             └─ four points, by the same draws ──► where they went ──► homography ──► moved maps

A ray belongs to its pixel: its value stays, and its place changes. The transforms that are accepted here map straight
lines to straight lines, so four points tell the whole movement. Cells of the moved picture that come from outside of
the picture are marked in ``observation.geometry.valid``.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from torchvision.tv_tensors import KeyPoints

from geomcache.geometry import VALID, batch_key

# Transforms of torchvision.transforms.v2 that move straight lines to straight lines.
PIXELS_MOVE = frozenset(
    {"CenterCrop", "RandomAffine", "RandomCrop", "RandomPerspective", "RandomResizedCrop", "RandomRotation"}
)
# They scale the whole picture: in shares of its sides nothing moves, but later transforms count in the new pixels.
PIXELS_SCALE = frozenset({"RandomResize", "RandomShortestSize", "Resize", "ScaleJitter"})
STILL = 1e-6  # a movement by less of the picture's sides is rounding
_NOT_MOVED = torch.eye(3, dtype=torch.float64)
_PLACES = np.array([[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]])  # of four points, in shares of the sides


class _PictureOnly:
    """A transform that leaves points alone: some of LeRobot's would take them for pixels."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, picture: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(picture), points


class MovingTransforms:
    """LeRobot's `ImageTransforms`, that also tell where a picture's pixels went.

    The same random numbers are drawn in the same order: a picture is LeRobot's own, to the bit.
    """

    def __init__(self, transforms: Any) -> None:
        """Take over an `ImageTransforms` with at least one transform that moves pixels."""
        self._subset = transforms.tf  # LeRobot's RandomSubsetApply
        self._subset.transforms = [
            each if type(each).__name__ in PIXELS_MOVE | PIXELS_SCALE else _PictureOnly(each)
            for each in self._subset.transforms
        ]

    def __call__(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Transform a picture.

        Args:
            picture: [..., 3, H, W].

        Returns:
            The picture [..., 3, H', W'], and the homography [3, 3] float64 from its places (x, y, 1), in shares of its
            width and height, to the places that they came from.
        """
        height, width = picture.shape[-2:]
        points = KeyPoints(_in_pixels(width, height).clone(), canvas_size=(height, width))
        moved, points = self._subset(picture, points)
        places = points.as_subclass(Tensor).numpy() / (moved.shape[-1], moved.shape[-2])
        return moved, homography(places, _PLACES)


def moving_transforms(transforms: Any) -> MovingTransforms | None:
    """Return LeRobot's `ImageTransforms` as `MovingTransforms` where it has one that moves pixels; otherwise None."""
    chosen = getattr(getattr(transforms, "tf", None), "transforms", ())
    moves = any(type(each).__name__ in PIXELS_MOVE for each in chosen)
    return MovingTransforms(transforms) if moves else None


def homography(points: NDArray[np.float64], images: NDArray[np.float64]) -> Tensor:
    """Return the matrix [3, 3] float64 that maps four points (x, y, 1) to their images, up to a factor.

    The equations are those of Hartley and Zisserman, "Multiple View Geometry in Computer Vision", section 4.1.2, with
    the last entry fixed to 1. Points that have hardly moved give the identity.

    Args:
        points: [4, 2], no three on a line.
        images: [4, 2].
    """
    if np.abs(points - images).max() < STILL:
        return _NOT_MOVED
    x, y = points.T
    equations = np.zeros((4, 2, 8))  # NumPy solves so few in a third of torch's time, and this is done for each picture
    equations[:, 0, 0], equations[:, 0, 1], equations[:, 0, 2] = x, y, 1
    equations[:, 1, 3], equations[:, 1, 4], equations[:, 1, 5] = x, y, 1
    equations[..., 6], equations[..., 7] = -images * x[:, None], -images * y[:, None]
    entries = np.linalg.solve(equations.reshape(8, 8), images.reshape(8))
    return torch.from_numpy(np.append(entries, 1.0).reshape(3, 3))


def move_maps(maps: Mapping[str, Tensor], homographies: Sequence[Tensor]) -> dict[str, Tensor]:
    """Move a frame's maps as its pictures were moved.

    The value of a cell is interpolated linearly at the place that its center came from. The maps of a view that was not
    moved stay equal to the bit.

    Args:
        maps: by batch key, [V, h, w, ...] float16.
        homographies: for each view, from places in the moved picture to places in the picture as stored.

    Returns:
        The maps, and ``observation.geometry.valid`` [V, h, w] bool.
    """
    views, height, width = next(iter(maps.values())).shape[:3]
    moved = {key: values.clone() for key, values in maps.items()}
    valid = torch.ones(views, height, width, dtype=torch.bool)
    moving = [view for view, matrix in enumerate(homographies) if not torch.equal(matrix, _NOT_MOVED)]
    if not moving:
        return moved | {batch_key(VALID): valid}
    matrices = torch.stack([homographies[view] for view in moving])[:, None]  # [m, 1, 3, 3]
    sources = _cell_centers(height, width) @ matrices.mT  # [m, h, w, 3]
    places = sources[..., :2] / sources[..., 2:]
    valid[moving] = ((places >= 0) & (places <= 1)).all(-1) & (sources[..., 2] > 0)
    grid = (2 * places - 1).float().nan_to_num(2.0).clamp(-2, 2)
    # All maps of all moved views in one call: of small maps, calls are what costs.
    flat = [values[moving].float().reshape(len(moving), height, width, -1) for values in maps.values()]
    channels = torch.cat(flat, dim=-1).permute(0, 3, 1, 2)
    sampled = F.grid_sample(channels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    parts = torch.split(sampled.permute(0, 2, 3, 1), [part.shape[-1] for part in flat], dim=-1)
    for values, part in zip(moved.values(), parts, strict=True):
        values[moving] = part.reshape(len(moving), *values.shape[1:]).to(values.dtype)
    return moved | {batch_key(VALID): valid}


@functools.cache
def _in_pixels(width: int, height: int) -> Tensor:
    """Return the four points in a picture, float64 [4, 2]."""
    return torch.from_numpy(_PLACES * (width, height))


@functools.cache
def _cell_centers(height: int, width: int) -> Tensor:
    """Return the places (x, y, 1) of cells' centers, in shares of the picture's sides, float64 [h, w, 3]."""
    x, y = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells for cells in (width, height))
    return torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(height, width, dtype=torch.float64)], -1)
