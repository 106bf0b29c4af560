"""Configuration of the policy `pi0_geometry`: Pi0's own options and those of geometry."""

from dataclasses import dataclass
from typing import ClassVar

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config

from geomcache.policy.paligemma_options import PaliGemmaOptions


@PreTrainedConfig.register_subclass("pi0_geometry")
@dataclass
class PI0GeometryConfig(PaliGemmaOptions, PI0Config):  # type: ignore[misc]  # LeRobot is not typed
    """Options of Pi0 with geometry. Written into the checkpoint's ``config.json``."""

    plain_name: ClassVar[str] = "Pi0"
    published: ClassVar[str] = "lerobot/pi0_base"
