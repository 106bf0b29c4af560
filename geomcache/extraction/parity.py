"""Compare a cache's geometry with that of the dataset's images, encoded again on this machine.

The units are those of `differences`. What is accepted depends on dtype and device: kernels of other devices and batch
sizes round differently, and a compiled network rounds differently from an eager one. `TOLERANCES` come from what was
measured on one H200 with random weights of DA3-LARGE (benchmarks/RESULTS.md, "How far numbers move"):

    mean of the angles, degrees                        alike            not alike
    fp32    batch size, engine, GPU and CPU            up to 0.014      up to 0.042    (the larger ones with TF32)
    bf16    batch size, engine; fp32, head in bf16     up to 0.098      up to 0.41
    faults  another reference view                     0.075: refused in fp32 only
            weights changed by 0.1 %; by 1 %           0.22, refused but in bf16 on another device; 1.9
            the next frame, BGR, turned, view order    8.6 and more

The mean is the sharper bound: a single value near zero can be far off. Nothing here could tell another reference view
in bf16, or weights that differ by far less than 1 %, from rounding. Both are compared by name and by hash before
anything is encoded: see `DA3Encoder.from_spec`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.commands import recorded_machines
from geomcache.cache.store import GeometryStore
from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import CacheIncompleteError, GeometryError, UserInputError
from geomcache.extraction.differences import (
    DIRECTION,
    ORIGIN,
    RELATIVE,
    UNITS,
    GeometryArrays,
    float16_steps,
    measure,
    spread_of,
)
from geomcache.frames.of_cache import open_pictures
from geomcache.frames.reader import FrameReader
from geomcache.geometry import DA3, ComputeDtype
from geomcache.ranges import RowSet

ENCODED_TOGETHER = 4  # frames a forward


@dataclass(frozen=True)
class Tolerance:
    """How far apart the two may be in one unit."""

    mean: float
    largest: float


def _tolerances(direction: Tolerance, origin: Tolerance, relative: Tolerance) -> dict[str, Tolerance]:
    return {UNITS[DIRECTION]: direction, UNITS[ORIGIN]: origin, RELATIVE: relative}


TOLERANCES: Mapping[tuple[ComputeDtype, bool], Mapping[str, Tolerance]] = {
    ("fp32", True): _tolerances(Tolerance(0.02, 0.5), Tolerance(0.001, 0.02), Tolerance(1e-4, 0.005)),
    ("fp32", False): _tolerances(Tolerance(0.06, 1.0), Tolerance(0.003, 0.04), Tolerance(2e-4, 0.005)),
    ("bf16", True): _tolerances(Tolerance(0.15, 5.0), Tolerance(0.0075, 0.1), Tolerance(7.5e-4, 0.015)),
    ("bf16", False): _tolerances(Tolerance(0.5, 10.0), Tolerance(0.025, 0.2), Tolerance(2.5e-3, 0.025)),
}
"""By dtype, and by whether cache and encoder ran on the same kind of device; then by unit."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of `differences` over all cells of the frames compared."""

    name: str
    unit: str
    mean: float
    largest: float
    where: str
    """Episode, frame and camera of the largest."""
    tolerance: Tolerance
    neighbours_mean: float | None
    """The same between cached frames and those next to them, for comparison; None where no frame has a neighbour."""
    neighbours_largest: float | None


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Differences of one output in float16 steps."""

    output: str
    mean: float
    largest: float
    where: str


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What `parity` measured."""

    frames: int
    dtype: ComputeDtype
    device: str
    cached_on: tuple[str, ...]
    """The devices that the cache was made on; empty where that is not recorded."""
    alike: bool
    """Whether `cached_on` is `device` alone."""
    measures: tuple[Measure, ...]
    steps: tuple[Steps, ...]
    max_steps: float | None = None
    """An additional bound on the steps."""

    def lines(self) -> Iterator[str]:
        """Yield the report as text for the user."""
        cached_on = " and ".join(self.cached_on) or "a device that is not recorded"
        yield f"parity of {self.frames} frames: cached in {self.dtype} on {cached_on}, encoded on {self.device}"
        yield f"  {'':<16}{'mean':>9}{'at most':>9}{'largest':>9}{'at most':>9}   next frame: mean, largest"
        for entry in self.measures:
            numbers = entry.mean, entry.tolerance.mean, entry.largest, entry.tolerance.largest
            neighbours = [entry.neighbours_mean, entry.neighbours_largest]
            shown = "".join("        -" if value is None else f"{value:>9.3g}" for value in neighbours)
            yield f"  {entry.name:<16}{''.join(f'{value:>9.3g}' for value in numbers)}{shown}  {entry.unit}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types, the float16 steps included."""
        return {"accepted": not self.problems(), **dataclasses.asdict(self)}

    def problems(self) -> list[str]:
        """Return what is beyond its bound, worded for a message."""
        problems = []
        for entry in self.measures:
            for kind, value in (("mean", entry.mean), ("largest", entry.largest)):
                bound = getattr(entry.tolerance, kind)
                if not value <= bound:  # NaN is beyond it, too
                    problems.append(
                        f"{entry.name}: expected a {kind} difference of at most {bound:g} {entry.unit} between the"
                        f" cache and the images encoded here, found {value:.3g} (largest in {entry.where})"
                    )
        if self.max_steps is not None:
            problems += [
                f"{steps.output}: expected at most {self.max_steps:g} float16 steps between the cache and the images"
                f" encoded here, found {steps.largest:.3g} in {steps.where}"
                for steps in self.steps
                if not steps.largest <= self.max_steps
            ]
        return problems

    def check(self) -> None:
        """Compare with the bounds.

        Raises:
            GeometryError: something is beyond its bound; the message names the first.
        """
        problems = self.problems()
        if problems:
            raise GeometryError(
                f"parity: {problems[0]}: the policy would see another geometry here than it was trained with; compare"
                " the machines' video decoder, device and torch"
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
        frames: how many, at random; all of them if the cache has no more.
        dataset: name of the dataset; None for the cache's.
        root: its folder, if it is on this machine.
        revision: its branch, tag or commit on the Hub; None for the cache's.
        model: where to find the DA3, if not under the cache's name for it.
        device: as in `DA3Encoder.from_spec`.
        max_steps: additional bound of the report, in float16 steps.
        seed: of the choice of frames.

    Returns:
        The differences; `ParityReport.check` compares them with the bounds.

    Raises:
        UserInputError: `frames` is not positive, or the cache's geometry was not made from pictures.
        CacheError: there is no such cache, it is empty or damaged, or it is not of this dataset.
        DatasetError: the dataset is not available or cannot be read.
        ModelError: the DA3 is not available, or its weights are not the cache's.
    """
    if frames < 1:
        raise UserInputError(f"parity: expected at least 1 frame, got {frames}")
    with GeometryStore.open(path) as store:
        _require_da3(store)
        rows = choose_rows(store, frames, seed)
        episodes = np.unique([store.locate(row)[0] for row in rows.tolist()])
        reader = open_pictures(store, episodes, dataset=dataset, root=root, revision=revision)
        encoder = DA3Encoder.from_spec(store.spec, model=model, device=device, feature_basis=store.feature_basis)
        stored, computed = dict(store.batch(rows).items()), _encode(encoder, reader, rows.tolist())
        cached_on = tuple(dict.fromkeys(machine.device for machine in recorded_machines(store.path)))
        alike = set(cached_on) == {encoder.device_name}
        return ParityReport(
            frames=len(rows),
            dtype=store.spec.compute_dtype,
            device=encoder.device_name,
            cached_on=cached_on,
            alike=alike,
            measures=_measures(store, rows, stored, computed, TOLERANCES[store.spec.compute_dtype, alike]),
            steps=tuple(
                Steps(output=name, **_summary(store, rows, float16_steps(stored[name], computed[name])))
                for name in store.spec.outputs
            ),
            max_steps=max_steps,
        )


def _require_da3(store: GeometryStore) -> None:
    if store.spec.source != DA3:
        raise UserInputError(
            f"parity: expected a cache of DA3, which can be computed again, found one of {store.spec.source}:"
            " record it again and compare the files"
        )


def choose_rows(store: GeometryStore, count: int, seed: int) -> NDArray[np.int64]:
    """Choose rows that are in the cache at random, each once, in order.

    Raises:
        CacheIncompleteError: there is none.
    """
    if store.frames_present == 0:
        raise CacheIncompleteError(f"cache {store.path}: expected frames to compare, found none: extract some first")
    chosen = np.random.default_rng(seed).choice(
        store.frames_present, size=min(count, store.frames_present), replace=False
    )
    return RowSet(store.rows).rows_at(np.sort(chosen))


def _encode(encoder: DA3Encoder, reader: FrameReader, rows: list[int]) -> dict[str, NDArray[np.float16]]:
    parts: list[dict[str, NDArray[np.float16]]] = []
    for start in range(0, len(rows), ENCODED_TOGETHER):
        images = [reader.read(row, row + 1).images for row in rows[start : start + ENCODED_TOGETHER]]
        geometry = encoder.encode([np.concatenate(views) for views in zip(*images, strict=True)])
        parts.append({name: maps.cpu().numpy() for name, maps in geometry.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measures(
    store: GeometryStore,
    rows: NDArray[np.int64],
    stored: GeometryArrays,
    computed: GeometryArrays,
    tolerances: Mapping[str, Tolerance],
) -> tuple[Measure, ...]:
    spread = spread_of(store.statistics["ray"])
    differences = measure(stored, computed, spread)
    between_frames = _between_neighbours(store, rows, stored, spread)
    result = []
    for name, values in differences.items():
        unit = UNITS.get(name, RELATIVE)
        others = between_frames.get(name)
        result.append(
            Measure(
                name=name,
                unit=unit,
                **_summary(store, rows, values),
                tolerance=tolerances[unit],
                neighbours_mean=None if others is None else float(others.mean()),
                neighbours_largest=None if others is None else float(others.max()),
            )
        )
    return tuple(result)


def _between_neighbours(
    store: GeometryStore, rows: NDArray[np.int64], stored: GeometryArrays, spread: float
) -> dict[str, NDArray[np.float64]]:
    """Compare cached frames with the next ones of their episodes, or the ones before; empty where no frame has one."""
    neighbours = [_neighbour(store, row) for row in rows.tolist()]
    chosen = [number for number, row in enumerate(neighbours) if row is not None]
    if not chosen:
        return {}
    others = dict(store.batch([row for row in neighbours if row is not None]).items())
    return measure({name: maps[chosen] for name, maps in stored.items()}, others, spread)


def _neighbour(store: GeometryStore, row: int) -> int | None:
    episode, frame = store.locate(row)
    length = int(store.episode_length[episode])
    inside = [row + step for step in (1, -1) if 0 <= frame + step < length]
    return next((other for other in inside if store.covers([other]).all()), None)


def _summary(store: GeometryStore, rows: NDArray[np.int64], values: NDArray[np.float64]) -> dict[str, Any]:
    """Return mean, largest, and where the largest is, of values [n, V, h, w, ...]."""
    number, view = np.unravel_index(int(np.argmax(values)), values.shape)[:2]
    episode, frame = store.locate(int(rows[number]))
    return {
        "mean": float(values.mean()),
        "largest": float(values.max()),
        "where": f"episode {episode} frame {frame} camera {store.spec.camera_keys[view]}",
    }
