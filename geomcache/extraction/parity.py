"""Parity: the geometry in a cache against that of the dataset's own pictures, encoded again here.

The difference is counted in float16 steps: the distance to the next float16 number, at the larger of the two values.
Near zero, where float16's steps become finer than float32's own noise, the step is that at 2^-8, 3.8e-6.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geomcache.cache.store import GeometryStore
from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import CacheIncompleteError, GeometryError, UserInputError
from geomcache.frames.of_cache import open_pictures
from geomcache.geometry import ComputeDtype
from geomcache.ranges import RowSet

SMALLEST_STEP_AT = 2.0**-8
# What another batch size or build of torch may change on the same kind of device. In fp32 that is less than a rounding.
# In bf16 the backbone's own rounding is coarser: it was seen to move single values near zero by 1,048 steps from fp32
# (DA3-SMALL at 112 px), and half of that is allowed. The next frame of the same episode was 3,218 steps away.
MAX_STEPS: dict[ComputeDtype, float] = {"fp32": 1.0, "bf16": 512.0}
ENCODED_TOGETHER = 4  # frames a forward


@dataclass(frozen=True, kw_only=True)
class OutputParity:
    """Differences of one output, in float16 steps, over all values of the frames compared."""

    output: str
    largest: float
    mean: float
    frame: str
    """Where the largest is: episode, frame and camera."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What `parity` found."""

    frames: int
    max_steps: float
    outputs: tuple[OutputParity, ...]

    def lines(self) -> Iterator[str]:
        """For the user."""
        yield f"parity of {self.frames} frames, in float16 steps (at most {self.max_steps:g})"
        yield f"  {'output':<12}{'largest':>9}{'mean':>10}"
        for found in self.outputs:
            yield f"  {found.output:<12}{found.largest:>9.3g}{found.mean:>10.3g}"

    def check(self) -> None:
        """Compare with the bound.

        Raises:
            GeometryError: a value differs by more.
        """
        for found in self.outputs:
            if not found.largest <= self.max_steps:
                raise GeometryError(
                    f"parity: {found.output}: expected at most {self.max_steps:g} float16 steps between the cache and"
                    f" the pictures encoded here, found {found.largest:.3g} in {found.frame}: the policy would see"
                    " another geometry here than it was trained with; compare the machines' decoder, device and torch"
                )


def parity(
    path: str | Path,
    frames: int,
    *,
    dataset: str | None = None,
    root: Path | None = None,
    revision: str | None = None,
    model: str | None = None,
    device: str | None = None,
    max_steps: float | None = None,
    seed: int = 0,
) -> ParityReport:
    """Encode some of a cache's frames again and compare.

    Args:
        path: of the cache.
        frames: how many, at random; all where the cache has no more.
        dataset: name of the dataset; the cache's where None.
        root: its folder, where it is local.
        revision: its branch, tag or commit on the Hub; the cache's where None.
        model: where to find the DA3, if not under the cache's name for it.
        device: as in `DA3Encoder.from_spec`.
        max_steps: bound of the report; of `MAX_STEPS` where None.
        seed: of the choice of frames.

    Returns:
        The differences; `ParityReport.check` compares them with the bound.

    Raises:
        UserInputError: `frames` is no positive number.
        CacheError: there is no such cache, it is empty or damaged, or it is not of this dataset.
        DatasetError: the dataset cannot be had or read.
        ModelError: the DA3 cannot be had, or its weights are not the cache's.
    """
    if frames < 1:
        raise UserInputError(f"parity: expected at least 1 frame, got {frames}")
    with GeometryStore.open(path) as store:
        rows = choose_rows(store, frames, seed)
        episodes = np.unique([store.locate(row)[0] for row in rows.tolist()])
        reader = open_pictures(store, episodes, dataset=dataset, root=root, revision=revision)
        encoder = DA3Encoder.from_spec(store.spec, model=model, device=device)
        names, steps = store.spec.outputs, []
        for start in range(0, len(rows), ENCODED_TOGETHER):
            part = rows[start : start + ENCODED_TOGETHER].tolist()
            pictures = [reader.read(row, row + 1).images for row in part]
            here = encoder.encode([np.concatenate(views) for views in zip(*pictures, strict=True)])
            there = dict(store.batch(part).items())
            steps.append({name: float16_steps(maps.cpu().numpy(), there[name]) for name, maps in here.items()})
        compared = {name: np.concatenate([part[name] for part in steps]) for name in names}  # [n, V, h, w, ...]
        bound = MAX_STEPS[store.spec.compute_dtype] if max_steps is None else max_steps
        outputs = tuple(_summary(store, name, rows, values) for name, values in compared.items())
        return ParityReport(frames=len(rows), max_steps=bound, outputs=outputs)


def float16_steps(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Distance of float16 numbers in float16 steps, as this file's head says. NaN where one is."""
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = np.maximum(np.maximum(np.abs(left), np.abs(right)), SMALLEST_STEP_AT)
    steps: NDArray[np.float64] = np.abs(left - right) / np.exp2(
        np.floor(np.log2(size)) - 10
    )  # 10 bits behind the first
    return steps


def choose_rows(store: GeometryStore, count: int, seed: int) -> NDArray[np.int64]:
    """Rows that are in the cache, at random, each once, in order.

    Raises:
        CacheIncompleteError: there is none.
    """
    if store.frames_present == 0:
        raise CacheIncompleteError(f"cache {store.path}: expected frames to compare, found none: extract some first")
    chosen = np.random.default_rng(seed).choice(
        store.frames_present, size=min(count, store.frames_present), replace=False
    )
    return RowSet(store.rows).rows_at(np.sort(chosen))


def _summary(store: GeometryStore, output: str, rows: NDArray[np.int64], steps: NDArray[np.float64]) -> OutputParity:
    row, view = np.unravel_index(int(np.argmax(steps)), steps.shape)[:2]
    episode, frame = store.locate(int(rows[row]))
    return OutputParity(
        output=output,
        largest=float(steps.max()),
        mean=float(steps.mean()),
        frame=f"episode {episode} frame {frame} camera {store.spec.camera_keys[view]}",
    )
