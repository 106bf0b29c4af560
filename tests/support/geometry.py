"""Geometry of made-up numbers. Imports neither torch nor LeRobot."""

from typing import Any

import numpy as np

from geomcache.geometry import DEFAULT_OUTPUTS, OUTPUTS, Geometry, parse_outputs


def example_geometry(
    batch: int = 1,
    views: int = 2,
    grid_hw: tuple[int, int] = (14, 14),
    outputs: tuple[str, ...] = DEFAULT_OUTPUTS,
) -> Geometry:
    """Return plausible float16 NumPy arrays [B, V, h, w(, 6)], the same at every call."""
    generator = np.random.default_rng(0)
    shape = (batch, views, *grid_hw)
    arrays: dict[str, Any] = {}
    for name in parse_outputs(outputs):
        values = generator.normal(size=(*shape, *OUTPUTS[name].trailing))
        arrays[name] = (values if name == "ray" else 1.0 + np.exp(values)).astype(np.float16)
    return Geometry(**arrays)
