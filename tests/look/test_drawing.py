"""Colours, captions, plots and sheets: what stands where in a picture."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from geomcache.look import drawing
from geomcache.look.drawing import (
    AXIS_COLOURS,
    CAPTION,
    HEADING,
    MARGIN,
    NAME,
    PANEL,
    TITLE,
    Column,
    Panel,
    Sheet,
    limits_of,
    panel_height,
    range_caption,
    scalar_colours,
    shorten,
    vector_caption,
    vector_colours,
)

DARK, BRIGHT = [68, 1, 84], [253, 231, 36]  # viridis' ends


def test_scalars_go_from_dark_to_bright_by_their_logarithm() -> None:
    limits = np.array([1.0, 100.0])
    colours = scalar_colours(np.array([[0.5, 1.0, 10.0, 100.0, 1000.0]]), limits)[0].tolist()
    assert colours[0] == colours[1] == DARK
    assert colours[3] == colours[4] == BRIGHT
    assert colours[2] == [32, 144, 140]  # the middle of viridis, as published (0.127568, 0.566949, 0.550556)
    assert scalar_colours(np.full((1, 1), 3.0), np.array([3.0, 3.0])).tolist() == [[DARK]]


def test_vectors_are_red_green_blue_each_over_its_range() -> None:
    limits = np.array([(-1.0, 0.0, 2.0), (1.0, 4.0, 3.0)])
    colours = vector_colours(np.array([[(-1.0, 4.0, 2.5), (0.0, 1.0, 9.0)]]), limits)
    assert colours.tolist() == [[[0, 255, 127], [127, 63, 255]]]


def test_limits_are_percentiles_of_all_views() -> None:
    values = np.arange(2 * 10 * 10, dtype=np.float32).reshape(2, 10, 10)
    np.testing.assert_allclose(limits_of(values), [1.99, 197.01])
    vectors = np.stack([values, -values, 2 * values], axis=-1)
    np.testing.assert_allclose(limits_of(vectors), [(1.99, -197.01, 3.98), (197.01, -1.99, 394.02)], rtol=1e-6)


def test_captions() -> None:
    assert range_caption(np.array([[1.0, 2.5]])) == "1 to 2.5"
    assert range_caption(np.array([[(1.0, 2.0, 3.0), (-1.0, 2.0, 4.0)]])) == "x -1.00..1.00  y 2.00..2.00  z 3.00..4.00"
    assert vector_caption(np.array([1.0, -0.5, 0.25])) == "x 1.000  y -0.500  z 0.250"


def plain_sheet(scale: int = 1, **fields: Any) -> Sheet:
    values = {"heading": ("title", "note"), "views": ("front",), "heights": (PANEL,), "columns": (Column(title="c"),)}
    return Sheet(**{**values, **fields}, scale=scale)


def pixels_of(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows and columns of the pixels that nearly have a colour."""
    rows, columns = np.nonzero(np.abs(picture.astype(int) - colour).sum(axis=-1) < 30)
    return rows, columns


def test_lines_and_cursor_are_where_the_values_are() -> None:
    paths = np.stack([np.full(11, 0.5), np.full(11, 0.0), np.linspace(-1, 1, 11)], axis=1)
    sheet = plain_sheet()
    sheet.plot(0, 0, paths, (-1.0, 1.0))
    pictures = {frame: sheet.draw([[Panel(caption="", pixels=None)]], frame) for frame in (1, 5, 9)}
    lines = {}
    for axis, colour in enumerate(AXIS_COLOURS):
        rgb = int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
        rows, columns = pixels_of(pictures[1], rgb)
        legend = rows < HEADING + TITLE + 30
        lines[axis] = rows[~legend], columns[~legend]
    top, bottom = HEADING + TITLE + 4, HEADING + TITLE + 4 + PANEL - 22  # of the axes
    assert abs(np.median(lines[0][0]) - (top + (bottom - top) / 4)) <= 1.5
    assert abs(np.median(lines[1][0]) - (top + bottom) / 2) <= 1.5
    rising = lines[2]
    assert np.corrcoef(*rising)[0, 1] < -0.99
    left, right = NAME + 34, NAME + PANEL - 6
    for frame, picture in pictures.items():
        _, columns = pixels_of(picture[top + 60 : bottom - 4, left + 3 : right - 3], (0x61,) * 3)
        assert abs(left + 3 + np.median(columns) - (left + (right - left) * frame / 10)) <= 1.5


