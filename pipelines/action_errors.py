"""Compare the actions that a policy predicts with right and with wrong geometry: does it go by its geometry?

    python pipelines/action_errors.py --policy DIR --cache PATH --root DATASET [--output FILE.csv] [--at-least 1.5]

For every frame of the dataset, a chunk of actions is predicted five times, from the same noise:

    right     with the frame's own geometry, from the cache
    swapped   with the two views' geometry in each other's place
    missing   without geometry tokens, as with use_geom_prefix=false
    other     with the geometry of a frame of another episode, drawn once for all
    pictures  with its own geometry, and the pictures of that other frame

A frame's error is the mean absolute difference from the demonstrated actions, over the chunk and the action's
dimensions. Errors are paired by frame, so that neither the simulator nor luck in an episode plays a part. `times` is
the mean error divided by that with right geometry; its interval is that of a bootstrap of whole episodes. The exit code
is 1 if swapped, missing or another frame's geometry does not make the error at least so many times as large.
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from numpy.typing import NDArray
from torch import Tensor

import geomcache.policy  # noqa: F401 - registers the policies and their processor steps
from geomcache.cache.store import GeometryStore
from geomcache.errors import GeomcacheError
from geomcache.geometry import Geometry
from geomcache.simulator.record import ACTION, STATE
from geomcache.training.columns import read_columns_alone

RIGHT = "right"
WRONG = ("swapped", "missing", "other")
RESAMPLES = 9999
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of all frames."""

    episodes: NDArray[np.int64]  # [N] the frame's episode
    arms: dict[str, NDArray[np.float64]]  # of each arm, [N]

    def times(self, arm: str) -> tuple[float, float, float]:
        """Return how many times as large an arm's mean error is as with right geometry, and the 95 % interval."""
        numbers = np.unique(self.episodes)
        sums = np.array(
            [[self.arms[name][self.episodes == number].sum() for name in (arm, RIGHT)] for number in numbers]
        )  # [E, 2]
        drawn = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
        wrong, right = sums[drawn].sum(axis=1).T
        low, high = np.quantile(wrong / right, [0.025, 0.975])
        return float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)

    def lines(self) -> list[str]:
        """Return a table for the user."""
        right = self.arms[RIGHT]
        lines = [f"{'geometry':<9} {'error':>7} {'times':>6} {'95 % interval':>15} {'frames worse':>13}"]
        for name, errors in self.arms.items():
            times, low, high = self.times(name)
            interval = "" if name == RIGHT else f"[{low:.2f}, {high:.2f}]"
            worse = "" if name == RIGHT else f"{(errors > right).mean():.1%}"
            lines.append(f"{name:<9} {errors.mean():>7.4f} {times:>6.2f} {interval:>15} {worse:>13}")
        return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--policy", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--output", type=Path, help="file to write with a row for each frame")
    parser.add_argument("--at-least", type=float, default=1.0, help="of the exit code; %(default)s")
    arguments = parser.parse_args()
    errors = measure(arguments.policy, arguments.cache, arguments.root)
    if arguments.output is not None:
        write(errors, arguments.output)
    print(f"{len(errors.episodes)} frames of {len(np.unique(errors.episodes))} episodes")
    print("\n".join(errors.lines()))
    for arm in WRONG:
        times, *_ = errors.times(arm)
        if times < arguments.at_least:
            sys.exit(
                f"action_errors.py: geometry {arm}: expected at least {arguments.at_least:g} times the error with right"
                f" geometry, found {times:.2f}: the policy does not go by its geometry"
            )


