"""What does a forward of the encoder cost: by batch size and engine, and with the rays alone or the whole head?

    python benchmarks/bench_forward.py [--da3 DIR] [--process-res 504] [--frames 1,4,16,32] [--compiled 1,16] [--heads]

The first table has views/s of each engine, from pictures on the device. With --heads, a second one compares the head
as upstream calls it with the rays alone: operations as torch counts them (matrix products, convolutions and attention,
a multiply and an add as two) and times, in turn, after both were compared bit for bit. Random weights are good enough.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import da3_folder, median_seconds, seconds, table
from geomcache.da3.backbone import RotaryTables, backbone_forward
from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.engine import is_out_of_memory
from geomcache.da3.preprocess import normalise
from geomcache.da3.ray_head import ray_forward
from geomcache.geometry import Camera

CAMERAS = tuple(Camera(key=f"observation.images.{name}", height=256, width=256) for name in ("front", "wrist"))
RAYS = ("ray", "ray_conf")
HEADS = ("whole head", "rays alone")


def load(folder: Path, process_res: int, device: str | None, grid: str) -> DA3Encoder:
    return DA3Encoder.from_pretrained(
        str(folder), cameras=CAMERAS, process_res=process_res, grid=grid, outputs=RAYS, device=device
    )


def random_pictures(frames: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (frames, c.height, c.width, 3), generator=generator).byte() for c in CAMERAS]


def engine_rows(encoder: DA3Encoder, sizes: list[int], compiled: list[int], repeats: int) -> list[list[str]]:
    """Return a row for each engine and batch size. The compiled engine comes last: it stays."""
    rows = []
    for engine, frames in [("eager", size) for size in sizes] + [("compiled", size) for size in compiled]:
        inputs = encoder.preprocess(random_pictures(frames))
        assert isinstance(inputs, torch.Tensor)
        inputs = inputs.to(encoder.device)
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            compiling = encoder.compile(frames) if engine == "compiled" else 0.0
            taken = median_seconds(functools.partial(encoder.forward, inputs), encoder.device, repeats)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rows.append([engine, str(frames), "out of memory", "-", "-", "-"])
            continue
        peak = torch.cuda.max_memory_allocated() / 2**30 if encoder.device.type == "cuda" else 0.0
        views = frames * len(CAMERAS)
        row = [encoder.engine, str(frames), f"{views / taken:.1f}", f"{1e3 * taken:.1f}"]
        rows.append([*row, f"{peak:.1f}", f"{compiling:.1f}"])
        print(*rows[-1], flush=True)
    return rows


def operations(run: Callable[[], Any]) -> float:
    """Return 10^9 operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops()) / 1e9


def head_rows(encoder: DA3Encoder, repeats: int) -> list[list[str]]:
    """Return a row for each way to run the head."""
    pictures = encoder.preprocess(random_pictures(1))
    assert isinstance(pictures, torch.Tensor)
    images = normalise(pictures.to(encoder.device))
    height, width = images.shape[-2:]
    backbone, head = encoder._network["backbone"], encoder._network["head"]
    tables = RotaryTables.make(backbone, height, width, encoder.device)

    def run_backbone() -> list[torch.Tensor]:
        bf16 = encoder.spec.compute_dtype == "bf16"
        with torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=bf16):
            return backbone_forward(backbone, images, tables)

    with torch.no_grad():
        features = run_backbone()
        ways = (
            lambda: head([(feature,) for feature in features], height, width, patch_start_idx=0),
            lambda: ray_forward(head, features, height, width),
        )
        whole, alone = (way() for way in ways)
        for name in RAYS:
            if not torch.equal(whole[name], alone[name]):
                raise SystemExit(f"{name}: other values than the whole head's: nothing is timed")
        of_backbone = operations(run_backbone)
        of_heads = [operations(way) for way in ways]
        runs = (run_backbone, *ways)
        times = [[seconds(run, encoder.device) for run in runs] for _ in range(repeats)]
    backbone_s, *heads_s = np.median(times, axis=0).tolist()
    rows = []
    for name, flops, head_s in zip(HEADS, of_heads, heads_s, strict=True):
        of_both, both_s = of_backbone + flops, backbone_s + head_s
        counted = [f"{of_backbone:.0f}", f"{flops:.0f}", f"{of_both / (of_backbone + of_heads[0]):.3f}"]
        timed = [f"{backbone_s:.3f}", f"{head_s:.3f}", f"{both_s:.3f}", f"{both_s / (backbone_s + heads_s[0]):.3f}"]
        rows.append([encoder.spec.model_name, name, *counted, *timed])
    return rows


def sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--da3", type=Path, help="a DA3 folder; it is made with random weights where it does not exist")
    parser.add_argument("--preset", default="da3-large" if cuda else "da3-small", help="of random weights")
    parser.add_argument("--process-res", type=int, default=504)
    parser.add_argument("--frames", type=sizes, default=[1, 2, 4, 8, 16, 32] if cuda else [1, 4], metavar="N,N")
    parser.add_argument("--compiled", type=sizes, default=[1, 16, 32] if cuda else [], metavar="N,N")
    parser.add_argument("--heads", action="store_true", help="compare the whole head with the rays alone as well")
    parser.add_argument("--repeats", type=int, default=5 if cuda else 3)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    with da3_folder(arguments.da3, arguments.preset) as folder:
        encoder = load(folder, arguments.process_res, arguments.device, "patch")
        native = load(folder, arguments.process_res, arguments.device, "native") if arguments.heads else None
    rows = engine_rows(encoder, arguments.frames, arguments.compiled, arguments.repeats)
    title = f"{encoder.spec.model_name} at {arguments.process_res} px in {encoder.spec.compute_dtype}"
    table(
        f"The encoder alone: {title}",
        f"Frames of two views, joint; from pictures on the device to the grid there. Median of {arguments.repeats}"
        " after one to warm up. `compile` is the time that the engine takes for its first batch of a size.",
        ["engine", "frames", "views/s", "ms a forward", "peak, GiB", "compile, s"],
        rows,
    )
    if native is not None:
        table(
            f"The ray-only forward compared with the whole head: {title}",
            f"A frame of two views, joint. Operations in 10^9; seconds, median of {arguments.repeats}, each way in"
            " turn. Rays and confidences of both heads are equal to the bit. Ratios are of backbone and head together,"
            " to those with the whole head.",
            ["model", "head", "backbone, ops", "head, ops", "ratio", "backbone, s", "head, s", "both, s", "ratio"],
            head_rows(native, arguments.repeats),
        )


if __name__ == "__main__":
    main()
