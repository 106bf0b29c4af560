"""Charts as inline SVG that stretches to any width; words stand beside it in HTML, so that they keep their size.

Colours are the page's CSS variables --series-0 to --series-5, so that they follow light and dark.
"""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

SERIES_COLOURS = 6


def legend(names: Sequence[str]) -> str:
    """Which colour is which series."""
    items = (
        f'<span><i style="background:{_colour(number)}"></i>{escape(name)}</span>' for number, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def histogram(title: str, series: Sequence[NDArray[np.int64]], edges: NDArray[np.float64], note: str) -> str:
    """Outlines of several histograms over the same bins, each as high as the share of its values."""
    shares = [counts / max(int(counts.sum()), 1) for counts in series]
    top = max(float(share.max()) for share in shares) or 1.0
    x = np.linspace(0.0, 100.0, len(edges), dtype=np.float64).repeat(2)
    marks = []
    for number, share in enumerate(shares):
        heights = 100.0 - 96.0 * np.concatenate(([0.0], share.repeat(2), [0.0])) / top
        marks.append(
            f'<polygon points="{_points(x, heights)}" fill="{_colour(number)}" fill-opacity=".18"'
            f' stroke="{_colour(number)}"/>'
        )
    return _figure(title, marks, (f"{edges[0]:.3g}", f"{edges[-1]:.3g}"), note=note)


def over_time(
    title: str,
    number: int,
    groups: Sequence[tuple[float, float, float, float, int]],
    limits: tuple[float, float],
    span: tuple[int, int],
    ticks: Iterable[int] = (),
) -> str:
    """A mean over time with the range around it.

    Args:
        title: of the chart.
        number: of the series, for its colour.
        groups: (time, mean, lowest, highest, segment) of groups of frames; lines break between segments.
        limits: values at the lower and the upper end.
        span: times at the left and the right end.
        ticks: times that are marked by a line.
    """
    low, high = limits
    width = max(span[1] - span[0], 1)
    values = np.array(groups)  # [groups, 5]
    x = (values[:, 0] - span[0]) / width * 100.0
    mean, lowest, highest = (98.0 - (values[:, k] - low) / max(high - low, 1e-9) * 96.0 for k in (1, 2, 3))
    marks = [
        f'<line x1="{at:.2f}" x2="{at:.2f}" y1="0" y2="100" class="tick"/>'
        for at in ((tick - span[0]) / width * 100.0 for tick in ticks)
    ]
    for part in np.split(np.arange(len(values)), np.flatnonzero(np.diff(values[:, 4])) + 1):
        there, back = part, part[::-1]
        band = _points(np.concatenate((x[there], x[back])), np.concatenate((lowest[there], highest[back])))
        marks.append(f'<polygon points="{band}" fill="{_colour(number)}" fill-opacity=".22"/>')
        marks.append(f'<polyline points="{_points(x[part], mean[part])}" fill="none" stroke="{_colour(number)}"/>')
    return _figure(title, marks, (f"frame {span[0]}", f"{span[1]}"), values=(f"{low:.3g}", f"{high:.3g}"))


def _figure(
    title: str, marks: Sequence[str], ends: tuple[str, str], *, values: tuple[str, str] | None = None, note: str = ""
) -> str:
    scale = "" if values is None else f'<b class="high">{values[1]}</b><b class="low">{values[0]}</b>'
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><div class="plot">{scale}'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f'{"".join(marks)}</svg></div><div class="ends"><span>{ends[0]}</span><span>{ends[1]}</span></div>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def _points(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    return " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _colour(number: int) -> str:
    return f"var(--series-{number % SERIES_COLOURS})"
