"""Measure what it adds to a batch that maps move along with augmented pictures.

    python benchmarks/bench_augment.py [--batch-size 32] [--grid 36] [--feature-dim 0] [--drawn 3]

LeRobot's default transforms. It draws three of its six for each picture, so that RandomAffine moves every other one;
with `--drawn 6` it moves every picture, the dearest case.
Pictures are 256x256, two a frame, as in LIBERO. What LeRobot does without us, the pictures alone, is measured next to
it. What is added is the four points that are moved by the same draws, the homography, and the maps. The points are
measured with pictures of 16x16, whose own transforms take little: the points take the same. All of it is work of the
loader's processes, which go on while the trainer trains.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from lerobot.transforms import ImageTransforms, ImageTransformsConfig

from benchmarks.common import table
from geomcache.geometry import FEATURE, batch_key
from geomcache.training.moved_pictures import move_maps, moving_transforms

SIDE, TINY, VIEWS = 256, 16, 2
STEPS = {"batch 8": 0.7997, "batch 32": 2.3566}  # seconds on one H200 with 392 tokens: RESULTS.md, "A training step"


def transform(each: Any, pictures: torch.Tensor, seed: int) -> tuple[float, list[list[Any]]]:
    """Transform all views of all frames; return the seconds and what it made."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    made = [[each(picture) for picture in frame] for frame in pictures]
    return time.perf_counter() - began, made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--grid", type=int, default=36, help="cells a side (%(default)s)")
    parser.add_argument("--feature-dim", type=int, default=0, help="also maps of features of so many numbers")
    parser.add_argument("--drawn", type=int, default=3, help="transforms of each picture (%(default)s)")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    config = ImageTransformsConfig(enable=True, max_num_transforms=arguments.drawn)
    plain = ImageTransforms(config)
    moving = moving_transforms(copy.deepcopy(plain))
    assert moving is not None
    generator = torch.Generator().manual_seed(0)
    frames, grid = arguments.batch_size, arguments.grid
    pictures = torch.randint(0, 256, (frames, VIEWS, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    shapes = {"ray": (6,), "ray_conf": ()} | ({FEATURE: (arguments.feature_dim,)} if arguments.feature_dim else {})
    maps = {
        batch_key(name): torch.rand(VIEWS, grid, grid, *trailing, generator=generator).half()
        for name, trailing in shapes.items()
    }
    tiny = pictures[..., :TINY, :TINY].contiguous()
    times = []
    for number in range(arguments.repeats + 1):
        alone, _ = transform(plain, pictures, number)
        without_points, _ = transform(plain, tiny, number)
        with_points, made = transform(moving, tiny, number)
        moved = [[homography for _, homography in frame] for frame in made]
        began = time.perf_counter()
        for homographies in moved:
            move_maps(maps, homographies)
        times.append((alone, with_points - without_points, time.perf_counter() - began))
    pictures_s, points_s, maps_s = np.median(times[1:], axis=0)  # the first warms up
    step = STEPS.get(f"batch {frames}")
    rows = [
        [name, f"{1e3 * seconds:.1f}", f"{seconds / step:.2%}" if step and name != "LeRobot's transforms alone" else ""]
        for name, seconds in (
            ("LeRobot's transforms alone", pictures_s),
            ("added: four points and the homography", points_s),
            ("added: maps", maps_s),
            ("added together", points_s + maps_s),
        )
    ]
    table(
        f"Maps that move along: {frames} frames of {VIEWS} pictures, {grid}x{grid} cells of {', '.join(shapes)}",
        f"{arguments.drawn} transforms a picture. Median of {arguments.repeats} batches, in one process."
        " Of a step on an H200, were nothing in parallel.",
        ["a batch", "ms", "of a step"],
        rows,
    )


if __name__ == "__main__":
    main()
