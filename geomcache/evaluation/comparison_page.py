"""A comparison as lines, as a Markdown page and as a plot."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from geomcache.cache import durable
from geomcache.evaluation.compare import Comparison, Difference

# Success in percent on LIBERO-Plus's camera axis, as their authors report it. Collected in November 2026.
PUBLISHED_CAMERA = (
    ("pi0", "13.8"),
    ("pi0-FAST", "65.1"),
    ("pi0.5", "67.3"),
    ("OpenVLA-OFT", "56.4; 92.8 when trained on LIBERO-Plus's own data"),
    ("GAM", "83.1"),
)
COLUMNS = (
    "group",
    "pairs",
    "tasks",
    "first",
    "second",
    "difference",
    "95 % interval",
    "only first",
    "only second",
    "p",
)
NOTE = (
    "Differences are in percentage points; intervals are from a bootstrap over tasks and episodes in them; p is"
    " McNemar's exact test."
)


def lines(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield a table for the terminal."""
    for comparison in comparisons:
        yield f"{comparison.second} (second) compared with {comparison.first} (first)"
        rows = [COLUMNS, *(_cells(difference) for difference in comparison.differences)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield NOTE


def markdown(comparisons: Sequence[Comparison], plot: str) -> str:
    """Return a page with a table for each comparison and the plot, which has this name next to it."""
    parts = ["# Comparison of evaluations"]
    for comparison in comparisons:
        rows = [_cells(difference) for difference in comparison.differences]
        table = [COLUMNS, ("---",) * len(COLUMNS), *rows]
        parts += [f"## {comparison.second} compared with {comparison.first}"]
        parts += ["\n".join(f"| {' | '.join(row)} |" for row in table), NOTE]
    parts += [f"![differences with their intervals]({plot})"]
    if any("camera" in difference.group for comparison in comparisons for difference in comparison.differences):
        parts += ["## Published figures, for reference", _published()]
    return "\n\n".join(parts) + "\n"


def _published() -> str:
    table = "\n".join(f"| {name} | {rate} |" for name, rate in PUBLISHED_CAMERA)
    return (
        "Not comparable with the rates above: other policies and training data, all 1,599 camera variants of four"
        " suites, no pairs, seeds or intervals. Success on LIBERO-Plus's camera axis, in percent, as the authors"
        f" report it:\n\n| policy | success |\n| --- | --- |\n{table}"
    )


def _cells(difference: Difference) -> tuple[str, ...]:
    interval = difference.interval
    return (
        difference.group,
        str(difference.pairs),
        str(difference.tasks),
        f"{difference.first_rate:.1%}",
        f"{difference.second_rate:.1%}",
        f"{100 * difference.difference:+.1f}",
        "no pair differs" if interval is None else f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}",
        str(difference.only_first),
        str(difference.only_second),
        f"{difference.p:.2g}",
    )


def write_page(comparisons: Sequence[Comparison], folder: Path) -> tuple[Path, Path]:
    """Write ``comparison.md`` and ``comparison.png`` into a folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, plot = folder / "comparison.md", folder / "comparison.png"
    with durable.replacing(plot) as draft:
        draw(comparisons, draft)
    durable.replace_file(page, markdown(comparisons, plot.name).encode())
    return page, plot


def draw(comparisons: Sequence[Comparison], file: Path) -> None:
    """Draw each difference with its interval; a circle alone is a group in which no pair differs."""
    rows = [(comparison, difference) for comparison in comparisons for difference in comparison.differences]
    names = [
        f"{difference.group} ({difference.pairs})"
        if len(comparisons) == 1
        else f"{comparison.second}: {difference.group} ({difference.pairs})"
        for comparison, difference in rows
    ]
    # Labels stand left of the axes: the figure grows with them, so that the axes keep their width.
    figure = Figure((4.5 + 0.09 * max(map(len, names)), 1.4 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#9e9e9e", linewidth=0.8)
    for row, (comparison, difference) in enumerate(rows):
        colour, interval = f"C{comparisons.index(comparison)}", difference.interval
        if interval is not None:
            axes.plot([100 * interval.low, 100 * interval.high], [row, row], color=colour)
        fill = "white" if interval is None else colour
        axes.plot([100 * difference.difference], [row], "o", color=colour, markerfacecolor=fill, markersize=5)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("difference in success, percentage points\nwith its 95 % interval")
    axes.set_title(f"compared with {comparisons[0].first} (pairs of episodes)", loc="left", size=10)
    figure.savefig(file, dpi=120)
