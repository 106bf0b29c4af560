"""What does the ray-only forward save beside the whole head of Depth Anything 3?

    python benchmarks/bench_forward.py [--models DA3-SMALL,DA3-LARGE] [--process-res 504] [--repeats 3] [--device D]

One table: operations of backbone and head as torch counts them (matrix products, convolutions and attention, a multiply
and an add as two), and the time of both, for the head as upstream calls it and for the rays alone, in turn. Before
anything is timed, rays and confidences of both are compared bit for bit. Random weights serve: neither depends on them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import table
from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.ray_head import ray_forward
from geomcache.geometry import Camera
from pipelines.make_random_da3 import save_random_da3

CAMERAS = tuple(Camera(key=f"observation.images.{name}", height=256, width=256) for name in ("front", "wrist"))
RAYS = ("ray", "ray_conf")
HEADS = ("whole head", "rays alone")


def operations(run: Callable[[], Any]) -> float:
    """10^9 operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of a call, to the end of what it starts on a GPU."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(model: str, process_res: int, device: str | None, repeats: int) -> list[list[str]]:
    """Rows of the table for one model."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_da3(Path(folder), model.lower())
        encoder = DA3Encoder.from_pretrained(
            folder, cameras=CAMERAS, process_res=process_res, grid="native", outputs=RAYS, device=device
        )
    rng = torch.Generator().manual_seed(0)
    pictures = [torch.randint(256, (1, camera.height, camera.width, 3), generator=rng).byte() for camera in CAMERAS]
    images = encoder.preprocess([picture.numpy() for picture in pictures])
    assert isinstance(images, torch.Tensor)
    images = images.to(encoder.device)
    height, width = images.shape[-2:]
    backbone, head = encoder._network["backbone"], encoder._network["head"]
    bf16 = encoder.spec.compute_dtype == "bf16"

    def run_backbone() -> Any:
        with torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=bf16):
            return backbone(images, cam_token=None, export_feat_layers=[], ref_view_strategy="first")[0]

    with torch.inference_mode():
        features = run_backbone()
        ways = (
            lambda: head(features, height, width, patch_start_idx=0),
            lambda: ray_forward(head, [feature for feature, _ in features], height, width),
        )
        whole, alone = (way() for way in ways)
        for name in RAYS:
            if not torch.equal(whole[name], alone[name]):
                raise SystemExit(f"{model}: {name}: other values than the whole head's: nothing is timed")
        of_backbone = operations(run_backbone)
        of_heads = [operations(way) for way in ways]
        times: list[list[float]] = [[], [], []]
        for _ in range(repeats):
            for found, run in zip(times, (run_backbone, *ways), strict=True):
                found.append(seconds(run, encoder.device))
    backbone_s, *heads_s = map(statistics.median, times)
    rows = []
    for name, flops, head_s in zip(HEADS, of_heads, heads_s, strict=True):
        of_both, both_s = of_backbone + flops, backbone_s + head_s
        counted = [f"{of_backbone:.0f}", f"{flops:.0f}", f"{of_both / (of_backbone + of_heads[0]):.3f}"]
        timed = [f"{backbone_s:.3f}", f"{head_s:.3f}", f"{both_s:.3f}", f"{both_s / (backbone_s + heads_s[0]):.3f}"]
        rows.append([model, name, *counted, *timed])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="DA3-SMALL,DA3-LARGE")
    parser.add_argument("--process-res", type=int, default=504)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models.split(","):
        rows += measure(model, arguments.process_res, arguments.device, arguments.repeats)
    table(
        f"The ray-only forward beside the whole head, at {arguments.process_res} px",
        f"A frame of two views, joint. Operations in 10^9; seconds, median of {arguments.repeats}, each way in turn."
        " Rays and confidences of both heads are equal to the bit. Ratios are of backbone and head together, beside"
        " those with the whole head.",
        ["model", "head", "backbone, ops", "head, ops", "ratio", "backbone, s", "head, s", "both, s", "ratio"],
        rows,
    )


if __name__ == "__main__":
    main()
