"""`lerobot-rollout` with the policy on a robot, geometry online: synchronous, and with real-time chunking.

What real-time chunking does to geometry: each chunk is conditioned on the geometry of the newest frame when its
prediction begins, the same frame as its pictures and its state. The actions that the robot does meanwhile are still
those of the chunk before, so they were made with the geometry of an earlier frame; of the new chunk they are left out.
"""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.scripts import lerobot_rollout

from geomcache.geometry import Geometry
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy, PI05GeometryPytorch
from tests.support.acting import CHUNK, SIDE, make_acting_checkpoint
from tests.support.mockrobot import ACTIONS, CAMERAS, JOINTS, MockRobot, last_robot, scripted

STEPS = 200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, random_da3_folder: Path) -> Path:
    return make_acting_checkpoint(tmp_path_factory.mktemp("rollout"), random_da3_folder)


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(_network: Any, shape: Any, device: Any) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device)

    monkeypatch.setattr(PI05GeometryPytorch, "sample_noise", noise)


@dataclass
class Predicted:
    """What one chunk was predicted from, and the chunk."""

    state: torch.Tensor
    geometry: Geometry
    options: dict[str, Any]
    actions: torch.Tensor


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Predicted]]:
    """Every chunk that a policy predicts, in this test."""
    chunks: list[Predicted] = []
    geometries: list[Geometry] = []
    predict, encode = PI05GeometryPolicy.predict_action_chunk, PI05GeometryPolicy.geometry_of

    def watched_encode(self: Any, batch: Any) -> Geometry:
        geometries.append(encode(self, batch))
        return geometries[-1]  # LeRobot predicts one chunk at a time

    def watched(self: Any, batch: Any, **options: Any) -> torch.Tensor:
        actions = predict(self, batch, **options)
        kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        chunks.append(Predicted(batch["observation.state"].clone(), geometries[-1], kept, actions.clone()))
        _policies.append(self)
        return actions

    monkeypatch.setattr(PI05GeometryPolicy, "geometry_of", watched_encode)
    monkeypatch.setattr(PI05GeometryPolicy, "predict_action_chunk", watched)
    yield chunks
    _policies.clear()


_policies: list[Any] = []


def roll_out(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, *arguments: str, looks: int) -> MockRobot:
    command = ["lerobot-rollout", f"--policy.path={checkpoint}", "--robot.type=geomcache_mock", f"--robot.side={SIDE}"]
    command += [f"--robot.looks={looks}", "--task=fold", "--return_to_initial_position=false", "--play_sounds=false"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    # What it leaves behind in a process: a root logger without pytest's handlers, and handlers of signals.
    monkeypatch.setattr(lerobot_rollout, "init_logging", lambda: None)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        lerobot_rollout.main()
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
    return last_robot()


def in_process(policy: Any, checkpoint: Path, number: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunk of the policy for what the robot saw the nth time, before and after LeRobot's postprocessor."""
    seen = scripted(number, SIDE)
    frame = {f"observation.images.{name}": seen[name] for name in CAMERAS}
    frame["observation.state"] = torch.tensor([seen[name] for name in JOINTS], dtype=torch.float32).numpy()
    preprocessor, postprocessor = make_pre_post_processors(policy.config, pretrained_path=str(checkpoint))
    observation = prepare_observation_for_inference(frame, torch.device("cpu"), "fold", MockRobot.name)
    chunk = policy.predict_action_chunk(preprocessor(observation), **options)
    return chunk[0], postprocessor(chunk)[0]


def test_synchronous_for_200_steps(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, predicted: list[Predicted]
) -> None:
    # LeRobot looks once before the first step.
    robot = roll_out(monkeypatch, checkpoint, "--fps=1000", looks=STEPS + 1)
    assert len(robot.actions) == STEPS
    assert len(predicted) == STEPS / CHUNK
    policy = _policies[0]
    assert policy.online.encoder.calls == len(predicted)
    told = [torch.tensor([action[name] for name in ACTIONS]) for action in robot.actions]
    for chunk in range(0, STEPS // CHUNK, 7):
        _, expected = in_process(policy, checkpoint, 1 + chunk * CHUNK)
        for step, action in enumerate(expected):
            assert torch.equal(told[chunk * CHUNK + step], action), (chunk, step)
    assert torch.stack(told).std() > 0.01


def frame_number(chunk: Predicted) -> int:
    """How often the robot had been looked at before the frame that a chunk was predicted from: its script says it."""
    return round(chunk.state.flatten()[0].item() / 3)


def test_real_time_chunking_for_200_steps(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, predicted: list[Predicted]
) -> None:
    # A chunk lasts two seconds, so that a busy machine predicts the next one before it is used up.
    long = ["--policy.chunk_size=50", "--policy.n_action_steps=50", "--fps=25"]
    rtc = ["--inference.type=rtc", "--inference.queue_threshold=30", "--inference.rtc.execution_horizon=10"]
    robot = roll_out(monkeypatch, checkpoint, *long, *rtc, looks=STEPS + 1)
    assert len(robot.actions) > STEPS / 2  # none while the first chunk is predicted
    policy = _policies[0]
    assert policy.online.encoder.calls == len(predicted) > STEPS / 50
    numbers = [frame_number(chunk) for chunk in predicted]
    assert numbers == sorted(set(numbers))  # each chunk has a newer frame than the one before
    overlapping = [chunk for chunk in predicted if chunk.options["prev_chunk_left_over"] is not None]
    assert len(overlapping) >= len(predicted) - 2
    # The same chunk in this process, from one frame alone: pictures, state and geometry are all of that frame.
    for chunk, number in list(zip(predicted, numbers, strict=True))[::4]:
        actions, _ = in_process(policy, checkpoint, number, **chunk.options)
        alone = predicted.pop()
        for (_, ours), (_, theirs) in zip(chunk.geometry.items(), alone.geometry.items(), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(chunk.actions[0], actions)
