"""Estimate what stage one takes: GPU hours, disk, time by engine, requests to an object store. README.md has the table.

    python pipelines/plan_run.py                                                  LIBERO, DROID and a million episodes
    python pipelines/plan_run.py --frames 273465 --views 2 --rate 80 --gpus 8     your run, at a measured rate

Bytes and requests come from geomcache's own layout and are exact for the shards of all frames; journal, coordinates and
metadata add less than 0.1 % to the bytes. Hours are frames x views / rate; on a Ray cluster, whose driver alone writes,
bytes / its rate if that is longer. Rates and prices are options; `--help` says what they are otherwise, and from where.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from geomcache.cache.layout import Layout, choose_shard_frames, shards_nbytes
from geomcache.errors import UserInputError
from geomcache.geometry import DEFAULT_OUTPUTS, FEATURE, Camera, FeatureSpec, GeometrySpec
from geomcache.progress import human_bytes

# Views/s: DA3-LARGE at 504 px, two joint views, compiled, on one H200. benchmarks/RESULTS.md, "On a GPU".
RATE = 174.0
# MB/s that a process commits: next to that H200 a thread that wrote 169 views/s of 18.1 kB was busy 4 % of the time.
DRIVER_RATE = 75.0
# Dollars for 1,000 requests: S3 Standard, US East (N. Virginia), aws.amazon.com/s3/pricing.
PUT_PRICE, GET_PRICE = 0.005, 0.0004
# Bytes: objects up to the first are sent at once, others in parts of the second (s3fs); blocks of the third are read.
WHOLE_NBYTES, PART_NBYTES, BLOCK_NBYTES = 64 << 20, 50 << 20, 16 << 20
GPUS = 8
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


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a run is estimated with."""

    views_per_s: float = RATE
    """Of one GPU."""
    gpus: int = GPUS
    driver_mb_per_s: float = DRIVER_RATE
    """What the one process that writes for a Ray cluster commits."""
    put_price: float = PUT_PRICE
    """Dollars for 1,000 objects that are written."""
    get_price: float = GET_PRICE
    """Dollars for 1,000 objects that are read."""


def cache_nbytes(frames: int, views: int, grid_hw: tuple[int, int], outputs: Sequence[str] = DEFAULT_OUTPUTS) -> int:
    """Return the bytes of all shards of a cache."""
    return shards_nbytes(_spec(views, grid_hw, outputs), frames)


def count_requests(
    frames: int, views: int, grid_hw: tuple[int, int], outputs: Sequence[str] = DEFAULT_OUTPUTS
) -> tuple[int, int]:
    """Return how many requests write a cache to an object store, and read it once; the last shard counts as a full one.

    A shard is one object for each of its files, and one for its line of the journal. Large ones take several requests.
    """
    spec = _spec(views, grid_hw, outputs)
    layout = Layout.of(spec, frames, choose_shard_frames(spec, frames))
    sizes = [most for _, most in layout.size_bounds(layout.shard_frames)]
    writes = [1 if size <= WHOLE_NBYTES else -(-size // PART_NBYTES) + 2 for size in sizes]  # begin, parts, complete
    reads = [-(-size // BLOCK_NBYTES) for size in sizes]
    return layout.shards * (sum(writes) + 1), layout.shards * (sum(reads) + 1)


def _spec(views: int, grid_hw: tuple[int, int], outputs: Sequence[str]) -> GeometrySpec:
    return GeometrySpec(
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


def gpu_hours(frames: int, views: int, rate: float) -> float:
    """Return the hours of one GPU that encodes `rate` views a second."""
    return frames * views / rate / 3600


def hours_of_driver(frames: int, views: int, rates: Rates, nbytes: int) -> float:
    """Return the hours of a Ray cluster: those of its GPUs, or of the driver that writes what they make."""
    return max(gpu_hours(frames, views, rates.views_per_s) / rates.gpus, nbytes / (1e6 * rates.driver_mb_per_s) / 3600)


def table(runs: Iterable[Run], outputs: Sequence[str], rates: Rates) -> list[str]:
    """Return a Markdown table with a line for each run and grid."""
    on = f"on {rates.gpus} GPUs" if rates.gpus > 1 else "on 1 GPU"
    head = ["dataset", "frames", "views", "grid", "disk", "GPU hours"]
    head += [
        f"hours {on}: processes that share a disk",
        f"hours {on}: Ray",
        "requests to write, to read once",
        "$ for them",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for run in runs:
        for grid_hw in run.grids:
            nbytes = cache_nbytes(run.frames, run.views, grid_hw, outputs)
            writes, reads = count_requests(run.frames, run.views, grid_hw, outputs)
            hours = gpu_hours(run.frames, run.views, rates.views_per_s)
            cells = [run.name, f"{run.frames:,}", str(run.views), "x".join(map(str, grid_hw)), human_bytes(nbytes)]
            cells += [f"{hours:,.1f}", f"{hours / rates.gpus:,.1f}"]
            cells += [f"{hours_of_driver(run.frames, run.views, rates, nbytes):,.1f}", f"{writes:,}; {reads:,}"]
            cells += [f"{writes * rates.put_price / 1000:,.2f}; {reads * rates.get_price / 1000:,.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=positive, help="frames of your dataset; with --views")
    parser.add_argument("--views", type=positive, help="cameras a frame")
    parser.add_argument("--grid", type=cells, action="append", help="cells of a map, such as 14x14; may be repeated")
    parser.add_argument("--outputs", default=",".join(DEFAULT_OUTPUTS), help="what is cached (%(default)s)")
    parser.add_argument("--rate", type=rate, default=RATE, help="views/s of a GPU (%(default)g: one H200, DA3-LARGE)")
    parser.add_argument("--gpus", type=positive, default=GPUS, help="that share the work (%(default)s)")
    parser.add_argument(
        "--driver-rate",
        type=rate,
        default=DRIVER_RATE,
        help="MB/s that the driver of a Ray cluster writes (%(default)g: one thread, next to an H200)",
    )
    s3 = "S3 Standard, US East"
    parser.add_argument("--put-price", type=price, default=PUT_PRICE, help=f"$ for 1,000 writes (%(default)g: {s3})")
    parser.add_argument("--get-price", type=price, default=GET_PRICE, help=f"$ for 1,000 reads (%(default)g: {s3})")
    arguments = parser.parse_args()
    if (arguments.frames is None) != (arguments.views is None):
        parser.error("--frames and --views: expected both or none, got one")
    runs: Sequence[Run] = RUNS
    if arguments.frames is not None:
        grids = tuple(arguments.grid or GRIDS)
        runs = [Run(name="this run", frames=arguments.frames, views=arguments.views, grids=grids)]
    elif arguments.grid:
        parser.error("--grid: expected --frames and --views with it")
    outputs = tuple(name.strip() for name in arguments.outputs.split(","))
    rates = Rates(
        views_per_s=arguments.rate,
        gpus=arguments.gpus,
        driver_mb_per_s=arguments.driver_rate,
        put_price=arguments.put_price,
        get_price=arguments.get_price,
    )
    try:
        lines = table(runs, outputs, rates)
    except UserInputError as error:
        parser.error(str(error))
    print(*lines, sep="\n")


def rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return number


def price(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return number


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
