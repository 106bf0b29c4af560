"""Processors of the policy `pi0_geometry`: LeRobot's for Pi0, with a choice of tokenizer."""

from typing import Any

from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from geomcache.policy.pi0.configuration_pi0_geometry import PI0GeometryConfig
from geomcache.policy.processor_pi05_geometry import tokenizer_step


def make_pi0_geometry_pre_post_processors(
    config: PI0GeometryConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Make the processors of a policy made from scratch: the steps of Pi0, in its order.

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
            Pi0NewLineProcessor(),
            tokenizer_step(config),
            steps.to_device,
            relative,
            steps.normalize,
        ],
        output_steps=[
            steps.unnormalize,
            AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative),
            steps.to_cpu,
        ],
    )
    return pipelines
