"""Measures of how far two computations of the same geometry are apart, against values worked out by hand."""

import numpy as np
import pytest

from geomcache.extraction.differences import (
    DIRECTION,
    LEAST_SPREAD,
    ORIGIN,
    float16_steps,
    measure,
    origin_spread,
    spread_of,
)
from geomcache.statistics import Moments


def rays(*cells: tuple[list[float], list[float]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """[1, 1, 1, cells, 6] of directions and origins."""
    return np.array([[*direction, *origin] for direction, origin in cells], np.float16)[None, None, None]


def test_directions_and_origins_are_measured_apart() -> None:
    stored = rays(([1, 0, 0], [0, 0, 0]), ([0, 0, 2], [1, 1, 1]), ([0, 3, 0], [0, 0, 0]))
    computed = rays(([1, 1, 0], [0, 0, 0]), ([0, 0, -1], [1, 1, 1]), ([0, 6, 0], [3, 0, 4]))
    differences = measure({"ray": stored}, {"ray": computed}, spread=2.0)
    assert list(differences) == [DIRECTION, ORIGIN]
    np.testing.assert_allclose(differences[DIRECTION][0, 0, 0], [45, 180, 0])  # lengths do not count
    np.testing.assert_allclose(differences[ORIGIN][0, 0, 0], [0, 0, 2.5])


def test_small_angles_are_exact() -> None:
    step = 2.0**-10  # of float16, at 1
    differences = measure({"ray": rays(([1, 0, 0], [0] * 3))}, {"ray": rays(([1, step, 0], [0] * 3))}, 1.0)
    assert differences[DIRECTION].item() == pytest.approx(np.degrees(np.arctan(step)), rel=1e-9)


def test_a_direction_of_no_length_is_opposite_to_every_other() -> None:
    nothing, something = rays(([0, 0, 0], [0] * 3)), rays(([0, 0.5, 0], [0] * 3))
    assert measure({"ray": nothing}, {"ray": something}, 1.0)[DIRECTION].item() == 180
    assert measure({"ray": nothing}, {"ray": nothing}, 1.0)[DIRECTION].item() == 0


def test_other_outputs_are_relative_to_the_larger_value() -> None:
    stored, computed = np.array([[[[[1, 4, 0, 0]]]], [[[[2, 3, 0, 5]]]]], np.float16)
    differences = measure({"depth": stored}, {"depth": computed}, 1.0)
    np.testing.assert_allclose(differences["depth"][0, 0, 0], [0.5, 0.25, 0, 1])


def test_nan_is_not_hidden() -> None:
    nan = np.full((1, 1, 1, 1), np.nan, np.float16)
    assert np.isnan(measure({"depth": nan}, {"depth": np.ones_like(nan)}, 1.0)["depth"]).all()


def test_the_spread_of_a_cache_is_that_of_its_origins() -> None:
    values = np.random.default_rng(0).normal(size=(4, 2, 3, 3, 6)).astype(np.float16)
    values[..., 3:] *= 7
    expected = np.sqrt(values[..., 3:].reshape(-1, 3).astype(np.float64).var(axis=0).sum())
    assert spread_of(Moments.of("ray", values)) == pytest.approx(expected)
    assert origin_spread(values) == pytest.approx(expected)


def test_one_cameras_noise_is_no_spread() -> None:
    one_camera = rays(([0, 3, 4], [0, 0, 1e-4]), ([3, 4, 0], [0, 1e-4, 0]))
    assert origin_spread(one_camera) == pytest.approx(LEAST_SPREAD * 5)
    assert spread_of(Moments.of("ray", one_camera)) == pytest.approx(LEAST_SPREAD * 5)


def test_a_float16_step() -> None:
    one = np.float16(1)
    up, down = np.nextafter(one, np.float16(2)), np.nextafter(one, np.float16(0))
    # Below 1 steps are half as long; the step is that at the larger of the two.
    np.testing.assert_array_equal(
        float16_steps(np.array([one, up, one, -one]), np.array([one, one, down, one])), [0, 1, 0.5, 2048]
    )
    values = np.array([3.7, -121.0, 0.013, 65504.0], np.float16)
    below = np.nextafter(values, np.float16(0))
    np.testing.assert_array_equal(float16_steps(values, below), [1, 1, 1, 1])
    # Around zero the step is that at 2^-8, which is 2^-18.
    np.testing.assert_array_equal(float16_steps([0.0, 2.0**-20], [2.0**-18, -(2.0**-20)]), [1, 0.5])
    assert np.isnan(float16_steps(np.nan, 1.0))
