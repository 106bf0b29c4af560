"""How far do geometry's numbers move with batch size, engine, dtype and device, and how far with what is wrong?

    python benchmarks/bench_parity.py [--da3 DIR] [--preset da3-large] [--process-res 504] [--frames 16]

The first table compares the rotary walk with upstream's own forward, and normalisation on the device with upstream's
on the CPU: both should be equal to the bit. The second has random weights: real ones give other figures.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from depth_anything_3.utils.io.input_processor import InputProcessor
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.common import da3_folder, real_dataset, table
from geomcache.da3 import encoder as encoder_module
from geomcache.da3.catalog import find_model
from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.preprocess import normalise
from geomcache.extraction.differences import UNITS, float16_steps, measure, origin_spread
from geomcache.frames.source import open_dataset
from geomcache.geometry import PATCH_SIZE, ComputeDtype

Maps = dict[str, NDArray[np.float16]]
HEAD = ("compared", "output", "mean", "largest", "", "steps mean", "steps largest")


class Rows:
    """The table's rows, as they are measured."""

    def __init__(self) -> None:
        self.cells: list[list[str]] = []
        self._began = time.perf_counter()

    def add(self, name: str, left: Maps, right: Maps) -> None:
        count = min(len(left["ray"]), len(right["ray"]))
        left, right = ({key: maps[:count] for key, maps in side.items()} for side in (left, right))
        steps = {key: float16_steps(left[key], right[key]) for key in left}
        for output, values in measure(left, right, origin_spread(left["ray"])).items():
            counted = steps["ray" if output in UNITS else output]
            unit = UNITS.get(output, "relative")
            cells = [name, output, f"{values.mean():.3g}", f"{values.max():.3g}", unit]
            self.cells.append([*cells, f"{counted.mean():.3g}", f"{counted.max():.4g}"])
        elapsed = time.perf_counter() - self._began
        print(f"[{elapsed:6.1f}] {name}: {'; '.join(' '.join(c[1:5]) for c in self.cells[-3:])}", flush=True)


def upstream_forward(network: nn.ModuleDict, images: Tensor, *, bf16: bool) -> dict[str, Tensor]:
    """Run upstream's own modules as upstream runs them."""
    with torch.no_grad():
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
            features, _ = network["backbone"](images, cam_token=None, export_feat_layers=[], ref_view_strategy="first")
        with torch.autocast(images.device.type, enabled=False):
            maps: dict[str, Tensor] = network["head"](features, *images.shape[-2:], patch_start_idx=0)
    return maps


def equal_to_upstream(encoder: DA3Encoder, folder: Path, images: Sequence[NDArray[np.uint8]]) -> list[list[str]]:
    """Compare rays, confidences and normalisation of two frames with upstream's; return the table's rows."""
    bf16 = encoder.spec.compute_dtype == "bf16"
    files = find_model(str(folder))
    network = encoder_module._load_network(files.preset, files.weights, encoder.device)
    pictures = encoder.preprocess([view[:2] for view in images])
    assert isinstance(pictures, Tensor)
    on_device = normalise(pictures.to(encoder.device))
    processor = InputProcessor()
    on_cpu = [
        [processor._process_one(image, process_res=encoder.spec.process_res, process_res_method="upper_bound_resize")[0]
         for image in frame] for frame in zip(*(view[:2] for view in images), strict=True)
    ]  # fmt: skip
    same_input = torch.equal(on_device.cpu(), torch.stack([torch.stack(frame) for frame in on_cpu]))
    torch.backends.cudnn.allow_tf32, before = bf16, torch.backends.cudnn.allow_tf32
    expected = upstream_forward(network, on_device, bf16=bf16)
    torch.backends.cudnn.allow_tf32 = before
    found = encoder._forward(on_device, ("ray", "ray_conf"))
    rows = [[str(encoder.device), encoder.spec.compute_dtype, "normalisation", str(same_input), "-"]]
    for name in ("ray", "ray_conf"):
        largest = float((expected[name] - found[name]).abs().max())
        same = str(torch.equal(expected[name], found[name]))
        rows.append([str(encoder.device), encoder.spec.compute_dtype, name, same, f"{largest:.3g}"])
    return rows


def maps_of(encoder: DA3Encoder, images: Sequence[NDArray[np.uint8]], together: int | None = None) -> Maps:
    frames = len(images[0])
    size = together or frames
    parts = [encoder.encode([view[start : start + size] for view in images]) for start in range(0, frames, size)]
    names = encoder.spec.outputs
    return {name: torch.cat([getattr(part, name) for part in parts]).cpu().numpy() for name in names}


def changed_weights(encoder: DA3Encoder, share: float) -> None:
    """Add to each weight a random part of itself, of this size."""
    generator = torch.Generator(encoder.device).manual_seed(0)
    for parameter in encoder._network.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
        parameter.data.copy_(parameter.data.float() * (1 + share * noise))


