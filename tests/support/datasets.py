"""Small LeRobotDatasets with known pictures, and where the real ones are."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "libero_object_demo"
MINI = ROOT.parent / "shared" / "libero_object_mini"

needs_mini = pytest.mark.skipif(not MINI.is_dir(), reason="../shared/libero_object_mini is not there")


def pictures(frames: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth pictures that differ from frame to frame, uint8 [frames, height, width, 3]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = generator.uniform(1, 9, size=(frames, 3, 2)), generator.uniform(0, 6, size=(frames, 3))
    values = np.sin(waves[0][..., 0, None, None] * y + waves[0][..., 1, None, None] * x + waves[1][..., None, None])
    return np.moveaxis(127.5 + 127.5 * values, 1, -1).astype(np.uint8)


def make_dataset(
    root: Path,
    lengths: tuple[int, ...] = (5, 4),
    cameras: dict[str, tuple[int, int]] | None = None,
    *,
    video: bool = False,
    fps: int = 10,
    state: int = 8,
    action: int = 7,
    seed: int = 0,
) -> dict[str, NDArray[np.uint8]]:
    """Write a LeRobotDataset with LeRobot's own recorder; give back each camera's pictures [N, H, W, 3]."""
    from lerobot.datasets import LeRobotDataset

    cameras = cameras or {"observation.images.image": (64, 64), "observation.images.image2": (64, 64)}
    features: dict[str, dict[str, object]] = {
        key: {
            "dtype": "video" if video else "image",
            "shape": (*size, 3),
            "names": ["height", "width", "channels"],
        }
        for key, size in cameras.items()
    }
    features["observation.state"] = {"dtype": "float32", "shape": (state,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (action,), "names": None}
    dataset = LeRobotDataset.create("geomcache/test", fps=fps, features=features, root=root, use_videos=video)
    images = {
        key: pictures(sum(lengths), *size, seed=seed + number) for number, (key, size) in enumerate(cameras.items())
    }
    generator = np.random.default_rng(seed)
    index = 0
    for length in lengths:
        for _ in range(length):
            dataset.add_frame(
                {
                    **{key: frames[index] for key, frames in images.items()},
                    "observation.state": generator.normal(size=state).astype(np.float32),
                    "action": generator.normal(size=action).astype(np.float32),
                    "task": "move",
                }
            )
            index += 1
        dataset.save_episode()
    dataset.finalize()
    return images
