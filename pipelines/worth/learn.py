"""Train one arm of the experiment from each seed, and measure its actions on demonstrations that it never saw.

    python pipelines/worth/learn.py --arm rays --seeds 0,1,2 --frames DIR --caches DIR --output DIR [--steps 1500]

A seed is the same for every arm: the same first weights, frames, noise and times. OUTPUT/policies/ARM/SEED is a
checkpoint as LeRobot writes one, for `geomcache eval`; OUTPUT/open_loop/ARM.SEED.csv has the errors, and a seed that
has that file is not trained again. LeRobot's classes, optimizer and schedule; only its loader is left out, which would
decode every frame dozens of times.
"""

import argparse
import csv
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from geomcache.cache.store import GeometryStore
from geomcache.geometry import GeometrySpec
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.policy.pi0.configuration_pi0_geometry import PI0GeometryConfig
from geomcache.policy.pi0.modeling_pi0_geometry import PI0GeometryPolicy
from geomcache.policy.pi0.processor_pi0_geometry import make_pi0_geometry_pre_post_processors
from geomcache.policy.processor_pi05_geometry import make_pi05_geometry_pre_post_processors
from geomcache.statistics import Moments
from pipelines.worth.design import ARMS, Arm
from pipelines.worth.frames import Frames, cache_of, geometry_keys

KEYS = ("observation.images.image", "observation.images.image2")  # the moved camera, the hand's
COLUMNS = ("arm", "seed", "steps", "camera", "seen", "demonstration", "frames", "xyz", "gripper")
WARM_UP, LAST_RATE = 0.05, 0.01  # share of the steps, and of the learning rate
POLICIES: dict[str, tuple[Any, Any, Any]] = {  # of one interface, and not typed
    "pi05_geometry": (PI05GeometryConfig, PI05GeometryPolicy, make_pi05_geometry_pre_post_processors),
    "pi0_geometry": (PI0GeometryConfig, PI0GeometryPolicy, make_pi0_geometry_pre_post_processors),
}
BATCH_TO_MEASURE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """Frames on a device, with LeRobot's preprocessor applied."""

    pictures: Tensor  # [N, V, 3, H, W] uint8
    maps: dict[str, Tensor]
    rest: dict[str, Tensor]  # tokens, their mask, state, actions

    def batch(self, rows: Tensor, arm: Arm) -> dict[str, Any]:
        """Return these rows as LeRobot's preprocessor leaves a batch, with the pictures that the arm sees."""
        pictures = self.pictures[rows].float() / 255 * arm.sees
        images = {key: pictures[:, view] for view, key in enumerate(cameras_of(arm))}
        return images | {key: values[rows] for key, values in self.rest.items()} | geometry_keys(self.maps, rows)


def cameras_of(arm: Arm) -> tuple[str, ...]:
    """Return the keys of the cameras whose pictures the arm's policy gets."""
    return KEYS if arm.has_hand else KEYS[:1]


def statistics_of(frames: Frames) -> dict[str, dict[str, Tensor]]:
    """Return what LeRobot normalises state and action by, of all actions of the chunks."""
    actions = frames.actions[~frames.is_pad]
    statistics: dict[str, dict[str, Tensor]] = {}
    for key, values in (("observation.state", frames.state), ("action", actions)):
        numbers = {
            "mean": values.mean(0),
            "std": values.std(0),
            "min": values.min(0),
            "max": values.max(0),
            "q01": np.quantile(values, 0.01, axis=0),
            "q99": np.quantile(values, 0.99, axis=0),
        }
        statistics[key] = {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in numbers.items()}
    return statistics


