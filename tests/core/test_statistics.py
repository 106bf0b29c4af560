"""Moments against NumPy's own, and what is refused of those from elsewhere."""

import json
from typing import Any

import numpy as np
import pytest

from geomcache.errors import CacheFormatError
from geomcache.statistics import Moments

VALUES = np.random.default_rng(0).normal(3, 2, size=(7, 4, 5, 6)).astype(np.float16)
GOOD = Moments.of("ray", VALUES).to_dict()


def test_moments_are_those_of_numpy() -> None:
    moments, flat = Moments.of("ray", VALUES), VALUES.reshape(-1, 6).astype(np.float64)
    assert moments.count == 140
    assert moments.mean == pytest.approx(flat.mean(axis=0), rel=1e-12)
    assert moments.std == pytest.approx(flat.std(axis=0), rel=1e-12)


def test_parts_merge_to_the_moments_of_the_whole() -> None:
    merged = Moments.merged(Moments.of("ray", part) for part in (VALUES[:1], VALUES[1:5], VALUES[5:]))
    whole = Moments.of("ray", VALUES)
    assert (merged.count, merged.saturated) == (whole.count, whole.saturated)
    assert merged.mean == pytest.approx(whole.mean, rel=1e-12)
    assert merged.std == pytest.approx(whole.std, rel=1e-12)


@pytest.mark.parametrize("value", [65504.0, -65504.0])
def test_the_extremes_of_float16_are_accepted(value: float) -> None:
    values = np.full((2, 3, 4, 6), value, np.float16)
    values[0] *= -1
    moments = Moments.of("ray", values)
    assert moments.std == (65504.0,) * 6
    assert Moments.from_dict(json.loads(json.dumps(moments.to_dict())), "ray") == moments


@pytest.mark.parametrize(
    "change",
    [
        {"m2": [-1.0] * 6},
        {"m2": [*GOOD["m2"][:5], -1e-300]},
        {"m2": [*GOOD["m2"][:5], float("nan")]},
        {"m2": [*GOOD["m2"][:5], float("inf")]},
        {"m2": [*GOOD["m2"][:5], 1e300]},
        {"m2": [*GOOD["m2"][:5], 10**400]},
        {"m2": [*GOOD["m2"][:5], True]},
        {"m2": [*GOOD["m2"][:5], "1"]},
        {"m2": GOOD["m2"][:5]},
        {"m2": {}},
        {"mean": [*GOOD["mean"][:5], float("nan")]},
        {"mean": [*GOOD["mean"][:5], 1e6]},
        {"mean": [*GOOD["mean"][:5], -(10**400)]},
        {"mean": 1.0},
        {"count": 0},
        {"count": -1},
        {"count": 10**400},
        {"count": 140.0},
        {"count": True},
        {"saturated": -1},
        {"saturated": 10**400},
        {"saturated": None},
        {"extra": 1},
    ],
)
def test_moments_that_no_values_have_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CacheFormatError, match="statistics of ray: .*6 channels") as caught:
        Moments.from_dict(GOOD | change, "ray")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("data", [None, [], 7, {}, {"count": 1}])
def test_other_things_are_no_moments(data: object) -> None:
    with pytest.raises(CacheFormatError, match="statistics of ray_conf: .*1 channel"):
        Moments.from_dict(data, "ray_conf")
