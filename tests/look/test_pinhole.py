"""Cameras fitted to ray maps: against known cameras, and against upstream's own fit."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from geomcache.errors import GeometryError
from geomcache.look.pinhole import fit_pinhole, mean_origin

INTRINSICS = np.array([(1.3, 0.0, 0.1), (0.0, 1.7, -0.2), (0.0, 0.0, 1.0)])
ORIGIN = np.array([0.3, -0.2, 1.5])


def turn(axis: tuple[float, float, float], angle: float) -> NDArray[np.float64]:
    """Rodrigues' formula."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([(0, -z, y), (z, 0, -x), (-y, x, 0)])
    rotation: NDArray[np.float64] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return rotation


ROTATION = turn((0.2, 1.0, -0.4), 0.7)


def rays(
    height: int = 9,
    width: int = 12,
    rotation: NDArray[np.float64] = ROTATION,
    intrinsics: NDArray[np.float64] = INTRINSICS,
) -> NDArray[np.float64]:
    """[h, w, 6] of the camera: d = R K^-1 p."""
    result = np.empty((height, width, 6))
    for i in range(height):
        for j in range(width):
            place = np.array([(2 * j + 1) / width - 1, (2 * i + 1) / height - 1, 1.0])
            result[i, j] = *(rotation @ np.linalg.inv(intrinsics) @ place), *ORIGIN
    return result


def test_a_known_camera_is_found() -> None:
    found = fit_pinhole(rays(), None)
    np.testing.assert_allclose(found.rotation, ROTATION, atol=1e-12)
    np.testing.assert_allclose(found.intrinsics, INTRINSICS, atol=1e-12)
    np.testing.assert_allclose(found.origin, ORIGIN, atol=1e-12)
    assert found.residual < 1e-12
    expected = [np.degrees(np.arctan((1 - c) / f) + np.arctan((1 + c) / f)) for f, c in ((1.3, 0.1), (1.7, -0.2))]
    np.testing.assert_allclose(found.fields_of_view, expected)
    expected = [(1.3 * 40, 0, 1.1 * 40), (0, 1.7 * 30, 0.8 * 30), (0, 0, 1)]
    np.testing.assert_allclose(found.pixel_intrinsics(60, 80), expected, atol=1e-12)


def test_upstream_finds_the_same_camera() -> None:
    """Where the optical axis meets the picture's centre: upstream's QL decomposition of R K^-1 is exact there alone."""
    from depth_anything_3.utils.ray_utils import camray_to_caminfo

    torch.manual_seed(0)
    ray = rays(24, 32, intrinsics=np.diag([1.3, 1.7, 1.0]))
    confidence = np.random.default_rng(0).uniform(1, 3, ray.shape[:2])
    ray[..., 3:] += np.random.default_rng(1).normal(size=ray[..., 3:].shape)  # so that the weights matter
    tensors = (torch.from_numpy(values[None, None]).float() for values in (ray, confidence))
    rotation, origin, focal, centre = camray_to_caminfo(*tensors)
    found = fit_pinhole(ray, confidence)
    np.testing.assert_allclose(found.rotation, rotation[0, 0].numpy(), atol=2e-3)
    np.testing.assert_allclose(found.origin, origin[0, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(np.diag(found.intrinsics)[:2], focal[0, 0].numpy(), rtol=5e-3)
    np.testing.assert_allclose(found.intrinsics[:2, 2], centre[0, 0].numpy() - 1, atol=5e-3)


def test_confidence_weighs() -> None:
    ray, confidence = rays(), np.ones((9, 12))
    ray[:, :3, :3] = np.random.default_rng(0).normal(size=(9, 3, 3))
    ray[:, :3, 3:] = 7.0
    wrong = fit_pinhole(ray, confidence)
    confidence[:, :3] = 1e-12
    right = fit_pinhole(ray, confidence)
    np.testing.assert_allclose(right.rotation, ROTATION, atol=1e-4)
    np.testing.assert_allclose(right.origin, ORIGIN, atol=1e-6)
    assert right.residual < 1e-4 < 0.1 < wrong.residual


def test_mean_origin_of_many_views() -> None:
    generator = np.random.default_rng(0)
    ray, confidence = generator.normal(size=(2, 3, 4, 5, 6)), generator.uniform(1, 2, (2, 3, 4, 5))
    for b, v in np.ndindex(2, 3):
        expected = np.average(ray[b, v, ..., 3:].reshape(-1, 3), axis=0, weights=confidence[b, v].reshape(-1))
        np.testing.assert_allclose(mean_origin(ray, confidence)[b, v], expected)
    np.testing.assert_allclose(mean_origin(ray, None), ray[..., 3:].mean(axis=(2, 3)))


def test_rays_of_no_camera_are_refused() -> None:
    with pytest.raises(GeometryError, match="mirrored"):
        fit_pinhole(rays(rotation=ROTATION @ np.diag([-1.0, 1.0, 1.0])), None)
    flat = rays()
    flat[..., 1] = 0.0
    with pytest.raises(GeometryError, match="one plane"):
        fit_pinhole(flat, None)
