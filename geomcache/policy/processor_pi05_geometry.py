"""Processors of the policy `pi05_geometry`: LeRobot's for Pi0.5, with a choice of tokenizer.

Geometry needs no step of its own: keys that begin with `observation.` pass through all of them, dtype included. LeRobot
calls the factory below for a policy made from scratch; a checkpoint's processors are loaded from its files instead.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from geomcache.errors import UserInputError
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.paligemma_options import PaliGemmaOptions
from geomcache.policy.small_paligemma import SMALL_VOCABULARY

PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"
BYTES_TOKENIZER = "bytes"


def make_bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that needs no file: padding is 0, a byte of UTF-8 text is 1 to 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0} | {symbol: number for number, symbol in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")  # type: ignore[no-untyped-call]  # noqa: S106


@ProcessorStepRegistry.register(name="geomcache_bytes_tokenizer")
@dataclass
class BytesTokenizerProcessorStep(TokenizerProcessorStep):  # type: ignore[misc]  # LeRobot is not typed
    """LeRobot's tokenizer step with the built-in tokenizer: saved processors name no folder."""

    def __post_init__(self) -> None:
        self.tokenizer = make_bytes_tokenizer()
        super().__post_init__()

    def save_artifacts(self, save_directory: Path) -> dict[str, str]:  # noqa: ARG002 - LeRobot's name
        """Save no tokenizer next to the processors, as LeRobot after 0.6.1 does for others: it is made anew."""
        return {}


def make_pi05_geometry_pre_post_processors(
    config: PI05GeometryConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Make the processors of a policy made from scratch: the steps of Pi0.5, in its order.

    Args:
        config: the policy's configuration.
        dataset_stats: the dataset's statistics, for (un)normalising state and action.

    Raises:
        UserInputError: the tokenizer has more tokens than a small model embeds.
    """
    steps = make_default_policy_processor_steps(config, dataset_stats)
    relative = RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    pipelines: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline] = make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            relative,
            steps.normalize,
            Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim),
            tokenizer_step(config),
            steps.to_device,
        ],
        output_steps=[
            steps.unnormalize,
            AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative),
            steps.to_cpu,
        ],
    )
    return pipelines


def tokenizer_step(config: PaliGemmaOptions) -> TokenizerProcessorStep:
    """Make the tokenizer's step: the one that the options name, PaliGemma's or, for a small model, the built-in one.

    Raises:
        UserInputError: the tokenizer has more tokens than a small model embeds.
    """
    small = config.model_size == "small"
    name = config.tokenizer_name or (BYTES_TOKENIZER if small else PALIGEMMA_TOKENIZER)
    options = {"max_length": config.tokenizer_max_length, "padding_side": "right", "padding": "max_length"}
    if name == BYTES_TOKENIZER:
        return BytesTokenizerProcessorStep(**options)
    step = TokenizerProcessorStep(tokenizer_name=name, **options)
    if small and len(step.input_tokenizer) > SMALL_VOCABULARY:
        raise UserInputError(
            f"tokenizer_name: expected at most {SMALL_VOCABULARY} tokens for model_size=small, {name} has"
            f" {len(step.input_tokenizer)}: leave the option out, the built-in tokenizer fits"
        )
    return step
