"""Ask what true geometry says that the robot's state does not say: a regression of the one on the other.

    python pipelines/worth/redundancy.py --frames DIR --caches DIR [--parts test_00,test_01]

For each map, a quadratic ridge regression on the state is fitted to blocks of frames and measured on the blocks between
them: R² over all cells, once for each camera by itself, as in a dataset with a fixed camera, and once over all cameras
together. 1: the state says all of it. 0: nothing but the mean. Depth is its logarithm. Frames between those of the same
demonstration are an easy test: what is not said here is not said elsewhere.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.store import GeometryStore
from pipelines.worth.frames import cache_of

BLOCK = 5  # frames
RIDGE = 1e-3
CONSTANT = 1e-6  # total squares below which a map does not change
VIEWS = ("first view", "wrist")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Frames of demonstrations: the same moments under each of the cameras."""

    state: NDArray[np.float64]  # [C, T, 8]
    maps: dict[str, NDArray[np.float64]]  # [C, T, n] of each map

    @classmethod
    def read(cls, frames: Path, caches: Path, parts: list[str]) -> "Seen":
        states, maps = [], []
        for part in parts:
            content = np.load(frames / f"{part}.npz")
            cameras = len(content["length"])
            with GeometryStore.open(cache_of(caches, part, "oracle")) as store:
                found = dict(store.batch(np.arange(int(content["length"].sum()))).items())
            states.append(content["state"].astype(np.float64).reshape(cameras, -1, 8))
            values = {"rays": found["ray"].astype(np.float64), "depth": np.log(found["depth"].astype(np.float64))}
            maps.append(
                {
                    f"{name} of the {view}": each[:, place].reshape(cameras, len(each) // cameras, -1)
                    for name, each in values.items()
                    for place, view in enumerate(VIEWS)
                }
            )
        return cls(
            state=np.concatenate(states, axis=1),
            maps={name: np.concatenate([each[name] for each in maps], axis=1) for name in maps[0]},
        )


def quadratic(state: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the terms of a quadratic in the state [n, 8], [n, 45]."""
    scaled = (state - state.mean(0)) / (state.std(0) + 1e-9)
    first, second = np.triu_indices(scaled.shape[1])
    return np.concatenate([np.ones((len(scaled), 1)), scaled, scaled[:, first] * scaled[:, second]], axis=1)


def explained(state: NDArray[np.float64], values: NDArray[np.float64], fitted: NDArray[np.bool_]) -> float:
    """Return R² of the values [n, m] on the rows that were not fitted; NaN where they do not change."""
    terms, mean = quadratic(state), values[fitted].mean(0)
    matrix = terms[fitted].T @ terms[fitted] + RIDGE * np.eye(terms.shape[1])
    weights = np.linalg.solve(matrix, terms[fitted].T @ (values[fitted] - mean))
    rest = ~fitted
    total = float(((values[rest] - values[rest].mean(0)) ** 2).sum())
    error = float(((values[rest] - mean - terms[rest] @ weights) ** 2).sum())
    return 1 - error / total if total > CONSTANT else float("nan")


def rows(seen: Seen) -> Iterator[tuple[str, list[float], float]]:
    """Yield each map's name, R² under each camera by itself, and over all of them."""
    cameras, moments = seen.state.shape[:2]
    fitted = np.arange(moments) % (2 * BLOCK) < BLOCK
    for name, values in seen.maps.items():
        alone = [explained(seen.state[camera], values[camera], fitted) for camera in range(cameras)]
        together = explained(seen.state.reshape(-1, 8), values.reshape(cameras * moments, -1), np.tile(fitted, cameras))
        yield name, alone, together


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=Path, required=True, help="folder that frames.py wrote")
    parser.add_argument("--caches", type=Path, required=True, help="folder of the recordings' caches")
    parser.add_argument("--parts", help="names, separated by commas; all held-out ones")
    arguments: Any = parser.parse_args()
    found = [file.stem for file in sorted(arguments.frames.glob("test_??.npz"))]
    parts = arguments.parts.split(",") if arguments.parts else found
    seen = Seen.read(arguments.frames, arguments.caches, parts)
    cameras, moments = seen.state.shape[:2]
    print(f"{len(parts)} demonstrations, {moments} frames, {cameras} cameras: R² of each map from the state\n")
    print("| map | one fixed camera | all cameras |\n| --- | --- | --- |")
    for name, alone, together in rows(seen):
        if np.isnan(together):
            print(f"| {name} | never changes | never changes |")
        else:
            print(f"| {name} | {min(alone):.5f} to {max(alone):.5f} | {together:.3f} |")


if __name__ == "__main__":
    main()
