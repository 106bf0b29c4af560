"""How far apart two computations of the same geometry are, in units that mean something.

    ray direction    the angle between the directions, degrees
    ray origin       the distance between the origins, over the spread of the origins
    ray_conf, depth, depth_conf    the difference over the larger of both values
    feature          the angle between the features, degrees

Float16 steps are distances in units of the gap between neighbouring float16 numbers, at the larger of two values. They
tell rounding from anything else, but exaggerate near zero: there, where float16's gaps become finer than float32's own
noise, a step is the one at 2^-8, 3.8e-6.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geomcache.geometry import FEATURE
from geomcache.statistics import Moments

SMALLEST_STEP_AT = 2.0**-8
DIRECTION, ORIGIN = "ray direction", "ray origin"
UNITS = {DIRECTION: "degrees", ORIGIN: "of the spread", FEATURE: "degrees"}
RELATIVE = "relative"
# One camera alone is the origin of its own rays: their spread is then noise, and no length to measure by.
LEAST_SPREAD = 0.02  # over the mean length of the directions

GeometryArrays = Mapping[str, NDArray[np.float16]]
"""Output -> [n, V, h, w, 6] of ``ray``, [n, V, h, w, D] of ``feature``, [n, V, h, w] of others."""


def measure(stored: GeometryArrays, computed: GeometryArrays, spread: float) -> dict[str, NDArray[np.float64]]:
    """Compare maps cell by cell.

    Args:
        stored: [n, V, h, w, 6] of ``ray``, [n, V, h, w] of other outputs.
        computed: the same outputs and shapes.
        spread: of the origins, as `origin_spread` gives it.

    Returns:
        float64 [n, V, h, w] of each measure. NaN where a value is.
    """
    measures = {}
    for name, left in stored.items():
        a, b = left.astype(np.float64), computed[name].astype(np.float64)
        if name == "ray":
            measures[DIRECTION] = _angles(a[..., :3], b[..., :3])
            measures[ORIGIN] = np.linalg.norm(a[..., 3:] - b[..., 3:], axis=-1) / spread
        elif name == FEATURE:
            measures[name] = _angles(a, b)
        else:
            largest = np.maximum(np.abs(a), np.abs(b))
            measures[name] = np.abs(a - b) / np.where(largest == 0, 1.0, largest)
    return measures


def origin_spread(ray: NDArray[np.float16]) -> float:
    """Return the root mean square distance of the origins of [..., 6] from their mean, at least `LEAST_SPREAD`."""
    rays = ray.reshape(-1, 6).astype(np.float64)
    spread = np.sqrt(rays[:, 3:].var(axis=0).sum())
    return float(max(spread, LEAST_SPREAD * np.linalg.norm(rays[:, :3], axis=-1).mean(), np.finfo(np.float16).tiny))


def spread_of(ray: Moments) -> float:
    """Return the spread of a whole cache's origins from the moments of its rays, at least `LEAST_SPREAD`."""
    spread = np.linalg.norm(ray.std[3:])
    length = np.sqrt(np.square(ray.mean[:3]).sum() + np.square(ray.std[:3]).sum())
    return float(max(spread, LEAST_SPREAD * length, np.finfo(np.float16).tiny))


def float16_steps(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return the distance of float16 numbers in float16 steps; NaN where one is."""
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = np.maximum(np.maximum(np.abs(left), np.abs(right)), SMALLEST_STEP_AT)
    exponent = np.floor(np.log2(size))
    steps: NDArray[np.float64] = np.abs(left - right) / np.exp2(exponent - 10)  # 10 bits behind the first
    return steps


def _angles(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the angles between vectors [..., n], degrees: exact for small ones, which arccos is not.

    W. Kahan, "How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?" (2006), section 12.
    """
    lengths = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    scaled = a * lengths[1][..., None], b * lengths[0][..., None]
    angles: NDArray[np.float64] = 2 * np.degrees(
        np.arctan2(np.linalg.norm(scaled[0] - scaled[1], axis=-1), np.linalg.norm(scaled[0] + scaled[1], axis=-1))
    )
    only_one_is_zero = (lengths[0] == 0) != (lengths[1] == 0)
    return np.where(only_one_is_zero, 180.0, angles)
