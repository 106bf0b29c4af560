"""Does the alignment loss teach a policy where its camera is, and does it learn to act faster by it?

    python benchmarks/bench_align.py [--seeds 5] [--steps 600] [--weight 0.5]

Made-up worlds, for the small Pi0.5: a camera is somewhere, its geometry says exactly where, and the actions are that
place. Its pictures hardly show it: they are redder the farther right the camera is, and greener the farther down, by at
most 2 percent of the brightest, in noise and changing light. In the world ``shifted`` the camera moves and never turns:
the origins of its rays tell the place, their directions never change. In ``turned`` it always looks at one point, so
that the directions change, too, as those of a camera on an arm do.

A policy that is trained on actions alone has to find that out by them; one that is aligned is told in each token. Both
see the same frames in the same order, from the same weights, with the rates of `geomcache train` in proportion (the
projector's is `geom_lr_scale` times the policy's), and both act by pictures alone. Every frame is an episode of its
own; those that are measured by are held out.
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
from numpy.typing import NDArray
from scipy import stats
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
TRAINED, HELD_OUT, BATCH = 512, 256, 16
LEARNING_RATE = 5e-4
ALONE, ALIGNED = WAYS = ("actions alone", "aligned")
SHIFTED, TURNED = WORLDS = ("shifted", "turned")
LOOKED_AT = (0.0, 0.0, 1.5)


@dataclass(frozen=True, kw_only=True)
class World:
    """Frames: where the camera is, what its geometry says, what its pictures show."""

    places: Tensor  # [N, 2] from -1 to 1
    geometry: Geometry  # [N, 1, GRID, GRID, ...] float16
    pictures: Tensor  # [N, 3, SIDE, SIDE] from 0 to 1

    @classmethod
    def make(cls, kind: str, frames: int, seed: int) -> "World":
        generator = torch.Generator().manual_seed(seed)
        places = 2 * torch.rand(frames, 2, generator=generator) - 1
        light = LIGHT * (2 * torch.rand(frames, 1, generator=generator) - 1)
        colour = 0.5 + light + TINT * torch.cat([places, torch.zeros(frames, 1)], dim=1)  # red, green, blue
        noise = NOISE * torch.randn(frames, 3, SIDE, SIDE, generator=generator)
        pictures = (colour[..., None, None] + noise).clamp(0, 1)
        origins = torch.cat([places, torch.zeros(frames, 1)], dim=1)
        cells = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
        v, u = torch.meshgrid(cells, cells, indexing="ij")
        through = torch.stack([u, v, torch.ones_like(u)], dim=-1)  # [GRID, GRID, 3] in the camera's axes
        axes = torch.eye(3).expand(frames, 3, 3) if kind == SHIFTED else looking_at(origins)
        ray = torch.empty(frames, 1, GRID, GRID, 6)
        ray[:, 0, ..., :3] = torch.einsum("nac,hwc->nhwa", axes, through)
        ray[..., 3:] = origins[:, None, None, None]
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


def looking_at(origins: Tensor) -> Tensor:
    """Return the axes of cameras that look at `LOOKED_AT` without rolling: x, y, z in columns, [N, 3, 3]."""
    z = torch.nn.functional.normalize(torch.tensor(LOOKED_AT) - origins, dim=-1)
    x = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([[0.0, 1.0, 0.0]]).expand_as(z), z), dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=-1)


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
        optimizer_lr=LEARNING_RATE,
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


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a policy learned: measured after the same numbers of steps."""

    losses: list[float]
    """Action loss of held-out frames."""
    probes: list[list[float]]
    """R² of the camera's place, by layer."""


def learn(kind: str, weight: float, seed: int, steps: int, every: int) -> Course:
    """Train a policy, and measure it each so many steps."""
    world, held_out = World.make(kind, TRAINED, 1000 + seed), World.make(kind, HELD_OUT, 2000 + seed)
    policy = make_policy(world, weight, seed).train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    course = Course(losses=[], probes=[])
    for step in range(steps + 1):
        if step % every == 0:
            course.losses.append(action_loss(policy, held_out))
            course.probes.append(probe(policy, world, held_out))
            policy.train()
        torch.manual_seed(10_000 * seed + step)  # of noise and time
        loss, _ = policy.forward(world.batch(torch.randint(TRAINED, (BATCH,), generator=order)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return course


def paired(alone: NDArray[np.float64], aligned: NDArray[np.float64]) -> str:
    """Return the mean of aligned minus alone over the seeds [n], with its 95 % interval by Student's t."""
    differences = aligned - alone
    if len(differences) < 2:
        return f"{differences.mean():+.3f}"
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return f"{differences.mean():+.3f} ± {half:.3f}"


def report(kind: str, courses: dict[str, list[Course]], steps: int, every: int) -> None:
    seeds = len(courses[ALONE])
    losses = {way: np.array([course.losses for course in courses[way]]) for way in WAYS}  # [seeds, points]
    probes = {way: np.array([course.probes for course in courses[way]]) for way in WAYS}  # [seeds, points, layers]
    best = {way: values.max(axis=2) for way, values in probes.items()}
    points = range(0, steps + 1, every)
    for title, method, values in (
        (
            "Held-out action loss while training",
            f"{HELD_OUT} frames held out, with fixed noise. After so many steps; less is better.",
            losses,
        ),
        (
            "What a linear probe reads off the image tokens while training",
            "R² of the camera's place (ray origin) on held-out frames, in the layer where it is highest. After so many"
            " steps; more is better.",
            best,
        ),
    ):
        rows = [[way, str(seed), *(f"{v:.3f}" for v in values[way][seed])] for seed in range(seeds) for way in WAYS]
        rows += [[way, "mean", *(f"{v:.3f}" for v in values[way].mean(axis=0))] for way in WAYS]
        differences = [paired(values[ALONE][:, n], values[ALIGNED][:, n]) for n in range(len(points))]
        rows.append(["difference", "95 %", *differences])
        table(
            f"{title}: the world {kind}",
            f"The small Pi0.5 on {TRAINED} made-up frames, batches of {BATCH}. {method}",
            ["", "seed", *map(str, points)],
            rows,
        )
    rows = [[way, *(f"{v:.3f}" for v in probes[way][:, -1].mean(axis=0))] for way in WAYS]
    layers = range(SMALL_GEMMA.depth + 1)
    rows.append(["difference, 95 %", *(paired(probes[ALONE][:, -1, n], probes[ALIGNED][:, -1, n]) for n in layers)])
    table(
        f"The probe by layer, at the end: the world {kind}",
        f"Means of {seeds} seeds after {steps} steps. Layer 0 enters the language model; the loss is at layer 3.",
        ["", *(f"layer {layer}" for layer in layers)],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements")
    parser.add_argument("--weight", type=float, default=0.5, help="of the alignment loss")
    parser.add_argument("--worlds", default=",".join(WORLDS), metavar="NAME,NAME")
    arguments = parser.parse_args()
    for kind in arguments.worlds.split(","):
        courses: dict[str, list[Course]] = {way: [] for way in WAYS}
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for way, weight in ((ALONE, 0.0), (ALIGNED, arguments.weight)):
                began = time.perf_counter()
                course = learn(kind, weight, seed, arguments.steps, arguments.every)
                courses[way].append(course)
                shown = " ".join(f"{value:.3f}" for value in (*course.losses, *map(max, course.probes)))
                print(f"{kind}, seed {seed}, {way}: {time.perf_counter() - began:.0f} s: {shown}", file=sys.stderr)
        report(kind, courses, arguments.steps, arguments.every)


if __name__ == "__main__":
    main()
