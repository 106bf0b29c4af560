"""True geometry of cameras whose places are known: rays, projections, depth, and the spec of a cache of them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from geomcache.cache.header import Header
from geomcache.errors import GeometryError, UserInputError
from geomcache.geometry import Camera, GeometrySpec
from geomcache.policy.online import OnlineEncoder
from geomcache.simulator.oracle import (
    OracleOptions,
    in_first_view,
    metres,
    oracle_map,
    oracle_spec,
    views_of,
)
from tests.support.stores import make_store

DOWN = np.diag([1.0, -1.0, -1.0])  # of a camera that looks along the world's z, in MuJoCo's axes: right, up, back
NEAR, FAR = 0.1, 10.0


def simulation() -> Any:
    """A scene of two cameras: one at the origin that looks along z, one 1 m to its right, turned left by 90 degrees."""
    left = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # from ahead (z) to the left (-x)
    names = ["first", "second"]
    return SimpleNamespace(
        model=SimpleNamespace(
            camera_name2id=names.index,
            cam_fovy=[90.0, 60.0],
            stat=SimpleNamespace(extent=1.0),
            vis=SimpleNamespace(map=SimpleNamespace(znear=NEAR, zfar=FAR)),
        ),
        data=SimpleNamespace(
            cam_xmat=np.stack([DOWN.ravel(), (left @ DOWN).ravel()]), cam_xpos=np.array([[0.0, 0, 0], [1, 0, 0]])
        ),
    )


def test_rays_of_the_first_view_are_those_of_its_field_of_view() -> None:
    ray = views_of(simulation(), ["first", "second"])[0].rays((2, 4))
    assert ray.shape == (2, 4, 6)
    # A field of view of 90 degrees reaches from -1 to 1 at depth 1; the cells' centres are at 1/4 and 1/2 steps.
    np.testing.assert_allclose(ray[0, :, 0], [-0.75, -0.25, 0.25, 0.75])
    np.testing.assert_allclose(ray[:, 0, 1], [-0.5, 0.5])
    np.testing.assert_array_equal(ray[..., 2], 1.0)
    np.testing.assert_array_equal(ray[..., 3:], 0.0)


def test_the_second_view_is_where_the_mirrored_picture_shows_it() -> None:
    scene = simulation()
    first, second = views_of(scene, ["first", "second"])
    # In the world it stands to the right and looks left. The picture is mirrored: there it stands left, looks right.
    np.testing.assert_allclose(second.origin, [-1.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(second.rotation @ [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(second.rotation), 1.0)  # a rotation, so a scene that can be
    point = in_first_view(scene, "first", np.array([[0.5, 0.2, 2.0]]))
    np.testing.assert_allclose(point, [[-0.5, 0.2, 2.0]])
    place, depth = first.project(point)
    np.testing.assert_allclose(place, [[-0.25, 0.1]])
    np.testing.assert_allclose(depth, [2.0])
    # What the second one sees along its axis, half a metre ahead, is in the middle of its picture.
    place, depth = second.project(in_first_view(scene, "first", np.array([[0.5, 0.0, 0.0]])))
    np.testing.assert_allclose(place, [[0.0, 0.0]], atol=1e-12)
    np.testing.assert_allclose(depth, [0.5])


def test_wide_pictures_have_wide_fields_of_view() -> None:
    ray = views_of(simulation(), ["first"], aspect=2.0)[0].rays((1, 2))
    np.testing.assert_allclose(ray[0, :, :3], [[-1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])


def test_depth_is_metres_in_the_order_of_the_pictures_cells() -> None:
    scene = simulation()
    depth = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [5.0, 6.0, 7.0, 8.0]])
    # OpenGL's depth buffer, which begins at the bottom: (1/near - 1/z) / (1/near - 1/far)
    buffer = ((1 / NEAR - 1 / depth) / (1 / NEAR - 1 / FAR))[::-1, ::-1]
    np.testing.assert_allclose(metres(scene, buffer), depth)
    maps = oracle_map("depth", scene, ["first"], grid_hw=(2, 2), aspect=1.0, buffers={"first": buffer})
    assert maps.dtype == np.float16
    np.testing.assert_allclose(maps, [[[1.5, 3.5], [5.5, 7.5]]], rtol=1e-3)


def test_options_are_those_that_have_a_truth() -> None:
    assert OracleOptions.parse("depth,ray", "7x9") == OracleOptions(outputs=("ray", "depth"), grid_hw=(7, 9))
    for outputs, grid, named in (
        ("ray,ray_conf", "7x9", "ray_conf"),
        ("depth", "7x9", "depth"),
        ("ray,normals", "7x9", "normals"),
        ("ray", "patch", "patch"),
        ("ray", "14", "14"),
    ):
        with pytest.raises(UserInputError, match=named):
            OracleOptions.parse(outputs, grid)


CAMERAS = (Camera(key="observation.images.image", height=64, width=96),)


def test_a_spec_names_its_source_and_a_cache_keeps_it(tmp_path: Any) -> None:
    spec = oracle_spec(CAMERAS, OracleOptions(outputs=("ray", "depth"), grid_hw=(3, 4)))
    assert spec.source == "oracle:mujoco"
    assert GeometrySpec.from_dict(spec.to_dict()) == spec
    cache = make_store(tmp_path / "cache.zarr", spec=spec)
    assert Header.read(cache).spec.source == "oracle:mujoco"


def test_pictures_are_not_encoded_for_a_policy_of_the_oracle() -> None:
    import torch

    spec = oracle_spec(CAMERAS, OracleOptions(outputs=("ray",), grid_hw=(3, 4)))
    encoder = OnlineEncoder(spec, None)
    batch = {"observation.images.image": torch.zeros(1, 3, 64, 96)}
    with pytest.raises(GeometryError, match=r"oracle:mujoco.*libero_geometry"):
        encoder(batch, torch.device("cpu"), allow_resize=False)
