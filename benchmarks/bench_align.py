"""Does the alignment loss teach a policy where its camera is, and does it learn to act faster by it?

    python benchmarks/bench_align.py [--seeds 5] [--steps 150] [--weight 0.5]

A made-up world, for the small Pi0.5: a camera is somewhere, its geometry says exactly where, and the actions are that
place. Its pictures hardly show it: they are redder the farther right the camera is, and greener the farther down, by at
most 2 percent of the brightest, in noise and changing light. A policy that is trained on actions alone has to find that
out by them; one that is aligned is told in each token. Both see the same frames in the same order, from the same
weights, and both act by pictures alone. Held-out frames are from the same world.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from benchmarks.common import table
from geomcache.adapter import channel_statistics
from geomcache.geometry import Camera, Geometry, GeometrySpec
from geomcache.policy.alignment import geometry_target
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.image_tokens import HiddenStates, picture_areas, tokens_of_views
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.policy.small_paligemma import SMALL_GEMMA
from geomcache.statistics import Moments
from geomcache.training.linear_probe import LinearProbe

KEY = "observation.images.wrist"
SIDE, GRID, CHUNK, TEXT = 28, 4, 1, 2
TINT, LIGHT, NOISE = 0.02, 0.3, 0.1  # shares of the brightest: what tells the place, and what hides it
TRAINED, HELD_OUT, BATCH = 512, 128, 16
ALONE, ALIGNED = WAYS = ("actions alone", "aligned")


@dataclass(frozen=True, kw_only=True)
class World:
    """Frames: where the camera is, what its geometry says, what its pictures show."""

    places: Tensor  # [N, 2] from -1 to 1
    geometry: Geometry  # [N, 1, GRID, GRID, ...] float16
    pictures: Tensor  # [N, 3, SIDE, SIDE] from 0 to 1

    @classmethod
    def make(cls, frames: int, seed: int) -> "World":
        generator = torch.Generator().manual_seed(seed)
        places = 2 * torch.rand(frames, 2, generator=generator) - 1
        light = LIGHT * (2 * torch.rand(frames, 1, generator=generator) - 1)
        colour = 0.5 + light + TINT * torch.cat([places, torch.zeros(frames, 1)], dim=1)  # red, green, blue
        noise = NOISE * torch.randn(frames, 3, SIDE, SIDE, generator=generator)
        pictures = (colour[..., None, None] + noise).clamp(0, 1)
        cells = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
        v, u = torch.meshgrid(cells, cells, indexing="ij")
        ray = torch.zeros(frames, 1, GRID, GRID, 6)
        ray[..., 0], ray[..., 1], ray[..., 2] = u, v, 1.0
        ray[..., 3:5] = places[:, None, None, None]
        return cls(
            places=places,
            geometry=Geometry(ray=ray.half(), ray_conf=torch.full((frames, 1, GRID, GRID), 5.0).half()),
            pictures=pictures,
        )

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """Return these frames as LeRobot's preprocessor leaves them."""
        geometry = {key: values[rows] for key, values in self.geometry.to_batch().items()}
        return geometry | {
            KEY: self.pictures[rows],
            "observation.language.tokens": torch.ones(len(rows), TEXT, dtype=torch.long),
            "observation.language.attention_mask": torch.ones(len(rows), TEXT, dtype=torch.bool),
            "action": self.places[rows][:, None].expand(-1, CHUNK, -1).contiguous(),
        }


def make_policy(world: World, weight: float, seed: int) -> Any:
    spec = GeometrySpec(
        model_id="made-up",
        model_revision=None,
        model_name="da3-small",
        weights_sha256="00" * 32,
        da3_version="0",
        views="joint",
        cameras=(Camera(key=KEY, height=SIDE, width=SIDE),),
        process_res=SIDE,
        grid=f"{GRID}x{GRID}",
        grid_hw=(GRID, GRID),
        outputs=("ray", "ray_conf"),
        compute_dtype="fp32",
    )
    config = PI05GeometryConfig(
        device="cpu",
        push_to_hub=False,
        model_size="small",
        geom_mode="align",
        geom_align_weight=weight,
        image_resolution=(SIDE, SIDE),
        tokenizer_max_length=TEXT,
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_action_dim=2,
        input_features={KEY: PolicyFeature(type=FeatureType.VISUAL, shape=(3, SIDE, SIDE))},
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
    )
    moments = {name: Moments.of(name, values.numpy()) for name, values in world.geometry.items()}
    config.bind_cache(spec, moments, "0" * 64)
    torch.manual_seed(seed)
    return PI05GeometryPolicy(config)


