"""A robot for LeRobot's own commands: two cameras and joints that follow a script, and a record of what it was told.

LeRobot finds the class `MockRobot` in a module of that name in lower letters next to the configuration's.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

CAMERAS = ("front", "wrist")
JOINTS = ("x.pos", "y.pos")
ACTIONS = ("x.pos", "y.pos", "z.pos")


def scripted(number: int, side: int) -> dict[str, Any]:
    """What the robot sees the nth time it looks: states 3 apart, other pictures each time."""
    generator = np.random.default_rng(number)
    pictures = {name: generator.integers(0, 256, (side, side, 3), np.uint8) for name in CAMERAS}
    return {"x.pos": 3.0 * number, "y.pos": -1.0 * number, **pictures}


@RobotConfig.register_subclass("geomcache_mock")
@dataclass
class MockRobotConfig(RobotConfig):  # type: ignore[misc]  # LeRobot is not typed
    side: int = 64
    """Height and width of both cameras."""
    looks: int = 1_000_000
    """How often it can be looked at; then it interrupts its caller as Ctrl-C does."""
    record: Path | None = None
    """File for a line of each action, with how often the robot had been looked at."""


class MockRobot(Robot):  # type: ignore[misc]  # LeRobot is not typed
    config_class = MockRobotConfig
    name = "geomcache_mock"

    def __init__(self, config: MockRobotConfig) -> None:
        super().__init__(config)
        self.config = config
        self.cameras = dict.fromkeys(CAMERAS)
        self.looked = 0
        self.actions: list[dict[str, float]] = []
        self._connected = False
        _made.append(self)

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        pictures = dict.fromkeys(CAMERAS, (self.config.side, self.config.side, 3))
        return {**dict.fromkeys(JOINTS, float), **pictures}

    @cached_property
    def action_features(self) -> dict[str, type]:
        return dict.fromkeys(ACTIONS, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self._connected = True

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        if self.looked == self.config.looks:
            raise KeyboardInterrupt
        self.looked += 1
        return scripted(self.looked - 1, self.config.side)

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.actions.append(dict(action))
        if self.config.record is not None:
            with self.config.record.open("a") as file:
                file.write(json.dumps({"looked": self.looked, **action}) + "\n")
        return action

    def disconnect(self) -> None:
        self._connected = False


_made: list[MockRobot] = []


def last_robot() -> MockRobot:
    """The robot that LeRobot made last, in this process."""
    return _made[-1]
