"""Configuration of the policy `pi05_geometry`: Pi0.5's own options and those of geometry."""

from dataclasses import dataclass
from typing import ClassVar

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config

from geomcache.policy.paligemma_options import PaliGemmaOptions


@PreTrainedConfig.register_subclass("pi05_geometry")
@dataclass
class PI05GeometryConfig(PaliGemmaOptions, PI05Config):  # type: ignore[misc]  # LeRobot is not typed
    """Options of Pi0.5 with geometry. Written into the checkpoint's ``config.json``."""

    plain_name: ClassVar[str] = "Pi0.5"
    published: ClassVar[str] = "lerobot/pi05_base"
