"""Draws the room graph of docs/architecture.md as an SVG.

GitHub renders the page's mermaid block by itself. The site's theme would load mermaid from another server, and the site
loads nothing from elsewhere: `docs/hooks.py` puts this drawing in the block's place.
"""

import io
import re
import tomllib
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

REPOSITORY = Path(__file__).parents[1]
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ARROW = re.compile(r"^\s*(\w+) --> (\w+)$", re.MULTILINE)
_CORE = "core"


def arrows(page: str) -> set[tuple[str, str]]:
    """Read the (importer, imported) pairs of a page's mermaid block."""
    (block,) = MERMAID.findall(page)
    return set(_ARROW.findall(block))


def layers() -> list[list[str]]:
    """Read the rooms of each layer, from the command line down, out of import-linter's contract in pyproject.toml."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (each for each in settings["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    return [[name.strip().removeprefix("geomcache.") for name in re.split("[|:]", line)] for line in contract["layers"]]


def svg(page: str) -> str:
    """Draw the rooms in their layers, with the arrows of the page's mermaid block."""
    rows = [*layers()[:-1], [_CORE]]
    places = {
        room: ((column + 0.5) / len(row) * 10, float(len(rows) - number) * 1.4)
        for number, row in enumerate(rows)
        for column, room in enumerate(row)
    }
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "geomcache", "font.family": "monospace", "font.size": 11}
    ):
        figure = Figure(figsize=(9, 6))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 10), ylim=(0.9, len(rows) * 1.4 + 0.5))
        axes.axis("off")
        for importer, imported in sorted(arrows(page)):
            axes.add_patch(_arrow(places[importer], places[imported], f"C{list(places).index(importer)}"))
        for room, (x, y) in places.items():
            box = {"boxstyle": "round,pad=0.45", "facecolor": "#eef2f4", "edgecolor": "#546e7a"}
            axes.text(x, y, room, ha="center", va="center", color="#1c262b", bbox=box)
        axes.text(places[_CORE][0] + 0.75, places[_CORE][1], "every room imports it", va="center", color="#78909c")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _arrow(start: tuple[float, float], end: tuple[float, float], color: str) -> FancyArrowPatch:
    """Bend arrows that pass a layer around the rooms that lie in between."""
    bend = 0.0 if start[1] - end[1] < 2 else 0.18 if start[0] <= end[0] else -0.18
    return FancyArrowPatch(
        (start[0], start[1] - 0.25),
        (end[0], end[1] + 0.28),
        connectionstyle=f"arc3,rad={bend}",
        arrowstyle="-|>",
        mutation_scale=11,
        color=color,
        linewidth=1.1,
        alpha=0.8,
    )
