"""True geometry of a simulator's cameras in DA3's convention: the source `oracle:mujoco` of a cache or an observation.

Nothing here is estimated. A cell's direction is R K^-1 (x, y, 1), not normalised; its point is origin + depth *
direction, all in the coordinates of the first view (x right, y down, z ahead). Lengths are in metres; DA3's scale is
arbitrary. There is no confidence.

LeRobot's LIBERO pictures are mirrored left to right: robosuite's are upside down, and LeRobot flips both axes. The maps
are those of the mirrored world, which is what a network sees in these pictures.

Legend of shapes:  V views   h, w grid   H, W picture
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import UserInputError
from geomcache.geometry import FLOAT16_MAX, ORACLE, OUTPUTS, Camera, GeometrySpec, parse_grid, parse_outputs

MIRROR = np.diag([-1.0, 1.0, 1.0])
ORACLE_OUTPUTS = ("ray", "depth")


@dataclass(frozen=True, kw_only=True)
class OracleOptions:
    """Which maps are made."""

    outputs: tuple[str, ...]
    grid_hw: tuple[int, int]

    @classmethod
    def parse(cls, outputs: str, grid: str) -> "OracleOptions":
        """Read options such as ``ray,depth`` and ``14x14``.

        Raises:
            UserInputError: an output has no truth, or the grid is not HxW.
        """
        names = parse_outputs(outputs.split(","))
        for name in names:
            if name not in ORACLE_OUTPUTS:
                raise UserInputError(
                    f"oracle outputs: expected {' or '.join(map(repr, ORACLE_OUTPUTS))}, got {name!r}, which only a"
                    " network has: leave it out"
                )
        grid_hw = parse_grid(grid)
        if grid_hw is None:
            raise UserInputError(f"oracle grid: expected HxW such as 14x14, got {grid!r}")
        return cls(outputs=names, grid_hw=grid_hw)


@dataclass(frozen=True, kw_only=True)
class View:
    """Where a camera is, and what it covers, in the mirrored world and the first view's coordinates."""

    rotation: NDArray[np.float64]  # [3, 3] from the camera to the first view
    origin: NDArray[np.float64]  # [3] metres
    tangents: NDArray[np.float64]  # [2] of half the fields of view, across and down

    def rays(self, grid_hw: tuple[int, int]) -> NDArray[np.float64]:
        """Return direction and origin of each cell's centre, [h, w, 6]."""
        places = [(np.arange(cells) + 0.5) / cells * 2 - 1 for cells in grid_hw[::-1]]
        x, y = np.meshgrid(*(place * tangent for place, tangent in zip(places, self.tangents, strict=True)))
        directions = np.stack([x, y, np.ones_like(x)], axis=-1) @ self.rotation.T
        return np.concatenate([directions, np.broadcast_to(self.origin, directions.shape)], axis=-1)

    def project(self, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return where points [n, 3] are in the picture, [n, 2] (across, down) from -1 to 1, and their depth [n]."""
        local = (points - self.origin) @ self.rotation
        return local[:, :2] / local[:, 2:] / self.tangents, local[:, 2]


def camera_pose(simulation: Any, name: str) -> NDArray[np.float64]:
    """Return a camera's pose [4, 4] in the world, x right, y down, z ahead. MuJoCo's cameras look along -z."""
    camera = simulation.model.camera_name2id(name)
    pose = np.eye(4)
    pose[:3, :3] = simulation.data.cam_xmat[camera].reshape(3, 3) * [1, -1, -1]
    pose[:3, 3] = simulation.data.cam_xpos[camera]
    return pose


def views_of(simulation: Any, names: Sequence[str], *, aspect: float = 1.0) -> list[View]:
    """Return the views of MuJoCo's cameras, the first of which gives the coordinates; `aspect` is width / height."""
    to_first = np.linalg.inv(camera_pose(simulation, names[0]))
    views = []
    for name in names:
        relative = to_first @ camera_pose(simulation, name)
        fovy = simulation.model.cam_fovy[simulation.model.camera_name2id(name)]
        tangent = np.tan(np.radians(fovy) / 2)
        views.append(
            View(
                rotation=MIRROR @ relative[:3, :3] @ MIRROR,
                origin=MIRROR @ relative[:3, 3],
                tangents=np.array([aspect * tangent, tangent]),
            )
        )
    return views


def in_first_view(simulation: Any, first: str, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points of the world [n, 3] in the coordinates of the camera `first`, mirrored."""
    to_first = np.linalg.inv(camera_pose(simulation, first))
    local: NDArray[np.float64] = (points @ to_first[:3, :3].T + to_first[:3, 3]) @ MIRROR
    return local


def metres(simulation: Any, buffer: NDArray[Any]) -> NDArray[np.float64]:
    """Turn MuJoCo's depth buffer [H, W], upside down, into metres along the axis, [H, W] as LeRobot's pictures lie."""
    model = simulation.model
    near, far = (plane * model.stat.extent for plane in (model.vis.map.znear, model.vis.map.zfar))
    depth: NDArray[np.float64] = near / (1.0 - buffer.astype(np.float64) * (1.0 - near / far))
    return depth[::-1, ::-1]


def average(depth: NDArray[np.float64], grid_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Average a map [H, W] over the pixels under each cell, [h, w], as the encoder does with its native grid."""
    import torch

    values = torch.from_numpy(np.ascontiguousarray(depth))[None, None]
    averaged: NDArray[np.float64] = torch.nn.functional.adaptive_avg_pool2d(values, grid_hw)[0, 0].numpy()
    return averaged


def oracle_map(
    output: str,
    simulation: Any,
    names: Sequence[str],
    *,
    grid_hw: tuple[int, int],
    aspect: float,
    buffers: Mapping[str, NDArray[Any]],
) -> NDArray[np.float16]:
    """Return the maps of an output of the scene as it is now, float16 [V, h, w, ...], as a cache stores them.

    Args:
        output: ``ray`` or ``depth``.
        simulation: robosuite's `MjSim`.
        names: MuJoCo's cameras, in the order of the views.
        grid_hw: cells of each map.
        aspect: width / height of the pictures.
        buffers: MuJoCo's depth buffer [H, W] of each camera, as it renders it; only read for ``depth``.
    """
    if output == "ray":
        maps = [view.rays(grid_hw) for view in views_of(simulation, names, aspect=aspect)]
    else:
        maps = [average(metres(simulation, buffers[name]), grid_hw) for name in names]
    return np.clip(np.stack(maps), -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)


def map_shape(output: str, grid_hw: tuple[int, int], views: int) -> tuple[int, ...]:
    """Return the shape of what `oracle_map` returns."""
    return (views, *grid_hw, *OUTPUTS[output].trailing)


def oracle_spec(cameras: Sequence[Camera], options: OracleOptions) -> GeometrySpec:
    """Return the spec of a cache of true geometry. It has no weights: their hash is that of no bytes."""
    height, width = options.grid_hw
    return GeometrySpec(
        model_id=ORACLE,
        model_revision=None,
        model_name=ORACLE,
        weights_sha256=hashlib.sha256(b"").hexdigest(),
        da3_version="",
        views="joint",
        cameras=tuple(cameras),
        process_res=max(max(camera.height, camera.width) for camera in cameras),
        resize_method="none",
        grid=f"{height}x{width}",
        grid_hw=options.grid_hw,
        outputs=options.outputs,
        compute_dtype="fp32",
    )
