"""Estimate how long stage one takes and how much disk its cache needs: the tables of README.md in this folder.

    python pipelines/plan_run.py                                                  LIBERO, DROID and a million episodes
    python pipelines/plan_run.py --frames 273465 --views 2 --rate 80 --gpus 8     your run, at a measured rate

Bytes come from geomcache's own layout and are exact for the shards of all frames; journal, coordinates and metadata add
less than 0.1 %. Hours are frames x views / rate. The rate is an input: measure it with `geomcache extract --dry-run` on
your machine, or take it from the first minutes of a run.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from geomcache.cache.layout import shards_nbytes
from geomcache.errors import UserInputError
from geomcache.geometry import DEFAULT_OUTPUTS, FEATURE, Camera, FeatureSpec, GeometrySpec
from geomcache.progress import human_bytes

RATES = (50.0, 100.0, 200.0)  # views/s of one GPU: round numbers; one H200 was measured at 174 with DA3-LARGE
GRIDS = ((14, 14), (36, 36))
FEATURE_DIM = 128  # of `geomcache extract`, where --feature-dim does not say otherwise


@dataclass(frozen=True, kw_only=True)
class Run:
    """The size of a dataset."""

    name: str
    frames: int
    views: int
    grids: tuple[tuple[int, int], ...] = GRIDS
    """Cells (h, w) of a map."""


RUNS = (
    Run(name="LIBERO", frames=273_465, views=2),
    Run(name="DROID", frames=27_600_000, views=3, grids=((14, 14), (20, 36))),  # 180x320 pixels: 20x36 patches at 504
    Run(name="a million episodes", frames=161_500_000, views=2),  # of LIBERO's length, 161.5 frames
)


def cache_nbytes(frames: int, views: int, grid_hw: tuple[int, int], outputs: Sequence[str] = DEFAULT_OUTPUTS) -> int:
    """Return the bytes of all shards of a cache."""
    spec = GeometrySpec(
        model_id="plan",
        model_revision=None,
        model_name="plan",
        weights_sha256="",
        da3_version="",
        views="joint",
        cameras=tuple(Camera(key=f"view{view}", height=256, width=256) for view in range(views)),
        process_res=504,
        grid="x".join(map(str, grid_hw)),
        grid_hw=grid_hw,
        outputs=tuple(outputs),
        compute_dtype="bf16",
        feature=FeatureSpec(width=2048, dim=FEATURE_DIM, basis_sha256="0" * 64) if FEATURE in outputs else None,
    )
    return shards_nbytes(spec, frames)


def gpu_hours(frames: int, views: int, rate: float) -> float:
    """Return the hours of one GPU that encodes `rate` views a second."""
    return frames * views / rate / 3600


def table(runs: Iterable[Run], rates: Sequence[float], outputs: Sequence[str], gpus: int) -> list[str]:
    """Return a Markdown table with a line for each run and grid."""
    unit = "GPU hours" if gpus == 1 else f"hours on {gpus} GPUs"
    head = ["dataset", "frames", "views", "grid", "disk", *(f"{unit} at {rate:g} views/s" for rate in rates)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for run in runs:
        for grid_hw in run.grids:
            disk = human_bytes(cache_nbytes(run.frames, run.views, grid_hw, outputs))
            hours = (f"{gpu_hours(run.frames, run.views, rate) / gpus:,.1f}" for rate in rates)
            cells = [run.name, f"{run.frames:,}", str(run.views), "x".join(map(str, grid_hw)), disk, *hours]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=positive, help="frames of your dataset; with --views")
    parser.add_argument("--views", type=positive, help="cameras a frame")
    parser.add_argument("--grid", type=cells, action="append", help="cells of a map, such as 14x14; may be repeated")
    parser.add_argument("--outputs", default=",".join(DEFAULT_OUTPUTS), help="what is cached (%(default)s)")
    parser.add_argument("--rate", type=float, action="append", help="views/s of a GPU, measured; may be repeated")
    parser.add_argument("--gpus", type=positive, default=1, help="that share the work (%(default)s)")
    arguments = parser.parse_args()
    if (arguments.frames is None) != (arguments.views is None):
        parser.error("--frames and --views: expected both or none, got one")
    if any(rate <= 0 for rate in arguments.rate or ()):
        parser.error("--rate: expected more than 0 views a second")
    runs: Sequence[Run] = RUNS
    if arguments.frames is not None:
        grids = tuple(arguments.grid or GRIDS)
        runs = [Run(name="this run", frames=arguments.frames, views=arguments.views, grids=grids)]
    elif arguments.grid:
        parser.error("--grid: expected --frames and --views with it")
    outputs = tuple(name.strip() for name in arguments.outputs.split(","))
    try:
        lines = table(runs, arguments.rate or RATES, outputs, arguments.gpus)
    except UserInputError as error:
        parser.error(str(error))
    print(*lines, sep="\n")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return number


def cells(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return positive(height), positive(width)


if __name__ == "__main__":
    main()
