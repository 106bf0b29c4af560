"""Where LIBERO-Plus puts the first view's camera: its arithmetic, with its rounding.

A move is five whole numbers, as in a variant's name: ``..._view_{azimuth}_{elevation}_{scale}_{turn_z}_{turn_y}_...``
Poses are MuJoCo's: a position in metres and a quaternion w, x, y, z of the camera in the world, z up.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import UserInputError

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

PIVOT = np.array([0.0, 0.0, 0.8])  # metres: what the camera is moved around, above the middle of the table
DIGITS = 4  # LIBERO-Plus rounds poses so, also unmoved ones


@dataclass(frozen=True, kw_only=True)
class Pose:
    """A camera's place and orientation in the world."""

    position: NDArray[np.float64]  # [3] metres
    quaternion: NDArray[np.float64]  # [4] w, x, y, z

    def rotation(self) -> "Rotation":
        """Return the orientation as SciPy has it."""
        from scipy.spatial.transform import Rotation

        return Rotation.from_quat(np.roll(self.quaternion, -1))

    def distance_to(self, other: Self) -> float:
        """Return the distance of two cameras in metres."""
        return float(np.linalg.norm(self.position - other.position))

    def angle_to(self, other: Self) -> float:
        """Return the angle of the rotation between two cameras, in degrees."""
        return float(np.degrees((self.rotation().inv() * other.rotation()).magnitude()))


@dataclass(frozen=True, kw_only=True)
class CameraMove:
    """A move of the first view's camera, in the order in which it is made."""

    elevation: int = 0
    """Degrees of the orbit around the y axis through `PIVOT`."""
    azimuth: int = 0
    """Degrees of the orbit around the z axis."""
    scale: int = 100
    """Distance from `PIVOT` afterwards, in percent of that before."""
    turn_z: int = 0
    """Degrees that the camera turns in place, around the world's z axis."""
    turn_y: int = 0
    """The same around the y axis."""

    @classmethod
    def parse(cls, numbers: str) -> Self:
        """Read the numbers as the name of a variant has them: ``azimuth_elevation_scale_turn_z_turn_y``.

        Raises:
            UserInputError: the text is something else.
        """
        match = re.fullmatch(r"(\d{1,3})_(\d{1,3})_(\d{1,3})_(\d{1,3})_(\d{1,3})", numbers)
        if match is None or match[3] == "0":
            raise UserInputError(
                "camera: expected azimuth_elevation_scale_turnz_turny, in degrees and percent, such as 45_15_130_5_0,"
                f" got {numbers!r}"
            )
        azimuth, elevation, scale, turn_z, turn_y = map(int, match.groups())
        return cls(elevation=elevation, azimuth=azimuth, scale=scale, turn_z=turn_z, turn_y=turn_y)

    def __str__(self) -> str:
        return f"{self.azimuth}_{self.elevation}_{self.scale}_{self.turn_z}_{self.turn_y}"

    def apply(self, pose: Pose) -> Pose:
        """Return the moved pose. Steps that would not move the camera leave out their rounding, as LIBERO-Plus does."""
        from scipy.spatial.transform import Rotation

        position, quaternion = pose.position, pose.quaternion
        if self.elevation:
            orbit = _about_y(self.elevation)
            position = _rounded(orbit.apply(position - PIVOT) + PIVOT)
            quaternion = _turned(orbit, quaternion)
        orbit = Rotation.from_euler("z", self.azimuth, degrees=True)
        position, quaternion = _rounded(orbit.apply(position)), _turned(orbit, quaternion)
        if self.scale != 100:
            position, quaternion = _rounded(PIVOT + (position - PIVOT) * (self.scale / 100)), _rounded(quaternion)
        if self.turn_z:
            quaternion = _turned(Rotation.from_euler("z", self.turn_z, degrees=True), quaternion)
        if self.turn_y:
            quaternion = _turned(_about_y(self.turn_y), quaternion)
        return Pose(position=position, quaternion=quaternion)


UNMOVED = CameraMove()


def displacement(move: CameraMove, pose: Pose) -> tuple[float, float]:
    """Return by how much a move displaces a camera: metres, to 4 digits, and degrees, to 2; without the rounding."""
    moved, unmoved = move.apply(pose), UNMOVED.apply(pose)
    return round(moved.distance_to(unmoved), 4), round(moved.angle_to(unmoved), 2)


def _about_y(degrees: float) -> Any:
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec(np.radians(-degrees) * np.array([0.0, 1.0, 0.0]))


def _turned(rotation: Any, quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.spatial.transform import Rotation

    return _rounded(np.roll((rotation * Rotation.from_quat(np.roll(quaternion, -1))).as_quat(), 1))


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values, np.float64).round(DIGITS)
