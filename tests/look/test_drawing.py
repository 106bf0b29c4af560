"""Colours, captions, plots and sheets: what stands where in a picture."""

import numpy as np
from PIL import Image, ImageFont

from geomcache.look import drawing
from geomcache.look.drawing import (
    AXIS_COLOURS,
    MARGIN,
    PANEL,
    Panel,
    draw_sheet,
    limits_of,
    line_plot,
    range_caption,
    scalar_colours,
    vector_caption,
    vector_colours,
)

DARK, BRIGHT = [68, 1, 84], [253, 231, 37]  # viridis' ends


def test_scalars_go_from_dark_to_bright_by_their_logarithm() -> None:
    limits = np.array([1.0, 100.0])
    colours = scalar_colours(np.array([[0.5, 1.0, 10.0, 100.0, 1000.0]]), limits)[0].tolist()
    assert colours[0] == colours[1] == DARK
    assert colours[3] == colours[4] == BRIGHT
    assert colours[2] == [34, 144, 139]  # half way between the fifth and the sixth of ten anchors
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


def test_lines_and_cursor_are_where_the_values_are() -> None:
    paths = np.stack([np.full(11, 0.5), np.full(11, 0.0), np.linspace(-1, 1, 11)], axis=1)
    plot = line_plot(paths, (-1.0, 1.0), 5, (200, 240))
    assert plot.shape == (200, 240, 3)
    found = {}
    for axis, colour in enumerate(AXIS_COLOURS):
        wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])
        rows, columns = np.nonzero(np.abs(plot.astype(int) - wanted).sum(axis=-1) < 30)
        inside = rows > 26  # below the letters x, y, z
        found[axis] = rows[inside], columns[inside]
    assert abs(np.median(found[0][0]) - (24 + 154 / 4)) <= 1.5  # a quarter below the upper edge
    assert abs(np.median(found[1][0]) - (24 + 178) / 2) <= 1.5  # the middle
    rows, columns = found[2]
    assert np.corrcoef(rows, columns)[0, 1] < -0.99  # rises
    middle = columns[np.abs(rows - 101) < 2].mean()
    np.testing.assert_array_less(np.abs(rows[np.abs(columns - middle) < 2] - 101), 8)
    grey = np.abs(plot[40].astype(int) - 0x75).max(axis=-1) < 70
    assert abs(np.flatnonzero(grey).mean() - middle) <= 2


def test_a_plot_of_one_frame() -> None:
    plot = line_plot(np.zeros((1, 3)), (-1.0, 1.0), 0, (120, 240))
    assert len(np.unique(plot.reshape(-1, 3), axis=0)) > 10


def test_a_sheet_has_every_panel_in_its_place() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    panels = [Panel(title="t", caption="c", pixels=np.full((4, 8, 3), colour, np.uint8)) for colour in colours]
    sheet = np.asarray(draw_sheet([panels[:2], panels[2:]], ["heading"]))
    assert sheet.shape[1] == MARGIN + 2 * (PANEL + MARGIN)
    places = []
    for colour in colours:
        rows, columns = np.nonzero((sheet == colour).all(axis=-1))
        assert len(rows) == PANEL * PANEL // 2
        places.append((rows.min(), columns.min()))
    assert [left for _, left in places] == [MARGIN, 2 * MARGIN + PANEL, MARGIN]
    assert places[0][0] == places[1][0] < places[2][0] - PANEL // 2


def test_long_text_is_broken_or_cut() -> None:
    font = ImageFont.load_default(size=14)
    lines = drawing._wrap("one two  three four  five six", font, 120)
    assert lines == ["one two  three four", "five six"]
    assert all(font.getlength(line) <= 60 for line in drawing._wrap("wordwordwordword  b", font, 60))
    panel = Panel(title="t", caption="a" * 30 + "  " + "b" * 30, pixels=np.zeros((2, 2, 3), np.uint8))
    short = Panel(title="t", caption="a", pixels=np.zeros((2, 2, 3), np.uint8))
    assert draw_sheet([[panel]], ["h"]).height > draw_sheet([[short]], ["h"]).height


def test_small_maps_stay_sharp() -> None:
    board = np.indices((4, 4)).sum(axis=0) % 2 * 255
    shown = np.asarray(drawing.fit_width(np.repeat(board[..., None], 3, axis=-1).astype(np.uint8), 40))
    assert shown.shape == (40, 40, 3)
    assert set(np.unique(shown)) == {0, 255}
    assert isinstance(drawing.fit_width(shown, 20), Image.Image)
