"""Moves of the camera: geometry that can be seen without LIBERO-Plus, and its rounding."""

import numpy as np
import pytest

from geomcache.errors import UserInputError
from geomcache.simulator.camera import PIVOT, UNMOVED, CameraMove, Pose, displacement

# hf-libero's camera over a table
TABLE = Pose(
    position=np.array([0.6586131746834771, 0.0, 1.6103500240372423]),
    quaternion=np.array([0.6380177736282349, 0.3048497438430786, 0.30484986305236816, 0.6380177736282349]),
)


def ahead(pose: Pose) -> np.ndarray:  # type: ignore[type-arg]
    """Where the camera looks, [3]: MuJoCo's cameras look along -z."""
    direction: np.ndarray = pose.rotation().apply([0.0, 0.0, -1.0])  # type: ignore[type-arg]
    return direction


def test_numbers_are_read_and_written_as_in_a_name() -> None:
    move = CameraMove.parse("45_15_130_5_350")
    assert move == CameraMove(azimuth=45, elevation=15, scale=130, turn_z=5, turn_y=350)
    assert str(move) == "45_15_130_5_350"
    assert str(UNMOVED) == "0_0_100_0_0"
    for wrong in ("", "45", "45_15_130_5", "45_15_0_5_0", "-45_15_130_5_0", "45_15_130_5_0_0", "1000_0_100_0_0"):
        with pytest.raises(UserInputError, match="45_15_130_5_0"):
            CameraMove.parse(wrong)


def test_an_unmoved_camera_is_rounded_to_four_digits() -> None:
    pose = UNMOVED.apply(TABLE)
    np.testing.assert_array_equal(pose.position, [0.6586, 0.0, 1.6104])
    np.testing.assert_array_equal(pose.quaternion, [0.638, 0.3048, 0.3048, 0.638])
    assert pose.distance_to(TABLE) < 1e-4
    assert pose.angle_to(TABLE) < 0.02


def test_azimuth_turns_place_and_view_around_the_vertical() -> None:
    pose = CameraMove(azimuth=90).apply(TABLE)
    np.testing.assert_allclose(pose.position, [0.0, 0.6586, 1.6104], atol=1e-4)
    before, after = ahead(TABLE), ahead(pose)
    np.testing.assert_allclose(after, [-before[1], before[0], before[2]], atol=1e-3)
    assert pose.angle_to(TABLE) == pytest.approx(90, abs=0.02)
    assert pose.distance_to(TABLE) == pytest.approx(0.6586 * np.sqrt(2), abs=1e-3)


def test_elevation_lifts_the_camera_and_keeps_its_distance_from_the_pivot() -> None:
    pose = CameraMove(elevation=15).apply(TABLE)
    assert pose.position[2] > TABLE.position[2]
    assert np.linalg.norm(pose.position - PIVOT) == pytest.approx(np.linalg.norm(TABLE.position - PIVOT), abs=2e-4)
    assert pose.angle_to(TABLE) == pytest.approx(15, abs=0.02)
    assert ahead(pose)[2] < ahead(TABLE)[2]  # it looks down more


def test_scale_moves_along_the_line_to_the_pivot_without_turning() -> None:
    pose = CameraMove(scale=150).apply(TABLE)
    np.testing.assert_allclose(pose.position - PIVOT, 1.5 * (TABLE.position - PIVOT), atol=2e-4)
    assert pose.angle_to(TABLE) < 0.02


def test_a_displacement_leaves_the_rounding_out() -> None:
    assert displacement(UNMOVED, TABLE) == (0.0, 0.0)
    assert displacement(CameraMove(turn_z=10), TABLE) == pytest.approx((0.0, 10), abs=0.02)
    moved = 0.5 * np.hypot(0.6586, 0.8104)
    assert displacement(CameraMove(scale=150), TABLE) == pytest.approx((moved, 0.0), abs=2e-4)


@pytest.mark.parametrize(("move", "angle"), [(CameraMove(turn_z=10), 10), (CameraMove(turn_y=5), 5)])
def test_turns_stay_in_place(move: CameraMove, angle: float) -> None:
    pose = move.apply(TABLE)
    assert pose.distance_to(TABLE) < 1e-4
    assert pose.angle_to(TABLE) == pytest.approx(angle, abs=0.02)