def test_a_plot_of_one_frame() -> None:
    sheet = plain_sheet()
    sheet.plot(0, 0, np.zeros((1, 3)), (-1.0, 1.0))
    picture = sheet.draw([[Panel(caption="", pixels=None)]])
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_a_picture_does_not_depend_on_those_before_it() -> None:
    """What moves is drawn over a background that is drawn once: nothing of another frame may stay."""
    paths = np.random.default_rng(0).normal(size=(9, 3))
    fresh, used = plain_sheet(), plain_sheet()
    for sheet in (fresh, used):
        sheet.plot(0, 0, paths, (-3.0, 3.0))
    used.draw([[Panel(caption="a long caption of another frame", pixels=None)]], 8, "frame 8 of all these")
    panels = [[Panel(caption="short", pixels=None)]]
    np.testing.assert_array_equal(used.draw(panels, 2, "frame 2"), fresh.draw(panels, 2, "frame 2"))


@pytest.mark.parametrize("scale", [1, 2])
def test_a_sheet_has_every_panel_in_its_place(scale: int) -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    panels = [Panel(caption="c", pixels=np.full((4, 8, 3), colour, np.uint8)) for colour in colours]
    columns = [Column(title="a"), Column(title="b", limits=np.array([1.0, 2.0]))]
    sheet = plain_sheet(scale, views=("front", "wrist"), heights=(120, 120), columns=columns)
    picture = sheet.draw([panels[:2], panels[2:]])
    assert picture.shape[1] == (NAME + 2 * (PANEL + MARGIN)) * scale
    corners = []
    for colour in colours:
        rows, columns_ = np.nonzero((picture == colour).all(axis=-1))
        assert len(rows) == PANEL * 120 * scale**2
        corners.append((rows.min() // scale, columns_.min() // scale))
    top = HEADING + TITLE
    below = top + 120 + CAPTION
    assert corners == [(top, NAME), (top, NAME + PANEL + MARGIN), (below, NAME), (below, NAME + PANEL + MARGIN)]


def test_colour_bars_span_the_limits() -> None:
    """A bar's ends have the colours that the limits have in the maps above it."""
    scalars, vectors = np.array([1.0, 100.0]), np.array([(-1.0, 0.0, 2.0), (1.0, 4.0, 3.0)])
    columns = (Column(title="depth", limits=scalars), Column(title="direction", limits=vectors))
    black = Panel(caption="", pixels=np.zeros((1, 1, 3), np.uint8))
    picture = plain_sheet(columns=columns).draw([[black, black]])
    row = HEADING + TITLE + PANEL + CAPTION + 11
    assert np.abs(picture[row, NAME + 3].astype(int) - DARK).max() < 8
    assert np.abs(picture[row, NAME + PANEL - 4].astype(int) - BRIGHT).max() < 12
    assert (
        np.abs(picture[row, NAME + PANEL // 2].astype(int) - scalar_colours(np.full((1, 1), 10.0), scalars)[0, 0]).max()
        < 8
    )
    left, width = NAME + PANEL + MARGIN, (PANEL - 2 * MARGIN) // 3
    for axis in range(3):
        end = picture[row, left + axis * (width + MARGIN) + width - 4].astype(int)
        assert end[axis] > 235
        assert np.delete(end, axis).max() < 12


def test_hostile_names_are_drawn_as_they_are() -> None:
    """A dollar sign is no formula, and neither line breaks nor length move anything."""
    panels = [[Panel(caption="$\\frac{$", pixels=None)]]
    plain = plain_sheet().draw(panels)
    hostile = plain_sheet(
        heading=("$\\frac{1}$ " + "x" * 5000, "a\nb"), views=("$x_" + "\n" * 50 + "\u4e2d" * 500,)
    ).draw(panels)
    assert hostile.shape == plain.shape


def test_text_is_shortened() -> None:
    assert shorten("one\n two", 20) == "one two"
    assert shorten("abcdef", 4) == "abc\u2026"


def test_the_height_of_a_panel_is_bounded() -> None:
    assert panel_height(256, 256) == PANEL
    assert panel_height(180, 320) == 135
    assert panel_height(16384, 1) == 4 * PANEL
    assert panel_height(1, 16384) == PANEL // 4


def test_small_maps_stay_sharp() -> None:
    board = np.indices((4, 4)).sum(axis=0) % 2 * 255
    shown = np.asarray(drawing.fit_width(np.repeat(board[..., None], 3, axis=-1).astype(np.uint8), 40))
    assert shown.shape == (40, 40, 3)
    assert set(np.unique(shown)) == {0, 255}
    assert isinstance(drawing.fit_width(shown, 20), Image.Image)