def prepare(frames: Frames, preprocess: Any, device: str) -> Prepared:
    """Apply LeRobot's preprocessor to everything but the pictures, and move all to the device."""
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(frames), 1024):
        rows = slice(start, start + 1024)
        batch = preprocess(
            {
                "observation.state": torch.from_numpy(frames.state[rows]),
                "action": torch.from_numpy(frames.actions[rows]),
                "task": list(frames.tasks[rows]),
            }
        )
        names = ("observation.language.tokens", "observation.language.attention_mask", "observation.state", "action")
        parts.append({name: batch[name] for name in names})
    pictures, maps = frames.to(device)
    return Prepared(
        pictures=pictures, maps=maps, rest={name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    )


def make_config(
    arm: Arm, frames: Frames, options: argparse.Namespace, spec: GeometrySpec | None, fingerprint: str
) -> Any:
    """Return the configuration of an arm's policy. `spec` and `fingerprint` are of a cache of its geometry."""
    height, width = frames.pictures.shape[-2:]
    config = POLICIES[options.policy][0](
        device=options.device,
        push_to_hub=False,
        model_size="small",
        use_geom_prefix=bool(arm.source),
        geom_mode=arm.mode,
        geom_target_hw=(options.tokens, options.tokens),
        geom_init_alpha=0.5,
        geom_lr_scale=1.0,
        image_resolution=(options.resolution, options.resolution),
        tokenizer_max_length=options.text,
        chunk_size=options.chunk,
        n_action_steps=options.chunk // 2,
        max_action_dim=7,
        max_state_dim=8,
        optimizer_lr=options.rate,
        scheduler_warmup_steps=max(1, round(WARM_UP * options.steps)),
        scheduler_decay_steps=options.steps,
        scheduler_decay_lr=LAST_RATE * options.rate,
        input_features={
            **{key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, height, width)) for key in cameras_of(arm)},
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(8,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(7,))},
    )
    if spec is not None:
        moments = {name: Moments.of(name, values.numpy()) for name, values in frames.maps.items()}
        config.bind_cache(dataclasses.replace(spec, outputs=arm.outputs), moments, fingerprint)
    return config


def read_spec(arm: Arm, frames: Frames, caches: Path) -> tuple[GeometrySpec | None, str]:
    """Return spec and fingerprint of a cache of the arm's geometry."""
    if not arm.source:
        return None, ""
    with GeometryStore.open(cache_of(caches, str(frames.part[0]), arm.source)) as store:
        return store.spec, store.fingerprint


def shuffled(frames: Frames) -> Frames:
    """Give each frame the geometry of another one."""
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(frames, maps={output: values[order] for output, values in frames.maps.items()})


def train(policy: Any, prepared: Prepared, arm: Arm, seed: int, options: argparse.Namespace) -> list[float]:
    """Train the policy; return the loss of each step."""
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    schedule = policy.config.get_scheduler_preset().build(optimizer, options.steps)
    order = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(prepared.pictures), (options.steps, options.batch_size), generator=order)
    rows = rows.to(options.device)
    losses = []
    policy.train()
    for step in range(options.steps):
        torch.manual_seed(100_000 * seed + step)  # of noise and times
        loss, numbers = policy.forward(prepared.batch(rows[step], arm))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(numbers.get("geom_action_loss", numbers["loss"])))
        if step % 100 == 99 or step == options.steps - 1:
            print(f"seed {seed}, step {step + 1}: action loss {np.mean(losses[-100:]):.4f}", flush=True)
    return losses


@torch.no_grad()
def close_eyes(policy: Any) -> None:
    """Let a policy see any picture as a black one, which its vision tower gets as -1."""
    (embeddings,) = (module for module in policy.modules() if isinstance(module, SiglipVisionEmbeddings))
    patches = embeddings.patch_embedding
    assert patches.bias is not None
    patches.bias -= patches.weight.sum((1, 2, 3))
    patches.weight.zero_()


