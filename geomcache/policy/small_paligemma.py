"""The small variant of Pi0 and Pi0.5: LeRobot's classes with 2.7 million parameters instead of 3.6 billion.

LeRobot's networks know only the published sizes of Gemma and SigLIP. The parts whose shapes depend on a size are made
here, with the same names, so that everything else, training and sampling included, is LeRobot's own.
"""

from typing import Any, ClassVar

from lerobot.policies.pi05.modeling_pi05 import GemmaConfig
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma, PiGemmaForCausalLM
from torch import nn
from transformers.models.auto import CONFIG_MAPPING

from geomcache.geometry import PATCH_SIZE
from geomcache.policy.options import LeRobotClass

# LeRobot's attention is written for 8 heads; language model and action expert share depth, heads and head size.
SMALL_GEMMA = GemmaConfig(width=128, depth=4, mlp_dim=256, num_heads=8, num_kv_heads=1, head_dim=32)
SMALL_VOCABULARY = 512


class SmallPaliGemmaWithExpert(LeRobotClass):  # type: ignore[misc]
    """What LeRobot's pair of language model and action expert inherits first, for the small size.

    All other methods are LeRobot's.
    """

    adaptive: ClassVar[bool] = False
    """Whether the action expert's norms adapt to the time step."""

    def __init__(self, config: Any) -> None:  # a configuration of LeRobot's
        nn.Module.__init__(self)  # LeRobot's constructor would build the published sizes
        self.freeze_vision_encoder = config.freeze_vision_encoder
        self.train_expert_only = config.train_expert_only
        vision = _configuration(
            "siglip_vision_model",
            hidden_size=SMALL_GEMMA.width,
            intermediate_size=SMALL_GEMMA.mlp_dim,
            num_hidden_layers=SMALL_GEMMA.depth,
            num_attention_heads=4,
            patch_size=PATCH_SIZE,
            image_size=config.image_resolution[0],
            vision_use_head=False,
        )
        self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(
            config=_configuration(
                "paligemma",
                vision_config=vision,
                text_config=_gemma(adaptive=False),
                image_token_index=SMALL_VOCABULARY,
                vocab_size=SMALL_VOCABULARY,
                projection_dim=SMALL_GEMMA.width,
                hidden_size=SMALL_GEMMA.width,
            )
        )
        self.gemma_expert = PiGemmaForCausalLM(config=_gemma(adaptive=self.adaptive))
        self.gemma_expert.model.embed_tokens = None  # the expert is given embeddings
        self.to_bfloat16_for_selected_params(config.dtype)
        self._set_requires_grad()


def _gemma(*, adaptive: bool) -> Any:
    """Return Transformers' configuration of either model."""
    return _configuration(
        "gemma",
        hidden_size=SMALL_GEMMA.width,
        intermediate_size=SMALL_GEMMA.mlp_dim,
        num_hidden_layers=SMALL_GEMMA.depth,
        num_attention_heads=SMALL_GEMMA.num_heads,
        num_key_value_heads=SMALL_GEMMA.num_kv_heads,
        head_dim=SMALL_GEMMA.head_dim,
        vocab_size=SMALL_VOCABULARY,
        hidden_activation="gelu_pytorch_tanh",
        dtype="float32",
        use_adarms=adaptive,
        adarms_cond_dim=SMALL_GEMMA.width if adaptive else None,
    )


def _configuration(kind: str, **values: Any) -> Any:
    return CONFIG_MAPPING[kind](**values)
