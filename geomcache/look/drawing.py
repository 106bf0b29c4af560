"""Colours of maps, and sheets: a strip of panels for each view, with shared titles and colour bars around them.

Legend of shapes:  V views   h, w grid   n frames   C columns of panels

Confidences and depth are shown by their logarithm, dark to bright (viridis). Directions and origins are shown by their
components x, y, z as red, green, blue, each over its own range. Colours mean the same in all views.

Matplotlib draws what all frames of an episode share once; a frame then costs its panels and captions.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from geomcache.look.value_counts import CLIP

# Pixels at scale 1.
PANEL, MARGIN = 240, 12
CAPTION, TITLE, HEADING, NAME, BAR = 24, 26, 60, 30, 48
DPI = 100
AXIS_COLOURS = ("#c62828", "#2e7d32", "#1565c0")  # x, y, z
SCALARS_COLOURMAP = colormaps["viridis"]
STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib ships it: the same picture on every machine
    "font.size": 8.5,
    "axes.edgecolor": "#9e9e9e",
    "axes.linewidth": 0.7,
    "xtick.color": "#616161",
    "ytick.color": "#616161",
    "svg.hashsalt": "geomcache",  # the same ids at every run
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw with this package's style, whatever the user's matplotlibrc says.

    A character that the font lacks is drawn as a box, without matplotlib's warning.
    """
    with warnings.catch_warnings(), matplotlib.style.context(["default", STYLE]):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def limits_of(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the range that colours span: [2] of maps [V, h, w], [2, 3] of vectors [V, h, w, 3]."""
    axis = (0, 1, 2) if values.ndim == 4 else None
    return np.asarray(np.percentile(values, CLIP, axis=axis), np.float64)


def scalar_colours(values: NDArray[Any], limits: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colour maps [..., h, w] as uint8 [..., h, w, 3], dark to bright over the logarithm of `limits` [2]."""
    low, high = np.log(np.maximum(limits, 1e-6))
    unit = _to_unit(np.log(np.maximum(values.astype(np.float64), 1e-6)), low, high)
    colours: NDArray[np.uint8] = SCALARS_COLOURMAP(unit, bytes=True)[..., :3]
    return colours


def vector_colours(values: NDArray[Any], limits: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colour vectors [..., h, w, 3] as uint8 of the same shape: x, y, z as red, green, blue, over `limits` [2, 3]."""
    return (_to_unit(values.astype(np.float64), limits[0], limits[1]) * 255).astype(np.uint8)


def _to_unit(values: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    unit: NDArray[Any] = np.clip((values - low) / np.maximum(high - low, 1e-6), 0.0, 1.0)
    return unit


def range_caption(values: NDArray[Any]) -> str:
    """Format the range of one view's map [h, w], or of each component of its vectors [h, w, 3]."""
    if values.ndim == 2:
        return f"{values.min():.3g} to {values.max():.3g}"
    flat = values.reshape(-1, 3)
    return "  ".join(
        f"{axis} {low:.2f}..{high:.2f}" for axis, low, high in zip("xyz", flat.min(0), flat.max(0), strict=True)
    )


def vector_caption(vector: NDArray[Any]) -> str:
    """Format the components of one vector [3]."""
    return "  ".join(f"{axis} {value:.3f}" for axis, value in zip("xyz", vector, strict=True))


def fit_width(pixels: NDArray[np.uint8], width: int, height: int | None = None) -> Image.Image:
    """Resize a picture [H, W, 3]: its cells stay sharp where it grows, and are averaged where it shrinks."""
    resample = Image.Resampling.NEAREST if pixels.shape[1] < width else Image.Resampling.BOX
    height = max(1, round(width * pixels.shape[0] / pixels.shape[1])) if height is None else height
    return Image.fromarray(pixels).resize((width, height), resample)


def panel_height(height: int, width: int) -> int:
    """Return the height of a panel, in pixels at scale 1, for pictures of this size.

    It stays within 1:4 and 4:1. A cache's header may claim any size, and no sheet is made of a claim.
    """
    return int(np.clip(round(PANEL * height / width), PANEL // 4, PANEL * 4))


@dataclass(frozen=True, kw_only=True)
class Column:
    """What the panels below one another have in common."""

    title: str
    limits: NDArray[np.float64] | None = None
    """What colours span: [2] of maps of one number, [2, 3] of vectors; None where colours are not a scale."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One view's picture in a column."""

    caption: str
    pixels: NDArray[np.uint8] | None  # [H, W, 3]; None for a plot


class Sheet:
    """A picture with a strip of panels for each view.

    Args:
        heading: a title, and a line below it.
        views: names of the views.
        heights: of each view's panels, in pixels at scale 1.
        columns: left to right.
        scale: pixels of the picture for each pixel of the layout.
    """

    def __init__(
        self,
        heading: tuple[str, str],
        views: Sequence[str],
        heights: Sequence[int],
        columns: Sequence[Column],
        *,
        scale: int = 1,
    ) -> None:
        self.columns = len(columns)
        self._scale, self._heights = scale, heights
        tops = HEADING + TITLE + np.cumsum([0, *(height + CAPTION for height in heights)])
        self._tops, bottom = tops[:-1].tolist(), int(tops[-1])
        self._width = NAME + len(columns) * (PANEL + MARGIN)
        self._height = bottom + (BAR if any(column.limits is not None for column in columns) else 0)
        self._figure = Figure((self._width / DPI, self._height / DPI), dpi=DPI * scale, facecolor="white")
        self._canvas: Any = FigureCanvasAgg(self._figure)  # matplotlib has no types for what is used here
        self._background: Any = None  # what all pictures share, once it is drawn
        self._cursors: list[tuple[Axes, Line2D, PathCollection, NDArray[np.float64]]] = []
        with house_style():
            self._write(NAME, 22, shorten(heading[0], self._width // 9), size=12, weight="bold")
            self._write(NAME, 44, shorten(heading[1], self._width // 6), color="#616161")
            self._frame = self._write(self._width - MARGIN, 22, "", size=10, ha="right", animated=True)
            for column, shared in enumerate(columns):
                self._write(self._left(column), HEADING + 17, shared.title, size=10)
                if shared.limits is not None:
                    self._draw_bars(column, bottom + 6, shared.limits)
            for name, top, height in zip(views, self._tops, heights, strict=True):
                middle = top + height / 2
                self._write(16, middle, shorten(name, height // 8), size=10, rotation=90, ha="center", va="center")
            self._captions = [
                [
                    self._write(self._left(column), top + height + 14, "", color="#616161", animated=True)
                    for column in range(len(columns))
                ]
                for top, height in zip(self._tops, heights, strict=True)
            ]

    def plot(self, view: int, column: int, paths: NDArray[np.float64], limits: tuple[float, float]) -> None:
        """Draw lines of x, y and z over the frames into a panel, with a cursor that moves from picture to picture.

        Args:
            view: whose panel.
            column: the panel's.
            paths: [n, 3].
            limits: values at the lower and the upper end.
        """
        with house_style():
            axes = self._axes(self._left(column) + 34, self._tops[view] + 4, PANEL - 40, self._heights[view] - 22)
            axes.set_xlim(0, max(len(paths) - 1, 1))
            axes.set_ylim(*limits)
            axes.locator_params(nbins=5)
            axes.tick_params(length=2, pad=2)
            for name, colour, path in zip("xyz", AXIS_COLOURS, paths.T, strict=True):
                axes.plot(path, color=colour, linewidth=1.2, label=name)
            axes.legend(loc="upper right", ncols=3, handlelength=1, columnspacing=1, framealpha=0.8, edgecolor="none")
            line = axes.axvline(0, color="#616161", linewidth=0.8, animated=True)
            points = axes.scatter([0, 0, 0], paths[0], c=AXIS_COLOURS, s=18, zorder=3, animated=True)
        self._cursors.append((axes, line, points, paths))

    def draw(self, panels: Sequence[Sequence[Panel]], frame: int = 0, frame_title: str = "") -> NDArray[np.uint8]:
        """Draw a picture: uint8 [height * scale, width * scale, 3].

        Args:
            panels: for each view, one for each column.
            frame: where the cursors of the plots are.
            frame_title: ends the title.
        """
        with house_style():
            if self._background is None:
                self._canvas.draw()
                self._background = self._canvas.copy_from_bbox(self._figure.bbox)
            self._canvas.restore_region(self._background)
            self._frame.set_text(frame_title)
            self._figure.draw_artist(self._frame)
            for texts, strip in zip(self._captions, panels, strict=True):
                for text, panel in zip(texts, strip, strict=True):
                    text.set_text(panel.caption)
                    self._figure.draw_artist(text)
            for axes, line, points, paths in self._cursors:
                line.set_xdata([frame, frame])
                points.set_offsets(np.stack([np.full(3, frame), paths[frame]], axis=1))
                axes.draw_artist(line)
                axes.draw_artist(points)
            picture = np.array(self._canvas.buffer_rgba())[..., :3]
        size = PANEL * self._scale
        for top, height, strip in zip(self._tops, self._heights, panels, strict=True):
            for column, panel in enumerate(strip):
                if panel.pixels is not None:
                    y, x = top * self._scale, self._left(column) * self._scale
                    shown = fit_width(panel.pixels, size, height * self._scale)
                    picture[y : y + height * self._scale, x : x + size] = np.asarray(shown)
        return picture

    def _draw_bars(self, column: int, top: int, limits: NDArray[np.float64]) -> None:
        """Draw what the column's colours mean: one bar, or one each for x, y and z."""
        if limits.ndim == 1:
            low, high = np.maximum(limits, 1e-6)
            values = np.geomspace(low, high, 256)[None]  # [1, 256]
            ticks = [(0, f"{low:.3g}"), (127.5, f"{np.sqrt(low * high):.3g}"), (255, f"{high:.3g}")]
            self._draw_bar(self._left(column), top, PANEL, scalar_colours(values, limits), ticks)
            return
        width = (PANEL - 2 * MARGIN) // 3
        for axis, name in enumerate("xyz"):
            colours = np.zeros((1, 256, 3), np.uint8)
            colours[..., axis] = np.arange(256)
            ticks = [(0, f"{limits[0, axis]:.2f}"), (255, f"{limits[1, axis]:.2f}")]
            left = self._left(column) + axis * (width + MARGIN)
            self._draw_bar(left, top, width, colours, ticks)
            self._write(left + width / 2, top + 9, name, color="white", weight="bold", ha="center")

    def _draw_bar(
        self, left: int, top: int, width: int, colours: NDArray[np.uint8], ticks: Sequence[tuple[float, str]]
    ) -> None:
        axes = self._axes(left, top, width, 12)
        axes.imshow(colours, aspect="auto")
        axes.set_yticks([])
        axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
        axes.tick_params(length=0, pad=3)
        labels = axes.get_xticklabels()
        labels[0].set_horizontalalignment("left")
        labels[-1].set_horizontalalignment("right")

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes at a place in pixels of the layout, from the upper left corner."""
        bottom = self._height - top - height
        box = (left / self._width, bottom / self._height, width / self._width, height / self._height)
        return self._figure.add_axes(box)

    def _write(self, left: float, top: float, text: str, **style: Any) -> Text:
        """Add text whose baseline begins at a place in pixels of the layout. A dollar sign is no formula."""
        return self._figure.text(left / self._width, 1 - top / self._height, text, parse_math=False, **style)

    @staticmethod
    def _left(column: int) -> int:
        return NAME + column * (PANEL + MARGIN)


def shorten(text: str, length: int) -> str:
    """Put text on one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
