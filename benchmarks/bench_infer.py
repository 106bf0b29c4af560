"""How long does one chunk of actions take, and which part of it is DA3?

    python benchmarks/bench_infer.py [--device cuda] [--da3 DIR] [--process-res 504] [--repeats 10]
                                     [--cameras 1,2] [--engines eager,compiled] [--target-hw 14,10,7,4]

Plain Pi0.5, with geometry given on each target grid, and with DA3 online by each engine, for each number of cameras of
256x256. On a GPU the real sizes: Pi0.5 in bfloat16, 3.6 billion parameters, and DA3-LARGE; on a CPU the small variant
and DA3-SMALL. Random weights are good enough: speed does not depend on them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature

from benchmarks.common import da3_folder, initialised_on, table
from geomcache.da3.encoder import DA3Encoder
from geomcache.evaluation.latency import ChunkTime, ChunkTimer
from geomcache.geometry import Camera, Geometry
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.statistics import Moments

CAMERAS = ("observation.images.image", "observation.images.image2")
SIZE = 256  # of the pictures, as in LIBERO
ACTION_DIM, STATE_DIM = 7, 8
PLAIN, GIVEN, ONLINE = "plain Pi0.5", "geometry given", "DA3 online"
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"model_size": "full", "dtype": "bfloat16", "random_init": True, "da3": "da3-large"},
    "cpu": {"model_size": "small", "image_resolution": (112, 112), "da3": "da3-small"},
}


def make_policy(encoder: DA3Encoder, pictures: dict[str, torch.Tensor], **options: Any) -> PI05GeometryPolicy:
    """Return a policy for the encoder's cameras that encodes with this encoder, which is warm."""
    visual = {key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, SIZE, SIZE)) for key in pictures}
    config = PI05GeometryConfig(
        **options,
        device=encoder.device.type,
        push_to_hub=False,
        input_features={**visual, "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(STATE_DIM,))},
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION_DIM,))},
    )
    geometry = encode(encoder, pictures)
    statistics = {name: Moments.of(name, values.cpu().numpy()) for name, values in geometry.items()}
    config.bind_cache(encoder.spec, statistics, "0" * 64)
    with initialised_on(encoder.device.type):
        policy: PI05GeometryPolicy = PI05GeometryPolicy(config).eval()
    assert policy.online is not None
    policy.online.encoder = encoder
    return policy


def encode(encoder: DA3Encoder, pictures: dict[str, torch.Tensor]) -> Geometry:
    return encoder.encode([(image * 255).round().to(torch.uint8).permute(0, 2, 3, 1) for image in pictures.values()])


def measure(
    encoders: dict[str, DA3Encoder],
    pictures: dict[str, torch.Tensor],
    target_sides: list[int],
    repeats: int,
    **options: Any,
) -> dict[str, list[ChunkTime]]:
    """Time each way to predict, in turn; the first round warms up and is left out.

    Args:
        encoders: for the same cameras, by engine.
        pictures: of each camera.
        target_sides: of the square grids that geometry is resampled to; the first is the policy's.
        repeats: rounds.
        options: of the policy.
    """
    first = next(iter(encoders.values()))
    policy = make_policy(first, pictures, geom_target_hw=(target_sides[0],) * 2, **options)
    length = policy.config.tokenizer_max_length
    batch = {key: image.to(first.device) for key, image in pictures.items()}
    batch["observation.language.tokens"] = torch.randint(1, 200, (1, length), device=first.device)
    batch["observation.language.attention_mask"] = torch.ones(1, length, dtype=torch.bool, device=first.device)
    with_geometry = batch | encode(first, pictures).to_batch()
    ways: dict[str, tuple[dict[str, Any], int, DA3Encoder]] = {PLAIN: (batch, target_sides[0], first)}
    ways |= {f"{GIVEN}, {side}x{side}": (with_geometry, side, first) for side in target_sides}
    ways |= {f"{ONLINE}, {engine}": (batch, target_sides[0], encoder) for engine, encoder in encoders.items()}
    timer = ChunkTimer(policy)
    calls = {engine: encoder.calls for engine, encoder in encoders.items()}
    assert policy.online is not None
    for _ in range(repeats + 1):
        for way, (given, side, encoder) in ways.items():
            policy.config.use_geom_prefix = way != PLAIN  # off, the same network runs as plain Pi0.5
            policy.model.geometry_adapter.target_hw = (side, side)
            policy.online.encoder = encoder
            policy.predict_action_chunk(given)
    for engine, encoder in encoders.items():
        assert encoder.calls - calls[engine] == repeats + 1  # once a chunk where it is online, never elsewhere
    return {way: timer.times[len(ways) + number :: len(ways)] for number, way in enumerate(ways)}


def row(cameras: int, way: str, times: list[ChunkTime]) -> tuple[str, ...]:
    total = float(np.median([time.total for time in times]))

    def part(seconds: list[float]) -> str:
        median = float(np.median(seconds))
        return f"{1e3 * median:.1f} ({median / total:.0%})"

    return (
        str(cameras),
        way,
        f"{1e3 * total:.1f}",
        f"{1e3 * np.percentile([time.total for time in times], 95):.1f}",
        part([time.geometry for time in times]) if way.startswith(ONLINE) else "-",
        part([time.prefix for time in times]),
        part([time.denoising for time in times]),
    )


def make_encoders(folder: Path, keys: tuple[str, ...], arguments: argparse.Namespace) -> dict[str, DA3Encoder]:
    """Return an encoder for each engine, by the engine that it ended with: a compilation can fail."""
    encoders: dict[str, DA3Encoder] = {}
    for engine in arguments.engines:
        encoder = DA3Encoder.from_pretrained(
            str(folder),
            cameras=[Camera(key=key, height=SIZE, width=SIZE) for key in keys],
            process_res=arguments.process_res,
            device=arguments.device,
        )
        if engine == "compiled":
            print(f"compiled in {encoder.compile(1):.1f} s", flush=True)
        encoders[encoder.engine] = encoder
    return encoders


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--da3", type=Path, help="a DA3 folder; it is made with random weights where it does not exist")
    parser.add_argument("--process-res", type=int, default=504)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cameras", type=integers, default=[1, 2], metavar="N,N", help="1 or 2 (%(default)s)")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["eager"], metavar="NAME,NAME")
    parser.add_argument("--target-hw", type=integers, default=[14], metavar="N,N", help="sides of the target grids")
    arguments = parser.parse_args()
    options = dict(SIZES[arguments.device])
    name = options.pop("da3")
    torch.manual_seed(0)
    pictures = {key: torch.randint(0, 256, (1, 3, SIZE, SIZE)) / 255 for key in CAMERAS}
    rows = []
    with da3_folder(arguments.da3, name) as folder:
        for count in arguments.cameras:
            seen = {key: pictures[key] for key in CAMERAS[:count]}
            encoders = make_encoders(folder, CAMERAS[:count], arguments)
            measured = measure(encoders, seen, arguments.target_hw, arguments.repeats, **options)
            rows += [row(count, way, times) for way, times in measured.items()]
            spec = next(iter(encoders.values())).spec
    size = f"Pi0.5 {options['model_size']}, {spec.model_name} at {spec.process_res} px in {spec.compute_dtype}"
    table(
        f"One chunk of actions: {size}",
        f"Batch of one, {arguments.repeats} chunks each, all ways in turn, after one to warm up. Median, milliseconds"
        " and share; prefix is all that is neither DA3 nor denoising (10 steps). DA3 online on the first target grid.",
        ("cameras", "", "chunk", "p95", "DA3", "prefix", "denoising"),
        rows,
    )


if __name__ == "__main__":
    main()
