"""Pictures of geometry: maps as colours, captions, lines over frames, sheets of panels. NumPy and Pillow alone.

Legend of shapes:  V views   h, w grid   n frames   C channels

Confidences and depth are shown by their logarithm, dark to bright (viridis). Directions and origins are shown by their
components x, y, z as red, green, blue, each over its own range. Colours mean the same in all views.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LEGEND = "Depth and confidences: dark is small, bright is large (logarithm). Rays: x, y, z as red, green, blue."
PANEL, MARGIN, TEXT = 240, 10, 16  # pixels
CLIP = (1.0, 99.0)  # percentiles that the colours span
AXIS_COLOURS = ("#c62828", "#2e7d32", "#1565c0")  # x, y, z

# Anchors of the colour map viridis (Nathaniel Smith and Stéfan van der Walt, CC0), evenly spaced.
_VIRIDIS = np.array(
    [(68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
     (110, 206, 88), (181, 222, 43), (253, 231, 37)]
)  # fmt: skip
_SMOOTH = 3  # lines are drawn so many times larger, then reduced


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a sheet."""

    title: str
    caption: str
    """Broken between two spaces where it is too long for a line."""
    pixels: NDArray[np.uint8]  # [height, width, 3]


def limits_of(values: NDArray[Any]) -> NDArray[np.float64]:
    """The range that colours span: [2] of maps [V, h, w], [2, 3] of vectors [V, h, w, 3]."""
    axis = (0, 1, 2) if values.ndim == 4 else None
    return np.asarray(np.percentile(values, CLIP, axis=axis), np.float64)


def scalar_colours(values: NDArray[Any], limits: NDArray[np.float64]) -> NDArray[np.uint8]:
    """[..., h, w] -> uint8 [..., h, w, 3]: dark to bright over the logarithm of `limits`."""
    low, high = np.log(np.maximum(limits, 1e-6))
    unit = _to_unit(np.log(np.maximum(values.astype(np.float64), 1e-6)), low, high)
    places = np.linspace(0.0, 1.0, len(_VIRIDIS))
    return np.stack([np.interp(unit, places, _VIRIDIS[:, channel]) for channel in range(3)], axis=-1).astype(np.uint8)


def vector_colours(values: NDArray[Any], limits: NDArray[np.float64]) -> NDArray[np.uint8]:
    """[..., h, w, 3] -> uint8 [..., h, w, 3]: x, y, z as red, green, blue, each over its own `limits`."""
    return (_to_unit(values.astype(np.float64), limits[0], limits[1]) * 255).astype(np.uint8)


