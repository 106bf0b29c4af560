"""The policy `pi0_geometry`: LeRobot's Pi0 with geometry tokens at the end of its prefix, or aligned to geometry."""

from typing import Any

from lerobot.policies.pi0.modeling_pi0 import PaliGemmaWithExpertModel, PI0Policy, PI0Pytorch
from torch import nn

from geomcache.policy.paligemma import PaliGemmaNetwork, PaliGemmaPolicy
from geomcache.policy.pi0.configuration_pi0_geometry import PI0GeometryConfig
from geomcache.policy.small_paligemma import SmallPaliGemmaWithExpert


class SmallPI0(SmallPaliGemmaWithExpert, PaliGemmaWithExpertModel):  # type: ignore[misc]  # LeRobot is not typed
    """The pair of Pi0."""


class PI0GeometryPytorch(PaliGemmaNetwork, PI0Pytorch):  # type: ignore[misc]  # LeRobot is not typed
    """LeRobot's Pi0 network with a prefix that can be extended by given tokens. The state is in its suffix."""

    text_argument = "lang_tokens"
    small_class = SmallPI0

    @staticmethod
    def small_layers(config: Any, width: int) -> dict[str, nn.Module]:
        """Return the other layers whose shapes depend on the size, by name."""
        return {
            "action_in_proj": nn.Linear(config.max_action_dim, width),
            "action_out_proj": nn.Linear(width, config.max_action_dim),
            "state_proj": nn.Linear(config.max_state_dim, width),
            "action_time_mlp_in": nn.Linear(2 * width, width),
            "action_time_mlp_out": nn.Linear(width, width),
        }


class PI0GeometryPolicy(PaliGemmaPolicy, PI0Policy):  # type: ignore[misc]  # LeRobot is not typed
    """LeRobot's Pi0 policy with geometry."""

    config_class = PI0GeometryConfig
    name = "pi0_geometry"
    network_class = PI0GeometryPytorch
