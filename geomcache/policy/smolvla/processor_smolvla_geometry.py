"""Processors of the policy `smolvla_geometry`: LeRobot's for SmolVLA.

The tokenizer is that of `vlm_model_name`.
"""

from typing import Any

from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline

from geomcache.policy.smolvla.configuration_smolvla_geometry import SmolVLAGeometryConfig


def make_smolvla_geometry_pre_post_processors(
    config: SmolVLAGeometryConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Make the processors of a policy made from scratch: LeRobot finds them by this name.

    Args:
        config: the policy's configuration.
        dataset_stats: the dataset's statistics, for (un)normalising state and action.
    """
    pipelines: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline] = make_smolvla_pre_post_processors(
        config, dataset_stats
    )
    return pipelines