def action_loss(policy: Any, world: World) -> float:
    """Return the action loss of held-out frames, with the same noise and times at every call."""
    policy.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        loss, _ = policy.forward(world.batch(torch.arange(len(world.places)).repeat(2)))
    policy.train()
    return float(loss)


def probe(policy: Any, world: World, held_out: World) -> list[float]:
    """Return how much of the camera's place can be read off the image tokens after each layer, R²."""
    statistics = channel_statistics(policy.config.geometry_statistics)
    states = HiddenStates(policy.model.paligemma_with_expert, range(SMALL_GEMMA.depth + 1))
    probes: list[LinearProbe] = []
    policy.eval()
    for frames in (world, held_out):
        for rows in torch.split(torch.arange(len(frames.places)), 64):
            batch = frames.batch(rows)
            with states.kept() as kept:
                policy.predict_action_chunk(batch, num_steps=1)
            target = geometry_target(Geometry.from_batch(batch), *statistics, picture_areas(batch, [KEY], SIDE))
            values = target.values.flatten(1, 2)
            probes = probes or [LinearProbe(values.shape[1], SMALL_GEMMA.width, 7) for _ in kept]
            for layer, each in enumerate(probes):
                hidden = tokens_of_views(kept[layer], [KEY], [KEY], SIDE).flatten(1, 2)
                (each.fit if frames is world else each.measure)(hidden, values)
        if frames is world:
            for each in probes:
                each.solve()
    states.remove()
    return [each.r2(slice(3, 6)) or 0.0 for each in probes]


def learn(weight: float, seed: int, steps: int, every: int) -> tuple[list[float], list[float]]:
    """Train; return the held-out action loss each so many steps, and the probe of each layer at the end."""
    world, held_out = World.make(TRAINED, 1000 + seed), World.make(HELD_OUT, 2000 + seed)
    policy = make_policy(world, weight, seed).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-4)
    order = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        if step % every == 0:
            losses.append(action_loss(policy, held_out))
        torch.manual_seed(10_000 * seed + step)  # of noise and time
        loss, _ = policy.forward(world.batch(torch.randint(TRAINED, (BATCH,), generator=order)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, action_loss(policy, held_out)], probe(policy, world, held_out)


def report(curves: dict[str, list[list[float]]], probes: dict[str, list[list[float]]], steps: int, every: int) -> None:
    seeds = len(curves[ALONE])
    rows = [[way, str(seed), *(f"{loss:.3f}" for loss in curves[way][seed])] for seed in range(seeds) for way in WAYS]
    rows += [[way, "mean", *(f"{loss:.3f}" for loss in np.mean(curves[way], axis=0))] for way in WAYS]
    table(
        "Held-out action loss while training",
        f"The small Pi0.5 on {TRAINED} made-up frames, batches of {BATCH}; {HELD_OUT} frames held out, with fixed"
        " noise. After so many steps.",
        ["", "seed", *(str(step) for step in range(0, steps + 1, every))],
        rows,
    )
    rows = [[way, str(seed), *(f"{r2:.3f}" for r2 in probes[way][seed])] for seed in range(seeds) for way in WAYS]
    rows += [[way, "mean", *(f"{r2:.3f}" for r2 in np.mean(probes[way], axis=0))] for way in WAYS]
    table(
        "What a linear probe reads off the image tokens",
        "R² of the camera's place (ray origin) on held-out frames, after training. Layer 0 is what enters the language"
        " model; the loss is at layer 3.",
        ["", "seed", *(f"layer {layer}" for layer in range(SMALL_GEMMA.depth + 1))],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=25, help="steps between two measurements")
    parser.add_argument("--weight", type=float, default=0.5, help="of the alignment loss")
    arguments = parser.parse_args()
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    probes: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed in range(arguments.seeds):
        for way, weight in ((ALONE, 0.0), (ALIGNED, arguments.weight)):
            began = time.perf_counter()
            curve, layers = learn(weight, seed, arguments.steps, arguments.every)
            curves[way].append(curve)
            probes[way].append(layers)
            shown = [f"{value:.3f}" for value in (*curve, *layers)]
            print(f"seed {seed}, {way}: {time.perf_counter() - began:.0f} s: {' '.join(shown)}", file=sys.stderr)
    report(curves, probes, arguments.steps, arguments.every)


if __name__ == "__main__":
    main()
