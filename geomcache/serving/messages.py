"""The two messages of a robot client, checked: its hello, and an observation.

A hello says what the robot has; it is compared with the policy before anything moves. Every later observation must have
what the hello said: the same numbers, the same cameras, the same sizes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import RequestError, did_you_mean
from geomcache.serving.pickled import Record

STATE, IMAGES = "observation.state", "observation.images."  # LeRobot's
MAX_TEXT = 4096  # characters of a task or a name
MAX_JOINTS = 1024
MAX_CAMERAS = 16


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a policy needs of a robot."""

    policy: str
    """Folder or Hub id, as it was given to the server."""
    policy_type: str
    state_size: int
    cameras: Mapping[str, tuple[int, int]]
    """Key of each camera, such as ``observation.images.front``, and height and width of its pictures."""
    chunk_size: int


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a robot says when it connects, checked against a policy."""

    joints: tuple[str, ...]
    """Names of the numbers that make the state, in its order."""
    cameras: Mapping[str, tuple[int, int]]
    actions_per_chunk: int
    device: str
    """The device that the client asks for. The server chooses its own."""

    @property
    def largest_message(self) -> int:
        """Bytes that an observation of this robot can have."""
        return largest_message(self.cameras, len(self.joints))

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """The robot's features in LeRobot's form."""
        state = {STATE: {"dtype": "float32", "shape": (len(self.joints),), "names": list(self.joints)}}
        pictures = {
            key: {"dtype": "image", "shape": (*size, 3), "names": ["height", "width", "channels"]}
            for key, size in self.cameras.items()
        }
        return state | pictures


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What a robot sees at one time step."""

    timestamp: float
    """Seconds since 1970, of the robot's clock."""
    timestep: int
    must_go: bool
    """The robot has no action left: the observation is not left out for being like the last one."""
    state: NDArray[np.float32]
    values: Mapping[str, Any]
    """Numbers, pictures [H, W, 3] uint8 and the task, under the robot's names."""


def largest_message(cameras: Mapping[str, tuple[int, int]], joints: int) -> int:
    """Return the bytes that an observation can have: its pictures, and room for names, numbers and the task."""
    return sum(height * width * 3 for height, width in cameras.values()) + 128 * joints + 64 * 1024


def read_hello(record: Record, wanted: Wanted) -> Hello:
    """Check LeRobot's `RemotePolicyConfig`.

    Raises:
        RequestError: it is malformed, or the robot is not what the policy needs.
    """
    fields = _fields(record, "RemotePolicyConfig")
    asked_type, asked_policy = _text(fields, "policy_type"), _text(fields, "pretrained_name_or_path")
    for name, asked, served in (
        ("policy_type", asked_type, wanted.policy_type),
        ("pretrained_name_or_path", asked_policy, wanted.policy),
    ):
        if asked != served:
            raise RequestError(
                f"{name}: expected {served}, which this server serves, got {asked}: start the client with"
                f" --{name}={served}"
            )
    if fields.get("rename_map"):
        raise RequestError(
            "rename_map: expected none, got one: name the robot's cameras as the policy's:"
            f" {', '.join(key.removeprefix(IMAGES) for key in wanted.cameras)}"
        )
    actions = _integer(fields, "actions_per_chunk")
    if not 1 <= actions <= wanted.chunk_size:
        raise RequestError(f"actions_per_chunk: expected 1 to {wanted.chunk_size} of this policy, got {actions}")
    joints, cameras = _features(fields.get("lerobot_features"))
    _compare_cameras(cameras, wanted.cameras)
    if len(joints) != wanted.state_size:
        raise RequestError(
            f"state: expected {wanted.state_size} numbers, which the policy was trained with, the robot has"
            f" {len(joints)} ({', '.join(joints)[:200]}): use the robot that the dataset was recorded with"
        )
    return Hello(joints=joints, cameras=cameras, actions_per_chunk=actions, device=_text(fields, "device"))


