"""Checks of the encoder: its images, its options and installation before it is built, and its numbers."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomcache.errors import CacheMismatchError, GeometryError, NonFiniteGeometryError, UserInputError
from geomcache.geometry import FEATURE, PATCH_SIZE, RAYS_PER_PATCH, Camera, GeometrySpec, parse_grid

Images = NDArray[np.uint8] | Tensor | Sequence[NDArray[np.uint8] | Tensor]
"""uint8 [B, V, H, W, 3], or V of [B, H_v, W_v, 3] for cameras of different sizes."""


def check_images(images: Images, cameras: tuple[Camera, ...]) -> list[NDArray[np.uint8]]:
    """Return the images as V arrays uint8 [B, H_v, W_v, 3].

    Raises:
        GeometryError: shapes, dtype or number of views are not those of the cameras.
    """
    if isinstance(images, np.ndarray | Tensor):
        if images.ndim != 5:
            raise GeometryError(f"images: expected [B, V, H, W, 3], got shape {list(images.shape)}")
        images = [images[:, view] for view in range(images.shape[1])]
    if len(images) != len(cameras):
        raise GeometryError(
            f"images: expected {len(cameras)} views ({', '.join(camera.key for camera in cameras)}), got {len(images)}"
        )
    views = [np.asarray(view.cpu()) if isinstance(view, Tensor) else view for view in images]
    for view, camera in zip(views, cameras, strict=True):
        expected = [len(views[0]), camera.height, camera.width, 3]
        if view.dtype != np.uint8 or list(view.shape) != expected or expected[0] == 0:
            raise GeometryError(
                f"images of {camera.key}: expected uint8 {expected}, at least one frame,"
                f" got {view.dtype} {list(view.shape)}"
            )
    return views


def check_device(device: str | torch.device | None) -> torch.device:
    """Return the device of this name; for None, CUDA if there is one, otherwise the CPU.

    Raises:
        UserInputError: this machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        checked = torch.device(device)
    except RuntimeError:
        raise UserInputError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    count = torch.cuda.device_count()
    if checked.type == "cuda" and (checked.index or 0) >= count:
        raise UserInputError(f"device: expected one that is here, got {checked}: torch sees {count} CUDA devices")
    if checked.type not in ("cpu", "cuda"):
        raise UserInputError(f"device: expected cpu, cuda or cuda:N, got {checked}")
    return checked


def choose_grid_hw(spec: GeometrySpec, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return the cells (h, w) of the spec's grid.

    Args:
        spec: grid, views and cameras.
        sizes: of each view as the network sees it, (H, W) pixels.

    Raises:
        UserInputError: the views have no common grid, or fewer cells.
    """
    shown = ", ".join(f"{camera.key} {h}x{w}" for camera, (h, w) in zip(spec.cameras, sizes, strict=True))
    if spec.views == "joint" and len(set(sizes)) > 1:
        raise UserInputError(
            f"views: joint views need one size, at process-res {spec.process_res} they have {shown}:"
            " choose --cameras of one shape, or --views independent --grid HxW"
        )
    wanted = parse_grid(spec.grid)
    if FEATURE in spec.outputs:
        check_feature_grid(spec.grid, sizes)
    cells = RAYS_PER_PATCH if wanted or spec.grid == "native" else 1
    grids = [(height // PATCH_SIZE * cells, width // PATCH_SIZE * cells) for height, width in sizes]
    if wanted is None:
        if len(set(grids)) > 1:
            raise UserInputError(
                f"grid: {spec.grid} is not the same for all views, at process-res {spec.process_res} they have {shown}:"
                " choose one grid for all, such as --grid 14x14"
            )
        return grids[0]
    for camera, native in zip(spec.cameras, grids, strict=True):
        if wanted[0] > native[0] or wanted[1] > native[1]:
            raise UserInputError(
                f"grid: expected at most the native {native[0]}x{native[1]} of {camera.key} at process-res"
                f" {spec.process_res}, got {spec.grid}: choose a smaller grid or raise --process-res"
            )
    return wanted


def check_feature_grid(grid: str, sizes: tuple[tuple[int, int], ...]) -> None:
    """Refuse a grid that is finer than the patches, each of which has one feature.

    Raises:
        UserInputError: it is.
    """
    wanted = parse_grid(grid)
    patches = [(height // PATCH_SIZE, width // PATCH_SIZE) for height, width in sizes]
    if grid == "native" or (wanted and any(wanted[0] > rows or wanted[1] > columns for rows, columns in patches)):
        most = "x".join(map(str, min(patches)))
        raise UserInputError(
            f"grid: expected at most {most} with the output {FEATURE!r}, which has one value a patch, got {grid}:"
            " choose a coarser grid, or raise --process-res"
        )


def check_same(spec: GeometrySpec, **installed: object) -> None:
    """Compare fields of a spec with what this installation gives.

    Raises:
        CacheMismatchError: one differs.
    """
    for name, value in installed.items():
        cached = getattr(spec, name)
        if cached != value:
            raise CacheMismatchError(
                f"spec.{name}: expected {cached!r}, which the cache was made with, found {value!r} here:"
                " install or give what made the cache, or extract again",
                f"spec.{name}",
                cached,
                value,
            )


def raise_nan(nan: Tensor, outputs: list[str], camera_keys: tuple[str, ...]) -> None:
    """Raise an error that names the maps with a NaN, if there are any.

    Args:
        nan: bool [B, V, outputs].
        outputs: their names.
        camera_keys: of the views.

    Raises:
        NonFiniteGeometryError: a map has a NaN.
    """
    places = tuple((frame, view, outputs[output]) for frame, view, output in nan.nonzero().tolist())
    if not places:
        return
    frame, view, name = places[0]
    more = f" and {len(places) - 1} more maps" if len(places) > 1 else ""
    raise NonFiniteGeometryError(
        f"encoder: expected numbers, got NaN for frame {frame} of the batch, {camera_keys[view]},"
        f" {name}{more}: look at the frame and the weights, or try --dtype fp32",
        places,
    )
