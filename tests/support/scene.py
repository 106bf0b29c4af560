"""A cache whose geometry is known: two pinhole cameras, one of them moving, before a wall. Its dataset beside it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.datasets import LeRobotDatasetMetadata
from numpy.typing import NDArray

from geomcache.frames.signature import sign_pictures
from geomcache.frames.source import describe_dataset, episode_identities
from geomcache.geometry import Camera
from tests.support.datasets import make_dataset
from tests.support.stores import claim_rows, make_spec, open_writer

KEYS = ("observation.images.image", "observation.images.image2")
SIZE = 64  # of the pictures
GRID = (8, 8)
LENGTHS = (7, 5)
WALL = 2.0  # z of every point
FOCAL = (1.25, 1.5)  # in halves of the picture's sides
OUTPUTS = ("ray", "ray_conf", "depth", "depth_conf")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where things are, and what is in them."""

    cache: Path
    root: Path
    pictures: dict[str, NDArray[np.uint8]]  # [N, H, W, 3] by camera

    @staticmethod
    def rotation(view: int, row: int) -> NDArray[np.float64]:
        """[3, 3] from camera to world: the second camera turns about the vertical."""
        angle = 0.05 * row * view
        return np.array([(np.cos(angle), 0, np.sin(angle)), (0, 1, 0), (-np.sin(angle), 0, np.cos(angle))])

    @staticmethod
    def origin(view: int, row: int) -> NDArray[np.float64]:
        """[3]: the second camera moves."""
        return view * np.array([0.125 * row, 0.25, -0.0625 * row])

    @staticmethod
    def confidence(view: int, row: int) -> float:
        """Mean of its ray_conf; the second camera's falls with the row."""
        return 3.0 if view == 0 else 2.0 - 0.0625 * row


def scene_maps(view: int, row: int) -> dict[str, NDArray[np.float16]]:
    """Rays of a pinhole, directions as long as the camera's own z says; depth to the wall; confidence by column."""
    height, width = GRID
    x, y = (2 * np.arange(width) + 1) / width - 1, (2 * np.arange(height) + 1) / height - 1
    grid = np.stack([*np.meshgrid(x / FOCAL[0], y / FOCAL[1]), np.ones(GRID)], axis=-1)
    directions = grid @ Scene.rotation(view, row).T
    origin = Scene.origin(view, row)
    ray = np.concatenate([directions, np.broadcast_to(origin, directions.shape)], axis=-1)
    confidence = Scene.confidence(view, row) + 0.25 * np.sign(x) * np.ones(GRID)
    maps = {
        "ray": ray,
        "ray_conf": confidence,
        "depth": (WALL - origin[2]) / directions[..., 2],
        "depth_conf": np.full(GRID, 1.5),
    }
    return {name: values.astype(np.float16) for name, values in maps.items()}


def make_scene(
    folder: Path,
    *,
    outputs: tuple[str, ...] = OUTPUTS,
    wanted: list[tuple[int, int]] | None = None,
    views: str = "joint",
    like: Scene | None = None,
) -> Scene:
    """Write dataset and cache; `wanted` are ranges of rows. The dataset is that of another scene where one is given."""
    root = folder / "dataset" if like is None else like.root
    pictures = make_dataset(root, LENGTHS, dict.fromkeys(KEYS, (SIZE, SIZE))) if like is None else like.pictures
    meta = LeRobotDatasetMetadata("geomcache/test", root=root)
    cameras = tuple(Camera(key=key, height=SIZE, width=SIZE) for key in KEYS)
    spec = make_spec(grid_hw=GRID, outputs=outputs, cameras=KEYS, views=views)
    spec = type(spec).from_dict({**spec.to_dict(), "cameras": [vars(camera) for camera in cameras]})
    path = folder / "scene.zarr"
    dataset, identities = describe_dataset(meta, KEYS), episode_identities(meta, KEYS)
    signatures = sign_pictures([pictures[key] for key in KEYS])
    with open_writer(path, wanted, spec=spec, lengths=LENGTHS, dataset=dataset, identities=identities) as writer:
        while (claim := writer.claim()) is not None:
            rows = claim_rows(claim)
            made = {key: [scene_maps(view, row) for row in rows] for view, key in enumerate(KEYS)}
            writer.commit(
                claim,
                {key: {name: np.stack([maps[name] for maps in made[key]]) for name in outputs} for key in KEYS},
                signatures[rows],
            )
        assert writer.seal()
    return Scene(cache=path, root=root, pictures=pictures)
