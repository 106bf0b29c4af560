"""The policy `smolvla_geometry`: LeRobot's SmolVLA with geometry tokens in its prefix, before the state.

    prefix   image tokens | text tokens, padded | geometry tokens | state       suffix   noisy actions

SmolVLA's state opens a block of its own, which images and text do not see. Geometry comes before it: after it, geometry
would be in that block too, and images and text could not see it with ``geom_attention=full``. Positions of images and
text stay as the pretrained model knows them; state and actions move by the number of geometry tokens.
"""

from typing import Any

from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from torch import Tensor

from geomcache.policy.geometry_policy import TOKENS_KEY, GeometryPolicy
from geomcache.policy.prefix import ExtendedPrefix, PrefixInputs, with_tokens
from geomcache.policy.smolvla.configuration_smolvla_geometry import SmolVLAGeometryConfig

STATE_ARGUMENT = 3  # of `embed_prefix`, after the pictures: their masks, the text, its masks, the state


class SmolVLAGeometryNetwork(ExtendedPrefix, VLAFlowMatching):  # type: ignore[misc]  # LeRobot is not typed
    """LeRobot's SmolVLA network with a prefix that can be extended by given tokens."""

    text_argument = "lang_tokens"

    def __init__(self, config: SmolVLAGeometryConfig, rtc_processor: RTCProcessor | None = None) -> None:
        super().__init__(config, rtc_processor)
        self.add_adapter(config, self.vlm_with_expert.config.text_config.hidden_size)

    def tokens_after_geometry(self, *args: Any, **kwargs: Any) -> int:
        """Return the number of the state's tokens, which stands at the end of LeRobot's prefix."""
        state: Tensor = args[STATE_ARGUMENT] if len(args) > STATE_ARGUMENT else kwargs["state"]
        return state.shape[1] if state.ndim == 3 else 1


class SmolVLAGeometryPolicy(GeometryPolicy, SmolVLAPolicy):  # type: ignore[misc]  # LeRobot is not typed
    """LeRobot's SmolVLA policy with geometry tokens."""

    config_class = SmolVLAGeometryConfig
    name = "smolvla_geometry"
    network_class = SmolVLAGeometryNetwork
    chunk_method = "_get_action_chunk"

    def _get_action_chunk(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return LeRobot's chunk with geometry; `predict_action_chunk` and `select_action` both come here.

        Raises:
            GeometryError: geometry or pictures do not fit what the policy was trained with.
            ModelError: the DA3 that the policy was trained with is not available.
        """
        chunk: Tensor = super()._get_action_chunk(self.with_tokens_to_act(batch), *args, **kwargs)
        return chunk

    def prepare_images(
        self, batch: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[list[Tensor] | PrefixInputs, list[Tensor]]:
        """Prepare the pictures as LeRobot does, together with the batch's tokens."""
        images, img_masks = super().prepare_images(batch, *args, **kwargs)
        return with_tokens(images, batch.get(TOKENS_KEY)), img_masks

    def completed_weights(self, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a file by the names of `state_dict`: it has weights that are tied under one name."""
        completed, of_memory = dict(loaded), dict[int, Tensor]()
        own = self.state_dict()
        for name, value in own.items():
            if name in loaded:
                of_memory[value.data_ptr()] = loaded[name]
        for name, value in own.items():
            if name not in loaded and value.data_ptr() in of_memory:
                completed[name] = of_memory[value.data_ptr()]
        return completed
