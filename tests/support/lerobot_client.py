"""LeRobot's robot client and policy server, imported without what their import does to this process.

They make a folder for logs where the process is, and replace the root logger's handlers.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.support.mockrobot import MockRobotConfig


@pytest.fixture(scope="session")
def lerobot_async(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, ModuleType]:
    """`robot_client` and `policy_server`."""
    from lerobot.async_inference import helpers

    with contextlib.chdir(tmp_path_factory.mktemp("lerobot")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "init_logging", lambda **_: None)
        from lerobot.async_inference import policy_server, robot_client
    for module in (robot_client.RobotClient, policy_server.PolicyServer):
        module.logger.setLevel(logging.CRITICAL)
    return robot_client, policy_server


class Robot:
    """LeRobot's client on the mock robot, its two loops in threads."""

    def __init__(self, robot_client: ModuleType, port: int, policy: str, **options: Any) -> None:
        from lerobot.async_inference.configs import RobotClientConfig

        chosen: dict[str, Any] = {
            "policy_type": "pi05_geometry",
            "pretrained_name_or_path": policy,
            "robot": MockRobotConfig(**options.pop("robot", {})),
            "actions_per_chunk": 10,
            "task": "fold",
            "server_address": f"127.0.0.1:{port}",
            "fps": 200,
            "aggregate_fn_name": "latest_only",
        }
        self.client = robot_client.RobotClient(RobotClientConfig(**(chosen | options)))
        self.threads: list[threading.Thread] = []

    def run(self) -> None:
        """Start both loops, after a successful `start`."""
        for target, arguments in ((self.client.receive_actions, ()), (self.client.control_loop, ("fold",))):
            self.threads.append(threading.Thread(target=target, args=arguments, daemon=True))
            self.threads[-1].start()

    def stop(self) -> None:
        """Stop both loops and close the connection."""
        self.client.shutdown_event.set()
        for thread in self.threads:
            thread.join(30)
        self.client.stop()

    @property
    def actions(self) -> list[dict[str, float]]:
        """What the robot was told so far."""
        return list(self.client.robot.actions)


@contextlib.contextmanager
def acting(robot: Robot) -> Iterator[Robot]:
    """Let a robot act while this lasts."""
    assert robot.client.start()
    robot.run()
    try:
        yield robot
    finally:
        robot.stop()