@torch.no_grad()
def measure(policy: Any, postprocess: Any, frames: Frames, prepared: Prepared, arm: Arm) -> list[Any]:
    """Return rows of `COLUMNS` from ``camera`` on: errors of the predicted actions, one row a recorded episode.

    ``xyz`` is the mean absolute error of the translation in action units, ``gripper`` the share of wrong signs; both
    over the chunks of all frames. Every arm denoises the same noise.
    """
    rows = np.arange(len(frames))
    policy.eval()
    predicted = []
    for batch, part in enumerate(np.array_split(rows, max(1, len(rows) // BATCH_TO_MEASURE))):
        torch.manual_seed(batch)
        chunk = policy.predict_action_chunk(prepared.batch(torch.from_numpy(part).to(prepared.pictures.device), arm))
        predicted.append(postprocess(chunk).numpy())
    found, counted = np.concatenate(predicted), ~frames.is_pad  # [N, K, 7], [N, K]
    xyz = np.abs(found - frames.actions)[..., :3].mean(-1)
    gripper = (found[..., 6] > 0) != (frames.actions[..., 6] > 0)
    table = []
    for name, camera in dict.fromkeys(zip(frames.part.tolist(), frames.camera.tolist(), strict=True)):
        chosen = (frames.part == name) & (frames.camera == camera)
        weights = counted[chosen]
        values = (float((each[chosen] * weights).sum() / weights.sum()) for each in (xyz, gripper))
        table.append((camera, name, int(chosen.sum()), *values))
    return table


def save(policy: Any, processors: tuple[Any, Any], folder: Path) -> None:
    """Write a checkpoint as LeRobot does."""
    policy.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)


def write_rows(file: Path, rows: list[tuple[Any, ...]]) -> None:
    """Write a CSV file, which appears whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    with draft.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *rows])
    draft.rename(file)


def learn(name: str, files: list[list[Path]], options: argparse.Namespace) -> None:
    """Train and measure one arm from each seed; `files` are those of the frames to train on, and of those held out."""
    arm = ARMS[name]
    frames = [
        Frames.load(each, options.caches, arm.source, arm.outputs, options.chunk, every)
        for each, every in zip(files, (1, options.every), strict=True)
    ]
    print(f"{name}: {len(frames[0])} frames to train on, {len(frames[1])} held out", flush=True)
    if arm.of_another_frame:
        frames = [shuffled(each) for each in frames]
    config = make_config(arm, frames[0], options, *read_spec(arm, frames[0], options.caches))
    _, make_policy, make_processors = POLICIES[options.policy]
    processors = make_processors(config, statistics_of(frames[0]))
    prepared = [prepare(each, processors[0], options.device) for each in frames]
    trained_cameras, took = {*frames[0].camera.tolist()}, 0.0
    for seed in map(int, options.seeds.split(",")):
        file = options.output / "open_loop" / f"{name}.{seed}.csv"
        if file.exists():
            continue
        if options.until is not None and took and time.time() + took > options.until:
            print(f"{name}: seed {seed} left out, it would take {took:.0f} s")
            break
        began = time.time()
        torch.manual_seed(seed)
        policy = make_policy(config)
        train(policy, prepared[0], arm, seed, options)
        if not arm.sees:
            close_eyes(policy)  # so that it is as blind in `geomcache eval`
        table = measure(policy, processors[1], frames[1], prepared[1], arm)
        save(policy, processors, options.output / "policies" / name / str(seed))
        rows = [
            (name, seed, options.steps, camera, int(camera in trained_cameras), *numbers) for camera, *numbers in table
        ]
        write_rows(file, rows)
        new, old = (np.mean([row[-2] for row in rows if row[4] == seen]) for seen in (0, 1))
        took = time.time() - began
        print(f"{name}, seed {seed}: {took:.0f} s, error {new:.4f} under new cameras, {old:.4f} under trained ones")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arm", required=True, choices=ARMS)
    parser.add_argument("--seeds", default="0,1,2", help="%(default)s")
    parser.add_argument("--frames", type=Path, required=True, help="folder that frames.py wrote")
    parser.add_argument("--caches", type=Path, required=True, help="folder of the recordings' caches")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--policy", choices=POLICIES, default="pi05_geometry", help="of model_size small (%(default)s)")
    parser.add_argument("--text", type=int, default=116, help="bytes of the task, and of Pi0.5's state (%(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=48, help="%(default)s")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (%(default)s)")
    parser.add_argument("--resolution", type=int, default=112, help="of the policy's pictures (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="geometry tokens a side and view (%(default)s)")
    parser.add_argument("--chunk", type=int, default=16, help="actions a prediction (%(default)s)")
    parser.add_argument("--every", type=int, default=4, help="measure one of so many frames (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", type=float, help="do not begin a seed that would end after this time, in seconds")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    files = [sorted(options.frames.glob(f"{kind}_??.npz")) for kind in ("train", "test")]
    if not all(files):
        sys.exit(f"learn.py: expected train_*.npz and test_*.npz in {options.frames}: record demonstrations first")
    learn(options.arm, files, options)


if __name__ == "__main__":
    main()