def measure(checkpoint: str, cache: Path, root: Path) -> Errors:
    """Predict actions for every frame of a dataset with every geometry, and compare them with its actions."""
    policy = get_policy_class(PreTrainedConfig.from_pretrained(checkpoint).type).from_pretrained(checkpoint)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=checkpoint)
    chunk = policy.config.chunk_size
    meta = LeRobotDataset("geomcache/demonstrations", root=root).meta
    offsets = {ACTION: [step / meta.fps for step in range(chunk)]}
    dataset = LeRobotDataset("geomcache/demonstrations", root=root, delta_timestamps=offsets, video_backend="pyav")
    read_columns_alone(dataset)
    episodes = np.asarray(dataset.hf_dataset["episode_index"]).astype(np.int64)
    others = frames_of_others(episodes)
    collected: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    with GeometryStore.open(cache) as store:
        for rows in batches(len(dataset)):
            items = [dataset[row] for row in rows]
            batch = observations(items, [*meta.camera_keys, STATE])
            batch["task"] = [item["task"] for item in items]
            pictures = observations([dataset[row] for row in others[rows]], meta.camera_keys)
            own, other = (_tensors(store.batch(numbers)) for numbers in (rows, others[rows]))
            truth = torch.stack([item[ACTION] for item in items])  # [B, chunk, action]
            counts = ~torch.stack([item[f"{ACTION}_is_pad"] for item in items])  # [B, chunk]
            cases = {
                RIGHT: (batch, own),
                "swapped": (batch, swapped(own)),
                "missing": (batch, None),
                "other": (batch, other),
                "pictures": (batch | pictures, own),
            }
            for arm, (observed, geometry) in cases.items():
                actions = postprocess(predict(policy, preprocess(dict(observed)), geometry, seed=int(rows[0])))
                collected[arm].append(chunk_errors(actions, truth, counts))
    return Errors(episodes=episodes, arms={arm: np.concatenate(parts) for arm, parts in collected.items()})


def predict(policy: Any, batch: dict[str, Any], geometry: Geometry | None, seed: int) -> Tensor:
    """Return a chunk of actions [B, chunk, action] as the policy scales them; None: no geometry tokens."""
    policy.config.use_geom_prefix = geometry is not None
    torch.manual_seed(seed)  # of the noise that the flow starts from
    chunk: Tensor = policy.predict_action_chunk(batch | ({} if geometry is None else geometry.to_batch()))
    return chunk


def chunk_errors(actions: Tensor, truth: Tensor, counts: Tensor) -> NDArray[np.float64]:
    """Return the mean absolute error [B] of chunks [B, chunk, action], over the actions that count [B, chunk]."""
    off = (actions - truth).abs().mean(-1)
    errors: NDArray[np.float64] = ((off * counts).sum(1) / counts.sum(1)).double().numpy()
    return errors


def swapped(geometry: Geometry) -> Geometry:
    """Return each view's geometry in the place of the other's."""
    return Geometry(**{name: values.flip(1) for name, values in geometry.items()})  # [B, V, ...]


def frames_of_others(episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each frame the row of one of another episode, drawn evenly."""
    generator = np.random.default_rng(0)
    return np.array([generator.choice(np.flatnonzero(episodes != episode)) for episode in episodes])


def observations(items: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Return a batch of what is seen."""
    return {key: torch.stack([item[key] for item in items]) for key in keys}


def batches(count: int) -> Iterator[NDArray[np.int64]]:
    """Yield row numbers, `BATCH` at a time."""
    for first in range(0, count, BATCH):
        yield np.arange(first, min(first + BATCH, count))


def _tensors(maps: Geometry) -> Geometry:
    return Geometry(**{name: torch.from_numpy(values) for name, values in maps.items()})


def write(errors: Errors, file: Path) -> None:
    """Write a row for each frame."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row", "episode", *errors.arms])
        for row, (episode, *values) in enumerate(zip(errors.episodes, *errors.arms.values(), strict=True)):
            writer.writerow([row, episode, *(f"{value:.6f}" for value in values)])


if __name__ == "__main__":
    try:
        main()
    except GeomcacheError as error:
        print(f"action_errors.py: {error}", file=sys.stderr)
        sys.exit(2)