def _to_unit(values: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    unit: NDArray[Any] = np.clip((values - low) / np.maximum(high - low, 1e-6), 0.0, 1.0)
    return unit


def range_caption(values: NDArray[Any]) -> str:
    """Range of one view's map [h, w]; of each component, where there are three."""
    if values.ndim == 2:
        return f"{values.min():.3g} to {values.max():.3g}"
    flat = values.reshape(-1, 3)
    return "  ".join(
        f"{axis} {low:.2f}..{high:.2f}" for axis, low, high in zip("xyz", flat.min(0), flat.max(0), strict=True)
    )


def vector_caption(vector: NDArray[Any]) -> str:
    """The components of one vector [3]."""
    return "  ".join(f"{axis} {value:.3f}" for axis, value in zip("xyz", vector, strict=True))


def line_plot(
    paths: NDArray[Any], limits: tuple[float, float], cursor: int, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Lines over frames, x, y and z in their colours, with a cursor.

    Args:
        paths: [n, 3].
        limits: values at the lower and the upper end of the plot.
        cursor: the frame that is marked.
        size: height and width in pixels.

    Returns:
        uint8 [height, width, 3].
    """
    height, width = size
    font = ImageFont.load_default(size=TEXT - 2)
    numbers = [f"{limit:.3g}" for limit in limits]
    left, right = 8 + round(max(font.getlength(number) for number in numbers)), width - 10
    top, bottom = 24, height - 22
    low, high = limits
    frames = np.arange(len(paths)) / max(len(paths) - 1, 1)
    x = left + frames * (right - left)
    y = bottom - (paths - low) / max(high - low, 1e-6) * (bottom - top)  # [n, 3]

    large = Image.new("RGB", (width * _SMOOTH, height * _SMOOTH), "white")
    draw = ImageDraw.Draw(large)
    frame = np.array([(left, top), (right, bottom)]) * _SMOOTH
    draw.rectangle([tuple(corner) for corner in frame.tolist()], outline="#bdbdbd", width=_SMOOTH)
    mark = np.array([(x[cursor], top), (x[cursor], bottom)]) * _SMOOTH
    draw.line([tuple(end) for end in mark.tolist()], fill="#757575", width=_SMOOTH)
    for axis, colour in enumerate(AXIS_COLOURS):
        points = np.stack([x, y[:, axis]], axis=1) * _SMOOTH
        draw.line([tuple(point) for point in points.tolist()], fill=colour, width=2 * _SMOOTH)
        draw.circle(tuple(points[cursor].tolist()), 4 * _SMOOTH, fill=colour)
    plot = large.resize((width, height), Image.Resampling.LANCZOS)

    draw = ImageDraw.Draw(plot)
    draw.text((left - 4, bottom), numbers[0], fill="dimgray", font=font, anchor="rs")
    draw.text((left - 4, top), numbers[1], fill="dimgray", font=font, anchor="rt")
    draw.text((left, bottom + 4), "0", fill="dimgray", font=font)
    draw.text((right, bottom + 4), f"frame {len(paths) - 1}", fill="dimgray", font=font, anchor="rt")
    for axis, colour in enumerate(AXIS_COLOURS):
        draw.text((left + 4 + 18 * axis, 4), "xyz"[axis], fill=colour, font=ImageFont.load_default(size=TEXT + 1))
    return np.asarray(plot)


def draw_sheet(rows: Sequence[Sequence[Panel]], heading: Sequence[str]) -> Image.Image:
    """Rows of panels, each with its title above and its caption below, under the lines of a heading."""
    title_font, font = ImageFont.load_default(size=TEXT), ImageFont.load_default(size=TEXT - 2)
    line, columns = TEXT + 4, max(map(len, rows))
    width = MARGIN + columns * (PANEL + MARGIN)
    heading = [part for text in heading for part in _wrap(text, title_font, width - 2 * MARGIN)]
    captions = [[_wrap(panel.caption, font, PANEL) for panel in row] for row in rows]
    heights = [max(_height(panel.pixels) for panel in row) for row in rows]
    cells = [
        height + line * (1 + max(map(len, texts))) + MARGIN for height, texts in zip(heights, captions, strict=True)
    ]
    top = MARGIN + len(heading) * (line + 2) + 4
    sheet = Image.new("RGB", (width, top + sum(cells)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(heading):
        draw.text((MARGIN, MARGIN + number * (line + 2)), text, fill="black", font=title_font)
    for row, texts, height, cell in zip(rows, captions, heights, cells, strict=True):
        for column, (panel, caption) in enumerate(zip(row, texts, strict=True)):
            left = MARGIN + column * (PANEL + MARGIN)
            draw.text((left, top), _fit(panel.title, font), fill="black", font=font)
            sheet.paste(fit_width(panel.pixels, PANEL), (left, top + line))
            for number, text in enumerate(caption):
                draw.text((left, top + (1 + number) * line + height + 2), text, fill="dimgray", font=font)
        top += cell
    return sheet


def fit_width(pixels: NDArray[np.uint8], width: int) -> Image.Image:
    """A picture of this width: cells stay sharp where it grows, and are averaged where it shrinks."""
    resample = Image.Resampling.NEAREST if pixels.shape[1] < width else Image.Resampling.BOX
    return Image.fromarray(pixels).resize((width, _height(pixels, width)), resample)


def _height(pixels: NDArray[np.uint8], width: int = PANEL) -> int:
    return max(1, round(width * pixels.shape[0] / pixels.shape[1]))


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines no longer than `width`, broken between two spaces; what is too long even alone is cut."""
    lines: list[str] = []
    for part in text.split("  "):
        joined = f"{lines[-1]}  {part}" if lines else part
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(_fit(part, font, width))
    return lines


def _fit(text: str, font: Any, width: int = PANEL) -> str:
    while font.getlength(text) > width:
        text = text[:-4] + "..."
    return text
