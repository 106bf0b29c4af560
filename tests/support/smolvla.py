"""Small SmolVLA policies: LeRobot's own class on a language model of random weights, in a folder as on the Hub."""

from pathlib import Path
from typing import Any

import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from geomcache.policy.processor_pi05_geometry import make_bytes_tokenizer
from geomcache.policy.smolvla.configuration_smolvla_geometry import SmolVLAGeometryConfig
from geomcache.policy.smolvla.modeling_smolvla_geometry import SmolVLAGeometryPolicy
from tests.support.policy import ACTION_DIM, CHUNK, TARGET, features, make_spec, make_statistics

WIDTH = 64  # of the prefix
SIDE = 32  # of the square that pictures are scaled into
IMAGE_TOKENS = 4  # of one camera: patches of 8, four of which become a token
QUICK: dict[str, Any] = {
    "device": "cpu",
    "push_to_hub": False,
    "resize_imgs_with_padding": (SIDE, SIDE),
    "chunk_size": CHUNK,
    "n_action_steps": CHUNK,
    "max_action_dim": ACTION_DIM,
    "num_steps": 2,
    "num_vlm_layers": 2,
}


def make_language_model(folder: Path, *, tied: bool = False) -> Path:
    """Write the configuration and processor of a SmolVLM with 100,000 parameters, and no weights."""
    text = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    make_config: Any = CONFIG_MAPPING["smolvlm"]
    config = make_config(
        text_config=text,
        vision_config=vision,
        scale_factor=2,
        image_token_id=300,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    config.save_pretrained(folder)
    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    }
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=make_bytes_tokenizer().backend_tokenizer, pad_token="<pad>", extra_special_tokens=special
    )
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor()).save_pretrained(folder)
    return folder


def make_smolvla_config(language_model: Path, *, bound: bool = True, **options: Any) -> Any:
    """A quick configuration, with the spec of a cache unless it is not to be bound."""
    chosen = QUICK | features() | {"vlm_model_name": str(language_model), "geom_target_hw": TARGET, "random_init": True}
    config = SmolVLAGeometryConfig(**(chosen | options))
    if bound:
        spec = make_spec()
        config.bind_cache(spec, make_statistics(spec), "f" * 64)
    return config


def make_smolvla(language_model: Path, seed: int = 0, **options: Any) -> Any:
    """A quick `SmolVLAGeometryPolicy` with weights of this seed, in evaluation mode."""
    torch.manual_seed(seed)
    return SmolVLAGeometryPolicy(make_smolvla_config(language_model, **options)).eval()


def make_plain_smolvla(language_model: Path, seed: int = 0, **options: Any) -> Any:
    """LeRobot's own policy with weights of this seed, in evaluation mode."""
    torch.manual_seed(seed)
    return SmolVLAPolicy(
        SmolVLAConfig(**(QUICK | features() | {"vlm_model_name": str(language_model)} | options))
    ).eval()
