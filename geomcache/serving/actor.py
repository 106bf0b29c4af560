"""A policy that acts on a robot's observations: loaded, warm, one chunk at a time, each part timed."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from geomcache.errors import UserInputError
from geomcache.evaluation.latency import ChunkTime, ChunkTimer, unwrapped
from geomcache.lerobot_options import parse_options
from geomcache.policy import environment
from geomcache.policy.checkpoint import has_adapter, read_config
from geomcache.policy.options import as_geometry_config
from geomcache.serving.messages import IMAGES, STATE, Hello, Observation, Wanted

EMPTY_CAMERA = f"{IMAGES}empty_camera_"  # what LeRobot adds for `empty_cameras`, which no robot has


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Actions that were predicted from one observation, and the seconds that each part took."""

    actions: Any  # Tensor [n, action dim] float32, on the CPU, as the robot takes them
    preparing: float
    """Pictures to tensors, and LeRobot's preprocessor."""
    policy: ChunkTime
    finishing: float
    """LeRobot's postprocessor, and the way to the CPU."""

    def parts(self) -> str:
        """Return the parts in milliseconds, in a line."""
        parts = {"prepare": self.preparing}
        if self.policy.geometry:
            parts["DA3"] = self.policy.geometry
        parts["prefix"] = self.policy.prefix
        if self.policy.denoising_steps:
            parts["denoising"] = self.policy.denoising
        parts["finish"] = self.finishing
        return ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in parts.items())


class Actor:
    """A policy with its processors. Threads share it; one at a time predicts.

    Attributes:
        wanted: what the policy needs of a robot.
        policy: LeRobot's policy, or the `PeftModel` around it.
        chunks: chunks that were predicted, without the one that warmed it up.
    """

    def __init__(self, wanted: Wanted, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        """Take a policy in evaluation mode and LeRobot's processors."""
        self.wanted = wanted
        self.policy = policy
        self.chunks = 0
        self._config = unwrapped(policy).config
        self._preprocessor, self._postprocessor = preprocessor, postprocessor
        self._timer = ChunkTimer(policy)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, policy: str, lerobot_args: Sequence[str] = ()) -> Self:
        """Load a checkpoint and its processors.

        Args:
            policy: a folder or Hub id.
            lerobot_args: options of the policy, such as ``--policy.geom_engine=compiled``.

        Raises:
            UserInputError: an option is not one of the policy's, or the checkpoint has no adapter.
            ModelError: the checkpoint, or the DA3 that it was trained with, is not available or does not fit.
        """
        saved = read_config(policy)
        config = _parse(policy, lerobot_args)
        if config.has_tokens:
            if not has_adapter(saved):
                raise UserInputError(
                    f"policy.use_geom_prefix: expected false for {policy}, which has no geometry adapter, got true:"
                    " leave it out, or train the checkpoint with geometry first"
                )
            environment.find_da3(policy, config.geometry_spec, config.geom_model_id)
        loaded, preprocessor, postprocessor = _load(config)
        return cls(_wanted(policy, str(saved["type"]), config), loaded, preprocessor, postprocessor)

    @property
    def encoder_calls(self) -> int:
        """Calls of the policy's DA3 encoder since it was loaded, warming up included."""
        return self._timer.encoder_calls

    def warm(self) -> float:
        """Predict once from black pictures, so that what is loaded or compiled at the first chunk is there.

        Returns:
            Seconds that it took.
        """
        cameras = self.wanted.cameras
        joints = tuple(str(number) for number in range(self.wanted.state_size))
        hello = Hello(joints=joints, cameras=cameras, actions_per_chunk=1, device="")
        black = {key.removeprefix(IMAGES): np.zeros((*size, 3), np.uint8) for key, size in cameras.items()}
        state = np.zeros(len(joints), np.float32)
        values = {**dict.fromkeys(joints, 0.0), **black, "task": "warm up"}
        began = time.perf_counter()
        self.predict(Observation(timestamp=0.0, timestep=0, must_go=True, state=state, values=values), hello)
        self.chunks = 0
        return time.perf_counter() - began

    def predict(self, observation: Observation, hello: Hello) -> Chunk:
        """Predict a chunk of actions.

        Raises:
            GeometryError: the pictures do not fit what the policy was trained with.
            ModelError: the DA3 that the policy was trained with is not available.
        """
        import torch
        from lerobot.async_inference.helpers import raw_observation_to_observation

        with self._lock, torch.inference_mode():
            began = time.perf_counter()
            batch = raw_observation_to_observation(
                dict(observation.values), hello.features, self._config.image_features
            )
            batch = self._preprocessor(batch)
            prepared = time.perf_counter()
            chunk = self.policy.predict_action_chunk(batch)[:, : hello.actions_per_chunk]
            predicted = time.perf_counter()
            actions = self._postprocessor(chunk).squeeze(0).float().cpu()
            self.chunks += 1
            return Chunk(
                actions=actions,
                preparing=prepared - began,
                policy=self._timer.times.pop(),
                finishing=time.perf_counter() - predicted,
            )

    def reset(self) -> None:
        """Forget the last robot: policy and processors begin a new episode."""
        with self._lock:
            for part in (self.policy, self._preprocessor, self._postprocessor):
                part.reset()


def _parse(policy: str, lerobot_args: Sequence[str]) -> Any:
    """Parse the policy's options, by LeRobot, to the configuration that it is served with."""
    from lerobot.configs import PreTrainedConfig, parser

    @dataclass
    class Options:
        policy: PreTrainedConfig | None = None

        def __post_init__(self) -> None:
            overrides = parser.get_cli_overrides("policy") or []
            self.policy = PreTrainedConfig.from_pretrained(policy, cli_overrides=overrides)
            self.policy.pretrained_path = policy

        @classmethod
        def __get_path_fields__(cls) -> list[str]:
            return ["policy"]

    parsed = parse_options("geomcache serve", Options, [f"--policy.path={policy}", *lerobot_args])
    return as_geometry_config(parsed.policy)


def _load(config: Any) -> tuple[Any, Any, Any]:
    """Load policy and processors as LeRobot's rollouts do."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.rollout.context import _load_pretrained_policy

    policy = _load_pretrained_policy(config).to(config.device).eval()
    device = {"device_processor": {"device": config.device}}
    preprocessor, postprocessor = make_pre_post_processors(
        policy_cfg=config, pretrained_path=config.pretrained_path, preprocessor_overrides=device
    )
    return policy, preprocessor, postprocessor


def _wanted(policy: str, policy_type: str, config: Any) -> Wanted:
    cameras = {
        key: (feature.shape[1], feature.shape[2])
        for key, feature in config.image_features.items()
        if not key.startswith(EMPTY_CAMERA)
    }
    if config.has_tokens:
        cameras |= {camera.key: (camera.height, camera.width) for camera in config.geometry_spec.cameras}
    return Wanted(
        policy=policy,
        policy_type=policy_type,
        state_size=config.input_features[STATE].shape[0],
        cameras=cameras,
        chunk_size=config.chunk_size,
    )