def read_observation(record: Record, hello: Hello) -> Observation:
    """Check LeRobot's `TimedObservation` against what the robot said it has.

    Raises:
        RequestError: it is malformed, a number or camera is missing, a number is not finite, or a picture has another
            size or dtype.
    """
    fields = _fields(record, "TimedObservation")
    observed = fields.get("observation")
    if type(observed) is not dict:
        raise RequestError(f"observation: expected names and values, got {type(observed).__name__}")
    numbers = [_number(observed, name) for name in hello.joints]
    values: dict[str, Any] = dict(zip(hello.joints, numbers, strict=True))
    for key, size in hello.cameras.items():
        name = key.removeprefix(IMAGES)
        values[name] = _picture(observed.get(name), name, size)
    if "task" in observed:
        values["task"] = _text(observed, "task")
    return Observation(
        timestamp=_number(fields, "timestamp"),
        timestep=_integer(fields, "timestep"),
        must_go=fields.get("must_go") is True,
        state=np.array(numbers, dtype=np.float32),
        values=values,
    )


def _compare_cameras(cameras: Mapping[str, tuple[int, int]], wanted: Mapping[str, tuple[int, int]]) -> None:
    for key in wanted:
        if key not in cameras:
            raise RequestError(
                f"camera {key}: expected on the robot, it has {', '.join(cameras) or 'none'}: give the robot's cameras"
                f" the names that the policy was trained with ({', '.join(wanted)})"
            )
    for key in cameras:
        if key not in wanted:
            raise RequestError(
                f"camera {key}: {did_you_mean(key, wanted)}expected {', '.join(wanted)}, which the policy was trained"
                " with, and no other: leave it out of the robot's cameras"
            )
    for key, (height, width) in wanted.items():
        if cameras[key] != (height, width):
            raise RequestError(
                f"camera {key}: expected {height}x{width} pixels, as the policy was trained with, the robot has"
                f" {cameras[key][0]}x{cameras[key][1]}: set the camera to that size"
            )


def _features(features: Any) -> tuple[tuple[str, ...], dict[str, tuple[int, int]]]:
    """Return the names of the numbers and the sizes of the pictures in LeRobot's features of a robot."""
    if type(features) is not dict or len(features) > MAX_CAMERAS + 1:
        raise RequestError(f"lerobot_features: expected a state and at most {MAX_CAMERAS} cameras")
    joints: tuple[str, ...] = ()
    cameras = {}
    for key, feature in features.items():
        shape, names = (feature.get("shape"), feature.get("names")) if type(feature) is dict else (None, None)
        sides = shape if type(shape) is tuple and all(type(side) is int for side in shape) else ()
        if key == STATE and type(names) is list and sides == (len(names),) and len(names) <= MAX_JOINTS:
            joints = tuple(_text({"name": name}, "name") for name in names)
        elif key.startswith(IMAGES) and len(key) <= 256 and len(sides) == 3 and sides[2] == 3:
            cameras[key] = (sides[0], sides[1])
        else:
            raise RequestError(
                f"lerobot_features: {key[:80]}: expected {STATE} with its names, or a colour camera {IMAGES}NAME with"
                " [height, width, 3]: leave other sensors out of the robot's configuration"
            )
    return joints, cameras


def _fields(record: Record, name: str) -> dict[str, Any]:
    if record.name != name:
        raise RequestError(f"message: expected {name}, got {record.name}")
    return record.fields


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if type(value) is not str or len(value) > MAX_TEXT:
        raise RequestError(f"{name}: expected text of at most {MAX_TEXT} characters, got {_kind(value)}")
    return value


def _integer(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 <= value < 2**53:
        raise RequestError(f"{name}: expected a whole number from 0, got {_kind(value)}")
    return value


def _number(values: Mapping[str, Any], name: str) -> float:
    value: Any = values.get(name)
    if type(value) not in (int, float, bool) or not -1e30 < value < 1e30 or not math.isfinite(value):
        raise RequestError(f"{name}: expected a finite number, got {value if type(value) is float else _kind(value)}")
    return float(value)


def _picture(value: Any, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.shape != (*size, 3):
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else _kind(value)
        raise RequestError(f"camera {name}: expected uint8 [{size[0]}, {size[1]}, 3], as at the hello, got {found}")
    return value


def _kind(value: Any) -> str:
    return "none" if value is None else type(value).__name__.strip("_")
