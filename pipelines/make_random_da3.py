"""Write a Depth Anything 3 folder with seeded RANDOM weights, as upstream writes one: for tests and the demo.

    python pipelines/make_random_da3.py --output FOLDER [--name da3-small] [--seed 0]

The published weights cannot ship with this repository. A random model runs the same code as a real one, but its
geometry has no meaning. The script builds upstream's own class and calls its `save_pretrained`; one more file in the
folder, RANDOM_WEIGHTS.txt, says that the weights are random. The same name and seed give the same bytes.

With upstream's initialisation, maps hardly depend on the picture: over a frame of LIBERO depth varies by half a
percent, and the rays of two frames differ by less than 0.01, so comparing such maps proves little. Larger gains make
them differ by a tenth of their range and more; depth and confidences stay far from float16's limit.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("DA3_LOG_LEVEL", "ERROR")

import torch
from torch import nn

NAMES = ("da3-small", "da3-base", "da3-large")  # the others need packages of upstream's exporters
PATCH_GAIN, HEAD_GAIN = 4.0, 1.6

# `depth_anything_3.api` imports these for exporting files and aligning poses; their packages are not installed here.
STAND_INS = {
    "depth_anything_3.utils.export": "export",
    "depth_anything_3.utils.pose_align": "align_poses_umeyama",
}

NOTICE = """RANDOM WEIGHTS

This folder holds {name} with random weights (seed {seed}), made by pipelines/make_random_da3.py.
It is for tests and demonstrations of the software. Geometry computed with it is meaningless.
"""


def save_random_da3(folder: Path, name: str = "da3-small", seed: int = 0, device: str = "cpu") -> None:
    """Write config.json, model.safetensors, README.md (upstream's) and RANDOM_WEIGHTS.txt into `folder`.

    Args:
        folder: where to.
        name: upstream's preset.
        seed: of the weights.
        device: that draws them; a GPU is faster and draws others.
    """
    gpus = [] if device == "cpu" else [device]
    with _upstream_api() as api, torch.random.fork_rng(devices=gpus), torch.device(device):
        torch.manual_seed(seed)
        model = api.DepthAnything3(model_name=name)
        _make_maps_vary(model.model)
        model.save_pretrained(folder)
    _sort_metadata(folder / "model.safetensors")
    (folder / "RANDOM_WEIGHTS.txt").write_text(NOTICE.format(name=name, seed=seed), encoding="utf-8")


@torch.no_grad()
def _make_maps_vary(network: Any) -> None:
    network.backbone.pretrained.patch_embed.proj.weight.mul_(PATCH_GAIN)
    for module in network.head.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.mul_(HEAD_GAIN)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which is written in a random order: equal weights then have equal bytes.

    A file starts with the header's length (8 bytes, little endian) and the header (JSON, padded with spaces).
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        file.seek(8)
        file.write(text)


@contextmanager
def _upstream_api() -> Iterator[ModuleType]:
    """Import `depth_anything_3.api` with stand-ins for what it imports, and remove both from sys.modules afterwards."""
    import depth_anything_3

    before = {name: sys.modules.get(name) for name in (*STAND_INS, "depth_anything_3.api")}
    for module_name, function in STAND_INS.items():
        stand_in = ModuleType(module_name)
        setattr(stand_in, function, None)
        sys.modules[module_name] = stand_in
    sys.modules.pop("depth_anything_3.api", None)
    try:
        import depth_anything_3.api as api

        yield api
    finally:
        vars(depth_anything_3).pop("api", None)
        for module_name, module in before.items():
            sys.modules.pop(module_name, None)
            if module is not None:
                sys.modules[module_name] = module


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--name", choices=NAMES, default="da3-small", help="upstream's preset (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (%(default)s)")
    parser.add_argument("--device", default="cpu", help="that draws them; a GPU is faster, and draws others")
    arguments = parser.parse_args()
    save_random_da3(arguments.output, arguments.name, arguments.seed, arguments.device)
    print(f"{arguments.output}: {arguments.name} with RANDOM weights. Geometry computed with them is MEANINGLESS.")


if __name__ == "__main__":
    main()