def measure_machine(
    rows: Rows, make: Callable[..., DA3Encoder], images: Sequence[NDArray[np.uint8]], dtype: str, *, compiled: bool
) -> Maps:
    """Measure what batch size, engine and dtype do on this device; return the maps of float32."""
    frames, exact = len(images[0]), make(dtype="fp32")
    reference = maps_of(exact, images)
    rows.add(f"fp32, {frames} frames a forward and 1", reference, maps_of(exact, images, 1))
    if dtype == "bf16":
        encoder = make(dtype="bf16")
        stored = maps_of(encoder, images)
        rows.add("bf16, the same batch twice", stored, maps_of(encoder, images))
        for size in (1, 2, 4, 5):
            rows.add(f"bf16, {frames} frames a forward and {size}", stored, maps_of(encoder, images, size))
        rows.add("bf16 and fp32", stored, reference)
        if compiled:
            print(f"compiled in {encoder.compile(frames):.1f} s")
            fast = maps_of(encoder, images)
            rows.add(f"bf16, eager and {encoder.engine}", stored, fast)
            padded = maps_of(encoder, images, frames - 1)
            rows.add(f"bf16 {encoder.engine}, a full batch and a padded one", fast, padded)
            rows.add(f"bf16 {encoder.engine}, and fp32", fast, reference)
    if compiled:
        exact.compile(frames)
        rows.add(f"fp32, eager and {exact.engine}", reference, maps_of(exact, images))
    return reference


def measure_faults(
    rows: Rows, make: Callable[..., DA3Encoder], images: Sequence[NDArray[np.uint8]], dtype: str, process_res: int
) -> None:
    """Measure what parity has to refuse."""
    encoder = make(dtype=dtype)
    stored = maps_of(encoder, images)
    rows.add("the next frame", {k: v[:-1] for k, v in stored.items()}, {k: v[1:] for k, v in stored.items()})
    turned = maps_of(encoder, images[::-1])
    rows.add("another view order", stored, turned)
    rows.add("another reference view", stored, {name: maps[:, ::-1] for name, maps in turned.items()})
    rows.add("BGR", stored, maps_of(encoder, [view[..., ::-1] for view in images]))
    rows.add("turned by 180 degrees", stored, maps_of(encoder, [view[:, ::-1, ::-1] for view in images]))
    grid = "14x14" if process_res > 14 * PATCH_SIZE else "4x4"
    sizes = (process_res, process_res - PATCH_SIZE)
    coarse = [maps_of(make(dtype=dtype, process_res=size, grid=grid), images) for size in sizes]
    rows.add(f"process-res less 14, grid {grid}", *coarse)
    for share in (0.001, 0.01):
        changed = make(dtype=dtype)
        changed_weights(changed, share)
        rows.add(f"weights changed by {share:.1%}", stored, maps_of(changed, images))
        del changed


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--da3", type=Path, help="a DA3 folder; it is made with random weights where it does not exist")
    parser.add_argument("--preset", default="da3-large" if cuda else "da3-small")
    parser.add_argument("--process-res", type=int, default=504 if cuda else 112)
    parser.add_argument("--frames", type=int, default=16 if cuda else 4)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="what is compared with fp32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled engine out")
    parser.add_argument("--cpu-frames", type=int, default=2, help="frames that a CPU encodes too; 0 for none")
    arguments = parser.parse_args()
    dataset, _ = open_dataset("bench", root=real_dataset())
    images = dataset.reader.read(0, arguments.frames).images
    rows = Rows()
    with da3_folder(arguments.da3, arguments.preset) as folder:

        def make(*, dtype: ComputeDtype, device: str = arguments.device, **options: Any) -> DA3Encoder:
            settings = {"process_res": arguments.process_res, **options}
            return DA3Encoder.from_pretrained(
                str(folder), cameras=dataset.cameras, device=device, dtype=dtype, **settings
            )

        same = []
        for dtype in ("fp32", "bf16"):
            same += equal_to_upstream(make(dtype=dtype), folder, images)
        table(
            "The rotary walk, and upstream's own forward",
            "Two frames of two views, joint: rays and confidences on the native grid, and the pictures after"
            " normalisation. On a CPU upstream's rotary tables are bfloat16 under autocast, and ours float32.",
            ("device", "dtype", "", "equal to the bit", "largest difference"),
            same,
        )
        reference = measure_machine(rows, make, images, arguments.dtype, compiled=not arguments.no_compile)
        if arguments.device != "cpu" and arguments.cpu_frames:
            few = [view[: arguments.cpu_frames] for view in images]
            on_cpu = maps_of(make(dtype="fp32", device="cpu"), few)
            rows.add("fp32, this device and a CPU", reference, on_cpu)
            rows.add("fp32 on this device, bf16 on a CPU", reference, maps_of(make(dtype="bf16", device="cpu"), few))
        measure_faults(rows, make, images, arguments.dtype, arguments.process_res)
        spec = make(dtype=arguments.dtype).spec
    table(
        f"Where numbers move: {spec.model_name} at {spec.process_res} px",
        f"{arguments.frames} frames of {len(spec.cameras)} views on the patch grid, random weights. Origins are"
        " relative to their spread; float16 steps of the whole output.",
        HEAD,
        rows.cells,
    )


if __name__ == "__main__":
    main()
