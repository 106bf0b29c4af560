"""Configuration of the policy `smolvla_geometry`: SmolVLA's own options and those of geometry tokens.

There is no alignment loss: it is made for PaliGemma, whose image tokens are patches of the picture, row by row.
"""

from dataclasses import dataclass
from typing import ClassVar

from lerobot.configs import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from geomcache.errors import UserInputError
from geomcache.policy.options import GeometryOptions


@PreTrainedConfig.register_subclass("smolvla_geometry")
@dataclass
class SmolVLAGeometryConfig(GeometryOptions, SmolVLAConfig):  # type: ignore[misc]  # LeRobot is not typed
    """Options of SmolVLA with geometry. Written into the checkpoint's ``config.json``."""

    plain_name: ClassVar[str] = "SmolVLA"
    published: ClassVar[str] = "lerobot/smolvla_base"

    def check_options(self) -> None:
        """Check the options of geometry, and that LeRobot does not pad the prefix after its state token.

        Raises:
            UserInputError: an option cannot be used.
            CacheFormatError: the spec is malformed.
        """
        super().check_options()
        if self.has_tokens and self.prefix_length > 0:
            raise UserInputError(
                f"prefix_length: expected -1 with geometry tokens, got {self.prefix_length}: LeRobot's padding would"
                " stand between geometry and state: leave it out"
            )

    @property
    def needs_pretrained(self) -> bool:
        """Whether weights must be given: neither random ones nor the language model's were asked for."""
        return not (self.random_init or self.load_vlm_weights)
