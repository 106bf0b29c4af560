"""Turn the errors of all arms and seeds into tables with intervals, and a plot.

    python pipelines/worth/report.py --results DIR [--output DIR]

DIR has open_loop/ARM.SEED.csv of learn.py. Everything is paired: two arms are compared on the same demonstration, under
the same camera, from the same seed. The interval is that of a bootstrap that draws seeds, demonstrations and cameras,
each by itself with replacement, and takes all of their combinations: the factors are crossed (Owen, "The pigeonhole
bootstrap", Annals of Applied Statistics, 2007). So it says what would differ with other seeds, other demonstrations and
other cameras.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.look.drawing import house_style
from geomcache.simulator.camera import CameraMove
from pipelines.worth import design
from pipelines.worth.design import ARMS, Arm

BASELINE = "none"
RESAMPLES, LEVEL = 9999, 0.95
MEASURES = {"xyz": "error of the translation", "gripper": "wrong gripper"}


Rows = dict[str, dict[int, list[dict[str, str]]]]
"""Lines of learn.py's tables by arm and seed."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, factor: float = 1.0, digits: int = 4, sign: str = "") -> str:
        """Return it as text, multiplied."""
        mean, low, high = (f"{value * factor:{sign}.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm's error, and its difference from that of the arm without geometry that sees the same."""

    arm: str
    error: Estimate
    difference: Estimate
    relative: Estimate
    """The difference divided by the error without geometry."""
    by_seed: tuple[float, ...]
    """The relative difference of each seed."""
    against_control: Estimate | None = None
    """Relative difference from its control, over the seeds of both; of true geometry."""


def read(folder: Path) -> Rows:
    """Return the rows of each arm and seed."""
    found: Rows = {}
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        found.setdefault(rows[0]["arm"], {})[int(rows[0]["seed"])] = rows
    return {arm: found[arm] for arm in ARMS if arm in found}


def table(rows: dict[int, list[dict[str, str]]], seeds: Sequence[int], measure: str, seen: int) -> NDArray[Any]:
    """Return an arm's errors, [seeds, demonstrations, cameras]."""
    chosen = {seed: [row for row in rows[seed] if int(row["seen"]) == seen] for seed in seeds}
    demonstrations = sorted({row["demonstration"] for row in chosen[seeds[0]]})
    cameras = sorted({row["camera"] for row in chosen[seeds[0]]})
    values = np.full((len(seeds), len(demonstrations), len(cameras)), np.nan)
    for place, seed in enumerate(seeds):
        for row in chosen[seed]:
            values[place, demonstrations.index(row["demonstration"]), cameras.index(row["camera"])] = row[measure]
    if np.isnan(values).any():
        raise SystemExit("report.py: expected every demonstration under every camera, some are missing: run learn.py")
    return values


def kind_of(row: dict[str, str]) -> str:
    """Return the kind of the move of a row's camera."""
    return design.kind(CameraMove.parse(row["camera"]))


def of_kind(rows: dict[int, list[dict[str, str]]], kind: str) -> dict[int, list[dict[str, str]]]:
    """Return the rows of each seed under cameras that were moved so."""
    return {seed: [row for row in each if kind_of(row) == kind] for seed, each in rows.items()}


def resampled(values: NDArray[Any]) -> NDArray[Any]:
    """Return means of [seeds, demonstrations, cameras], each factor drawn with replacement, [RESAMPLES]."""
    generator = np.random.default_rng(0)  # the same draws for every arm, so that differences are paired
    weights = []
    for count in values.shape:
        drawn = generator.integers(count, size=(RESAMPLES, count))
        weights.append(np.stack([np.bincount(row, minlength=count) for row in drawn]) / count)
    means: NDArray[Any] = np.einsum("sdc,rs,rd,rc->r", values, *weights, optimize=True)
    return means


def estimate(mean: float, draws: NDArray[Any]) -> Estimate:
    """Return the percentile interval."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean=float(mean), low=float(low), high=float(high))


def compare(arm: str, values: NDArray[Any], baseline: NDArray[Any]) -> ArmResult:
    """Compare an arm's errors [seeds, demonstrations, cameras] with those without geometry."""
    drawn, drawn_baseline = resampled(values), resampled(baseline)
    return ArmResult(
        arm=arm,
        error=estimate(values.mean(), drawn),
        difference=estimate(values.mean() - baseline.mean(), drawn - drawn_baseline),
        relative=estimate(values.mean() / baseline.mean() - 1, drawn / drawn_baseline - 1),
        by_seed=tuple((values.mean((1, 2)) / baseline.mean((1, 2)) - 1).tolist()),
    )


def paired(found: Rows, arm: str, other: str, measure: str, seen: int) -> ArmResult | None:
    """Compare an arm with another one over the seeds of both; None if they have none in common."""
    seeds = sorted({*found[arm]} & {*found.get(other, {})})
    if not seeds:
        return None
    return compare(arm, *(table(found[each], seeds, measure, seen) for each in (arm, other)))


def compare_all(found: Rows, measure: str, seen: int) -> list[ArmResult]:
    """Compare every arm with its baseline, and arms of true geometry with their control."""
    results = []
    for name in found:
        result = paired(found, name, ARMS[name].baseline, measure, seen)
        if result is None:
            continue
        control = paired(found, name, ARMS[name].control, measure, seen)
        if control is not None:
            result = replace(result, against_control=control.relative)
        results.append(result)
    return results


def compare_by_kind(found: Rows) -> dict[str, list[ArmResult]]:
    """Compare all arms under cameras never seen, by the kind of their move.

    A policy can know of a camera only what others of its kind have taught it.
    """
    kinds = dict.fromkeys(kind_of(row) for row in next(iter(found[BASELINE].values())) if row["seen"] == "0")
    return {kind: compare_all({arm: of_kind(rows, kind) for arm, rows in found.items()}, "xyz", 0) for kind in kinds}


def markdown(results: dict[str, list[ArmResult]], text: str) -> str:
    """Return tables of all arms."""
    lines = [text]
    for title, rows in results.items():
        lines += [
            "",
            f"### {title}",
            "",
            "| arm | error | against no geometry | each seed | against its control |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            is_baseline = row.arm == ARMS[row.arm].baseline
            change = "" if is_baseline else f"{row.relative.text(100, 1, '+')} %"
            seeds = "" if is_baseline else ", ".join(f"{100 * value:+.1f}" for value in row.by_seed)
            control = "" if row.against_control is None else f"{row.against_control.text(100, 1, '+')} %"
            lines.append(f"| {ARMS[row.arm].text} | {row.error.text()} | {change} | {seeds} | {control} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[ArmResult]], file: Path, title: str) -> None:
    """Draw the change of each arm's error against no geometry by title of the results: its interval, and each seed."""
    from matplotlib.figure import Figure

    shown = [(name, row) for name, rows in results.items() for row in rows if row.arm != ARMS[row.arm].baseline]
    with house_style():
        figure = Figure(figsize=(9, 0.45 * len(shown) + 1.7), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        for place, (_, row) in enumerate(reversed(shown)):
            change = row.relative
            is_control = ARMS[row.arm].of_another_frame or ARMS[row.arm].source == "da3" or not ARMS[row.arm].sees
            colour = "#9e9e9e" if is_control else "#00695c"
            axes.plot([100 * change.low, 100 * change.high], [place, place], color=colour, linewidth=5, alpha=0.45)
            axes.plot(100 * change.mean, place, "o", color=colour, markersize=9)
            axes.plot(100 * np.array(row.by_seed), np.full(len(row.by_seed), place - 0.27), "|", color=colour)
        axes.axvline(0, color="black", linewidth=1)
        labels = [f"{name}: {ARMS[row.arm].text}" if name else ARMS[row.arm].text for name, row in reversed(shown)]
        axes.set_yticks(range(len(shown)), labels)
        axes.set_xlabel("change of the error of predicted actions against no geometry, % (left is better)")
        axes.set_title(title, loc="left")
        figure.savefig(file)


def has_true_tokens(arm: Arm) -> bool:
    """Return whether an arm gets true geometry as tokens, its own or that of another frame."""
    return arm.source == "oracle" and arm.mode == "prefix"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="folder; that of --results")
    arguments = parser.parse_args()
    output = arguments.output or arguments.results
    found = read(arguments.results / "open_loop")
    pairs = {arm: sorted({*rows} & {*found.get(ARMS[arm].baseline, {})}) for arm, rows in found.items()}
    if not pairs.get(BASELINE):
        raise SystemExit("report.py: expected errors without geometry from at least one seed, found none: run learn.py")
    results: dict[str, list[ArmResult]] = {}
    for measure, name in MEASURES.items():
        for seen, cameras in ((0, "cameras never seen"), (1, "trained cameras")):
            results[f"{name}, {cameras}"] = compare_all(found, measure, seen)
    by_kind = compare_by_kind(found)
    results |= {f"{MEASURES['xyz']}, cameras never seen: {kind}": rows for kind, rows in by_kind.items()}
    shape = table(found[BASELINE], pairs[BASELINE], "xyz", 0).shape
    text = (
        f"{shape[0]} seeds, {shape[1]} held-out demonstrations, {shape[2]} cameras never seen. Errors of translation"
        " are in action units, of the gripper shares of wrong signs; 95 % intervals. An arm with fewer seeds is"
        " compared on those that it has. The control of true geometry is DA3 with random weights; without the hand's"
        " picture, rays of another frame."
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "open_loop.md").write_text(markdown(results, text))
    content = {name: [asdict(row) for row in rows] for name, rows in results.items()}
    (output / "open_loop.json").write_text(json.dumps({"seeds": pairs, "results": content}, indent=1))
    title = f"{shape[0]} seeds x {shape[1]} demonstrations x {shape[2]} new cameras"
    draw({"": next(iter(results.values()))}, output / "open_loop.png", title)
    shown = {kind: [row for row in rows if has_true_tokens(ARMS[row.arm])] for kind, rows in by_kind.items()}
    draw(shown, output / "by_kind.png", f"{title}, by what was changed of the camera")
    print((output / "open_loop.md").read_text())


if __name__ == "__main__":
    main()
