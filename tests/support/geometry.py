"""Geometry of made-up numbers. Imports neither torch nor LeRobot."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.geometry import DEFAULT_OUTPUTS, FEATURE, OUTPUTS, FeatureSpec, Geometry, parse_outputs

FEATURE_WIDTH, FEATURE_DIM = 6, 5  # of made-up features


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
        trailing = (FEATURE_DIM,) if name == FEATURE else OUTPUTS[name].trailing
        values = generator.normal(size=(*shape, *trailing))
        arrays[name] = (values if name in ("ray", FEATURE) else 1.0 + np.exp(values)).astype(np.float16)
    return Geometry(**arrays)


def example_basis() -> NDArray[np.float32]:
    """Return an orthonormal basis [FEATURE_WIDTH, FEATURE_DIM], the same at every call."""
    square = np.random.default_rng(0).normal(size=(FEATURE_WIDTH, FEATURE_WIDTH))
    return np.ascontiguousarray(np.linalg.qr(square)[0][:, :FEATURE_DIM], np.float32)


def example_feature_spec() -> FeatureSpec:
    """Return the spec of `example_basis`."""
    digest = hashlib.sha256(example_basis().astype("<f4").tobytes()).hexdigest()
    return FeatureSpec(width=FEATURE_WIDTH, dim=FEATURE_DIM, basis_sha256=digest)
