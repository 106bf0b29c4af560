"""Hellos and observations, compared with the policy and with the hello."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation, map_robot_keys_to_lerobot_features

from geomcache.errors import RequestError
from geomcache.serving.messages import Hello, Wanted, read_hello, read_observation
from geomcache.serving.pickled import read
from tests.support.mockrobot import CAMERAS, JOINTS, MockRobot, MockRobotConfig, scripted

SIDE = 8
KEYS = tuple(f"observation.images.{name}" for name in CAMERAS)
WANTED = Wanted(
    policy="runs/1", policy_type="pi05_geometry", state_size=2, cameras=dict.fromkeys(KEYS, (SIDE, SIDE)), chunk_size=10
)


def robot_features(side: int = SIDE) -> dict[str, Any]:
    features: dict[str, Any] = map_robot_keys_to_lerobot_features(MockRobot(MockRobotConfig(side=side)))
    return features


def hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "policy_type": "pi05_geometry",
        "pretrained_name_or_path": "runs/1",
        "lerobot_features": robot_features(),
        "actions_per_chunk": 10,
    }
    return read_hello(read(pickle.dumps(RemotePolicyConfig(**(fields | changes)))), WANTED)


def test_a_hello_of_lerobots_client() -> None:
    said = hello(device="cuda")
    assert said.joints == JOINTS
    assert said.cameras == WANTED.cameras
    assert (said.actions_per_chunk, said.device) == (10, "cuda")
    # In the form that LeRobot prepares observations by; its note that a camera is none of depth is not read.
    assert said.features == {key: without(feature, "info") for key, feature in robot_features().items()}


def without(features: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: feature for key, feature in features.items() if key not in keys}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"policy_type": "act"}, ("pi05_geometry", "act")),
        ({"pretrained_name_or_path": "runs/2"}, ("runs/1", "runs/2")),
        ({"actions_per_chunk": 11}, ("1 to 10", "11")),
        ({"actions_per_chunk": 0}, ("1 to 10", "0")),
        ({"actions_per_chunk": True}, ("actions_per_chunk", "bool")),
        ({"rename_map": {"a": "b"}}, ("rename_map", "front, wrist")),
        ({"lerobot_features": robot_features(16)}, (KEYS[0], "8x8", "16x16")),
        ({"lerobot_features": without(robot_features(), KEYS[1])}, (KEYS[1], KEYS[0])),
        ({"lerobot_features": robot_features() | {f"{KEYS[0]}t": robot_features()[KEYS[0]]}}, (f"{KEYS[0]}t", KEYS[1])),
        (
            {
                "lerobot_features": robot_features()
                | {"observation.state": {"dtype": "float32", "shape": (1,), "names": ["x"]}}
            },
            ("state", "2", "1 (x)"),
        ),
        ({"lerobot_features": without(robot_features(), "observation.state")}, ("state", "2", "0")),
        ({"lerobot_features": robot_features() | {"observation.tactile": {"shape": (3,)}}}, ("observation.tactile",)),
        (
            {"lerobot_features": robot_features() | {"observation.images.depth": {"shape": (8, 8, 1)}}},
            ("images.depth",),
        ),
        ({"lerobot_features": 3}, ("lerobot_features",)),
        ({"device": None}, ("device", "none")),
    ],
)
def test_a_robot_that_does_not_fit_is_refused(changes: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as error:
        hello(**changes)
    for value in named:
        assert value in str(error.value)
    assert "\n" not in str(error.value)


def observed(**changes: Any) -> Any:
    values = {**scripted(3, SIDE), "task": "fold", "a.sensor": 3.0, **changes}
    message = TimedObservation(timestamp=2.5, timestep=4, observation=values, must_go=True)
    return read_observation(read(pickle.dumps(message)), hello())


def test_an_observation_of_lerobots_client() -> None:
    sent, found = scripted(3, SIDE), observed()
    assert (found.timestamp, found.timestep, found.must_go) == (2.5, 4, True)
    np.testing.assert_array_equal(found.state, np.array([sent[name] for name in JOINTS], np.float32))
    assert found.values.keys() == {*JOINTS, *CAMERAS, "task"}  # what the hello named, as LeRobot's server takes it
    for name in CAMERAS:
        np.testing.assert_array_equal(found.values[name], sent[name])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x.pos": math.nan}, ("x.pos", "nan")),
        ({"x.pos": math.inf}, ("x.pos", "inf")),
        ({"x.pos": "1"}, ("x.pos", "str")),
        ({"x.pos": 10**400}, ("x.pos", "int")),
        ({"front": np.zeros((SIDE, SIDE + 1, 3), np.uint8)}, ("front", "[8, 8, 3]", "[8, 9, 3]")),
        ({"front": np.zeros((SIDE, SIDE, 3), np.float32)}, ("front", "uint8", "float32")),
        ({"front": None}, ("front", "none")),
        ({"front": b"bytes"}, ("front", "memoryview")),
        ({"task": "x" * 5000}, ("task", "4096")),
        ({"task": 3}, ("task", "int")),
    ],
)
def test_an_observation_other_than_the_hello_is_refused(changes: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as error:
        observed(**changes)
    for value in named:
        assert value in str(error.value)


def test_a_missing_number_or_picture_is_refused() -> None:
    for name in ("x.pos", "wrist"):
        values = scripted(3, SIDE)
        del values[name]
        message = pickle.dumps(TimedObservation(timestamp=0.0, timestep=0, observation=values))
        with pytest.raises(RequestError, match=name):
            read_observation(read(message), hello())


def test_each_message_has_its_call() -> None:
    observation = read(pickle.dumps(TimedObservation(timestamp=0.0, timestep=0, observation={})))
    with pytest.raises(RequestError, match="RemotePolicyConfig"):
        read_hello(observation, WANTED)
    fields = {"policy_type": "a", "pretrained_name_or_path": "b", "lerobot_features": {}, "actions_per_chunk": 1}
    with pytest.raises(RequestError, match="TimedObservation"):
        read_observation(read(pickle.dumps(RemotePolicyConfig(**fields))), hello())


def test_what_a_robot_sends_fits_the_largest_message() -> None:
    """With names as long as robots have, and not much more."""
    values: dict[str, Any] = {f"left_arm_joint_{number:03}.pos": 0.123 * number for number in range(40)}
    values |= {"front": np.zeros((480, 640, 3), np.uint8), "task": "x" * 400}
    message = pickle.dumps(TimedObservation(timestamp=1.0, timestep=1, observation=values))
    said = Hello(
        joints=tuple(list(values)[:40]),
        cameras={"observation.images.front": (480, 640)},
        actions_per_chunk=1,
        device="cpu",
    )
    assert len(message) < said.largest_message < 1.1 * len(message)
