"""Charts of the report's page, as SVG. Every series has its colour in all charts; the page has the legend."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from geomcache.look.drawing import house_style

SERIES_COLOURS = ("#1f6fb4", "#c4610a", "#2a8a4a", "#9c3fa0", "#a67c00", "#b3263a")


def series_colour(number: int) -> str:
    """Return the colour of a series."""
    return SERIES_COLOURS[number % len(SERIES_COLOURS)]


def histogram(series: Sequence[NDArray[np.int64]], edges: NDArray[np.float64]) -> bytes:
    """Draw histograms over the same bins, each as the share of its values. Returns SVG."""
    with house_style():
        figure = Figure((3.4, 1.9), layout="constrained")
        axes = figure.add_subplot()
        for number, counts in enumerate(series):
            shares = counts / max(int(counts.sum()), 1)
            axes.stairs(shares * 100, edges, fill=True, color=series_colour(number), alpha=0.2)
            axes.stairs(shares * 100, edges, color=series_colour(number), linewidth=1.2)
        axes.set_ylabel("% of values")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=5)
        return _svg(figure)


def over_time(
    number: int,
    lines: Iterable[NDArray[np.float64]],
    limits: tuple[float, float],
    span: tuple[int, int],
    label: str,
    ticks: Iterable[int] = (),
) -> bytes:
    """Draw a mean over time with the range around it. Returns SVG.

    Args:
        number: of the series, for its colour.
        lines: one for each gapless stretch of time: [points, 4] of time, mean, lowest and highest value.
        limits: values at the lower and the upper end.
        span: times at the left and the right end.
        label: what the values are.
        ticks: times that a line marks.
    """
    with house_style():
        figure = Figure((11.0, 2.0), layout="constrained")
        axes = figure.add_subplot()
        for tick in ticks:
            axes.axvline(tick, color="#d9dce1", linewidth=0.8)
        colour = series_colour(number)
        for line in lines:
            times, means, lowest, highest = line.T
            axes.fill_between(times, lowest, highest, color=colour, alpha=0.22, lw=0)
            axes.plot(times, means, color=colour, linewidth=1.3, marker="o" if len(line) == 1 else "", markersize=3)
        low, high = limits
        margin = 0.03 * max(high - low, 1e-3 * max(abs(high), 1e-3))
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlim(span[0], max(span[1], span[0] + 1))
        axes.set_ylabel(label)
        axes.set_xlabel("frame index of the dataset")
        return _svg(figure)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})  # the same bytes at every run
    return buffer.getvalue()
