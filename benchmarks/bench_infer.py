"""How long does one chunk of actions take, and which part of it is DA3?

    python benchmarks/bench_infer.py [--device cuda] [--da3 DIR] [--process-res 504] [--repeats 10]

Plain Pi0.5, with geometry given, and with DA3 online, each with one and two cameras of 256x256. On a GPU the real
sizes: Pi0.5 in bfloat16, 3.6 billion parameters, and DA3-LARGE; on a CPU the small variant and DA3-SMALL. Random
weights serve: speed does not depend on them.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature

from benchmarks.common import table
from geomcache.da3.encoder import DA3Encoder
from geomcache.evaluation.latency import ChunkTime, ChunkTimer
from geomcache.geometry import Camera, Geometry
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.statistics import Moments
from pipelines.make_random_da3 import save_random_da3

CAMERAS = ("observation.images.image", "observation.images.image2")
SIZE = 256  # of the pictures, as in LIBERO
ACTION_DIM, STATE_DIM = 7, 8
PLAIN, GIVEN, ONLINE = "plain Pi0.5", "geometry given", "DA3 online"
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"model_size": "full", "dtype": "bfloat16", "random_init": True, "da3": "da3-large"},
    "cpu": {"model_size": "small", "image_resolution": (112, 112), "da3": "da3-small"},
}


def make_policy(encoder: DA3Encoder, pictures: dict[str, torch.Tensor], **options: Any) -> PI05GeometryPolicy:
    """A policy for the encoder's cameras. It encodes with this encoder, which is warm."""
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
    policy = PI05GeometryPolicy(config).eval()
    assert policy.online is not None
    policy.online.encoder = encoder
    return policy


def encode(encoder: DA3Encoder, pictures: dict[str, torch.Tensor]) -> Geometry:
    return encoder.encode([(image * 255).round().to(torch.uint8).permute(0, 2, 3, 1) for image in pictures.values()])


def measure(
    encoder: DA3Encoder, pictures: dict[str, torch.Tensor], repeats: int, **options: Any
) -> dict[str, list[ChunkTime]]:
    """Times of each way to predict, taken in turn; the first round warms up and is left out."""
    policy = make_policy(encoder, pictures, **options)
    length = policy.config.tokenizer_max_length
    batch = {key: image.to(encoder.device) for key, image in pictures.items()}
    batch["observation.language.tokens"] = torch.randint(1, 200, (1, length), device=encoder.device)
    batch["observation.language.attention_mask"] = torch.ones(1, length, dtype=torch.bool, device=encoder.device)
    batches = {PLAIN: batch, GIVEN: batch | encode(encoder, pictures).to_batch(), ONLINE: batch}
    timer = ChunkTimer(policy)
    calls = encoder.calls
    for _ in range(repeats + 1):
        for way, given in batches.items():
            policy.config.use_geom_prefix = way != PLAIN  # off, the same network runs as plain Pi0.5
            policy.predict_action_chunk(given)
    assert encoder.calls - calls == repeats + 1  # once a chunk where it is online, never elsewhere
    return {way: timer.times[len(batches) + number :: len(batches)] for number, way in enumerate(batches)}


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
        part([time.geometry for time in times]) if way == ONLINE else "-",
        part([time.prefix for time in times]),
        part([time.denoising for time in times]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--da3", type=Path, help="a DA3 folder; without it, random weights in a temporary one")
    parser.add_argument("--process-res", type=int, default=504)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    options = dict(SIZES[arguments.device])
    name = options.pop("da3")
    torch.manual_seed(0)
    pictures = {key: torch.randint(0, 256, (1, 3, SIZE, SIZE)) / 255 for key in CAMERAS}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.da3 is None:
            save_random_da3(Path(folder), name)
        for count in (1, 2):
            encoder = DA3Encoder.from_pretrained(
                str(arguments.da3 or folder),
                cameras=[Camera(key=key, height=SIZE, width=SIZE) for key in CAMERAS[:count]],
                process_res=arguments.process_res,
                device=arguments.device,
            )
            seen = {key: pictures[key] for key in CAMERAS[:count]}
            measured = measure(encoder, seen, arguments.repeats, **options)
            rows += [row(count, way, times) for way, times in measured.items()]
            spec = encoder.spec
    size = f"Pi0.5 {options['model_size']}, {spec.model_name} at {spec.process_res} px in {spec.compute_dtype}"
    table(
        f"One chunk of actions: {size}",
        f"Batch of one, {arguments.repeats} chunks each, the three in turn, after one to warm up. Median, milliseconds"
        " and share; prefix is all that is neither DA3 nor denoising (10 steps).",
        ("cameras", "", "chunk", "p95", "DA3", "prefix", "denoising"),
        rows,
    )


if __name__ == "__main__":
    main()
