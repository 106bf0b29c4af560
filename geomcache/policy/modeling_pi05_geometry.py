"""The policy `pi05_geometry`: LeRobot's Pi0.5 with geometry tokens at the end of its prefix, or aligned to geometry."""

from typing import Any

from lerobot.policies.pi05.modeling_pi05 import PaliGemmaWithExpertModel, PI05Policy, PI05Pytorch
from torch import nn

from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.paligemma import PaliGemmaNetwork, PaliGemmaPolicy
from geomcache.policy.small_paligemma import SmallPaliGemmaWithExpert


class SmallPI05(SmallPaliGemmaWithExpert, PaliGemmaWithExpertModel):  # type: ignore[misc]  # LeRobot is not typed
    """The pair of Pi0.5; the action expert's norms adapt to the time step."""

    adaptive = True


class PI05GeometryPytorch(PaliGemmaNetwork, PI05Pytorch):  # type: ignore[misc]  # LeRobot is not typed
    """LeRobot's Pi0.5 network with a prefix that can be extended by given tokens."""

    small_class = SmallPI05

    @staticmethod
    def small_layers(config: Any, width: int) -> dict[str, nn.Module]:
        """Return the other layers whose shapes depend on the size, by name."""
        return {
            "action_in_proj": nn.Linear(config.max_action_dim, width),
            "action_out_proj": nn.Linear(width, config.max_action_dim),
            "time_mlp_in": nn.Linear(width, width),
            "time_mlp_out": nn.Linear(width, width),
        }


class PI05GeometryPolicy(PaliGemmaPolicy, PI05Policy):  # type: ignore[misc]  # LeRobot is not typed
    """LeRobot's Pi0.5 policy with geometry."""

    config_class = PI05GeometryConfig
    name = "pi05_geometry"
    network_class = PI05GeometryPytorch
