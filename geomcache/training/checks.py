"""Check a training run before its first step: its options, its pictures, its dataset."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from geomcache.errors import DatasetError, UserInputError
from geomcache.frames.source import describe_cameras, describe_statistics_command
from geomcache.geometry import GeometrySpec
from geomcache.training.moved_pictures import PIXELS_MOVE, PIXELS_SCALE

logger = logging.getLogger(__name__)

# Transforms that leave every part of the picture at its share of width and height, where the cells of the geometry's
# grid are: colours, noise, blur, holes, and changes of the whole picture's size. A list of what is known to be
# harmless, so that a transform of a later version is refused until somebody has checked it.
PIXELS_STAY = frozenset(
    {
        # torchvision.transforms.v2
        *("ColorJitter", "GaussianBlur", "GaussianNoise", "Grayscale", "Identity", "JPEG", "RGB"),
        *("RandomAdjustSharpness", "RandomAutocontrast", "RandomChannelPermutation", "RandomEqualize"),
        *("RandomErasing", "RandomGrayscale", "RandomInvert", "RandomPhotometricDistort", "RandomPosterize"),
        *("RandomSolarize", "ToDtype", "ToImage", "ToPureTensor"),
        *PIXELS_SCALE,
        # LeRobot's own
        *("CoarseDropout", "GammaCorrection", "GaussianPatchBrightness", "JPEGCompression", "MotionBlur"),
        *("PlanckianJitter", "RandomShadow", "SharpnessJitter"),
    }
)

# Statistics that LeRobot's normalisation of each mode reads.
NEEDED_STATISTICS = {
    "IDENTITY": (),
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
STATE_KEY, ACTION_KEY = "observation.state", "action"  # LeRobot's names of Pi0.5's input and output


def check_options(config: Any) -> None:
    """Refuse options of a `TrainPipelineConfig` that no run can have, which LeRobot finds late or never.

    Raises:
        UserInputError: a number is out of range, streaming is asked for with a choice of episodes, or parameters or
            checkpoints are to be split.
    """
    for name, least in (("steps", 1), ("batch_size", 1), ("num_workers", 0)):
        value = getattr(config, name)
        if value < least:
            raise UserInputError(f"{name}: expected at least {least}, got {value}")
    if config.dataset.streaming and config.dataset.episodes is not None:
        raise UserInputError(
            f"dataset.episodes: expected none with dataset.streaming=true, got {config.dataset.episodes!r:.80}:"
            " LeRobot's streaming reads every episode, whichever are named: leave one of the two options out"
        )
    checkpoint_format = getattr(config, "checkpoint_format", None)  # of LeRobot after 0.6.1
    if checkpoint_format is not None and checkpoint_format.value != "safetensors":
        raise UserInputError(
            f"checkpoint_format: expected 'safetensors', got {checkpoint_format.value!r}: geomcache loads every weight"
            " from model.safetensors and refuses to start from others: leave it out"
        )
    parallelism = getattr(config, "parallelism", None)  # of LeRobot after 0.6.1
    if parallelism is not None and parallelism.is_sharded:
        raise UserInputError(
            f"parallelism: expected dp_shard=1 without context_parallel, got dp_shard={parallelism.dp_shard}: LeRobot"
            " names no modules of this policy by which FSDP2 could split it: leave it out, and use several GPUs with"
            " --parallelism.dp_replicate"
        )


def check_image_transforms(config: Any) -> None:
    """Refuse an `ImageTransformsConfig` that moves content in a way that the cached geometry cannot follow.

    Raises:
        UserInputError: a transform that is switched on is neither known to leave content in place nor one that the maps
            follow.
    """
    if not config.enable:
        return
    active = {name: tf for name, tf in config.tfs.items() if tf.weight > 0.0}
    moving = {name: tf.type for name, tf in active.items() if tf.type not in PIXELS_STAY | PIXELS_MOVE}
    if moving:
        others = {
            name: {"weight": tf.weight, "type": tf.type, "kwargs": tf.kwargs}
            for name, tf in active.items()
            if name not in moving
        }
        named = ", ".join(f"{name} ({kind})" for name, kind in moving.items())
        option = f"--dataset.image_transforms.tfs='{json.dumps(others)}'"
        raise UserInputError(
            "dataset.image_transforms: expected transforms that leave content in place or that geometry follows"
            f" ({', '.join(sorted(PIXELS_MOVE))}), got {named}: the cached geometry would not fit the picture, and"
            f" after a flip the actions would not either: leave it out with {option}"
        )


def renamed_spec(spec: GeometrySpec, config: Any) -> GeometrySpec:
    """Return a cache's spec with its cameras under the names that the policy sees.

    LeRobot's preprocessor renames the pictures (`rename_map`), in training and in evaluation: the online encoder finds
    them under the new names.

    Raises:
        UserInputError: a camera is renamed for a policy that takes its cameras from the dataset, or two get one name.
    """
    rename_map: Mapping[str, str] = config.rename_map
    renamed = {key: rename_map[key] for key in spec.camera_keys if rename_map.get(key, key) != key}
    if renamed and not config.policy.input_features:
        raise UserInputError(
            "rename_map: expected none for a policy that takes its cameras from the dataset, got"
            f" {json.dumps(renamed)}: leave it out, any camera names do; to keep a geometry checkpoint's names, give it"
            " with --policy.path=CHECKPOINT instead of --policy.pretrained_path"
        )
    cameras = tuple(dataclasses.replace(camera, key=renamed.get(camera.key, camera.key)) for camera in spec.cameras)
    return dataclasses.replace(spec, cameras=cameras)


def use_colour_cameras(meta: Any, config: Any) -> None:
    """Leave grey and depth cameras out of what the policy takes from the dataset: Pi0.5 takes colour pictures.

    A choice of `input_features`, in an option or a checkpoint, stays as it is.

    Args:
        meta: LeRobot's `LeRobotDatasetMetadata`.
        config: LeRobot's `TrainPipelineConfig`; its policy's `input_features` are set where a camera is left out.

    Raises:
        DatasetError: a camera's shape is malformed.
    """
    from lerobot.configs import FeatureType
    from lerobot.utils.feature_utils import dataset_to_policy_features

    colour = describe_cameras(meta)
    others = [key for key in meta.camera_keys if key not in colour]
    if not others or config.policy.input_features:
        return
    config.policy.input_features = {
        key: feature
        for key, feature in dataset_to_policy_features(meta.features).items()
        if feature.type is not FeatureType.ACTION and key not in others
    }
    logger.info("dataset %s: left out, as Pi0.5 takes colour images: %s", meta.repo_id, ", ".join(others))


def check_camera_names(meta: Any, config: Any) -> None:
    """Require that the policy's cameras are the dataset's; LeRobot does when the policy is built, in a traceback.

    Args:
        meta: LeRobot's `LeRobotDatasetMetadata`.
        config: LeRobot's `TrainPipelineConfig`.

    Raises:
        UserInputError: each has a camera that the other lacks; the message has the option that renames them.
    """
    from lerobot.configs import FeatureType
    from lerobot.policies.utils import validate_visual_features_consistency
    from lerobot.utils.feature_utils import dataset_to_policy_features

    if config.rename_map or not config.policy.input_features:
        return
    features = dataset_to_policy_features(meta.features)
    try:
        validate_visual_features_consistency(config.policy, features)
    except ValueError as error:
        expected, found = (
            [key for key, feature in of.items() if feature.type is FeatureType.VISUAL]
            for of in (config.policy.input_features, features)
        )
        names = json.dumps(dict(zip(found, expected, strict=False)))
        raise UserInputError(
            f"cameras: expected {', '.join(expected)}, which the checkpoint was trained with, found"
            f" {', '.join(found)} in dataset {meta.repo_id}: give them the checkpoint's names, such as"
            f" --rename_map='{names}'"
        ) from error


def check_features(meta: Any, config: Any) -> None:
    """Check that a dataset has state, actions, and the statistics that a `TrainPipelineConfig` normalises them by.

    Raises:
        DatasetError: a feature or a statistic is missing.
    """
    names = {config.rename_map.get(key, key): key for key in meta.features}  # the policy's name -> the dataset's
    for key, meaning in ((STATE_KEY, "the robot's state"), (ACTION_KEY, "the actions")):
        if key not in names:
            raise DatasetError(
                f"dataset {meta.repo_id}: expected {key}, {meaning}, found {', '.join(meta.features)}: give the feature"
                " this name when you record or convert the dataset"
            )
    if config.resume:
        return  # a resumed run normalises by its checkpoint's statistics
    modes = {kind: str(getattr(mode, "value", mode)) for kind, mode in config.policy.normalization_mapping.items()}
    for kind, key in (("STATE", STATE_KEY), ("ACTION", ACTION_KEY)):
        mode = modes.get(kind, "IDENTITY")
        statistics = (meta.stats or {}).get(names[key], {})
        missing_names = [name for name in NEEDED_STATISTICS.get(mode, ()) if name not in statistics]
        if missing_names:
            raise DatasetError(_statistics_message(meta, config, names[key], mode, missing_names, list(statistics)))


def _statistics_message(
    meta: Any, config: Any, key: str, mode: str, missing_names: list[str], present_names: list[str]
) -> str:
    root = config.dataset.root
    advice = describe_statistics_command(meta.repo_id, root)
    if root is None:
        advice += ", and train with --dataset.root=DIR"
    if present_names:
        alternative = {"ACTION": "MEAN_STD", "STATE": "MEAN_STD", "VISUAL": "IDENTITY"}
        advice += f", or train with --policy.normalization_mapping='{json.dumps(alternative)}'"
    return (
        f"dataset {meta.repo_id}: expected the statistics {', '.join(missing_names)} of {key}, which {mode} normalises"
        f" by, found {', '.join(present_names) or 'none'}: compute them with LeRobot's {advice}"
    )


def check_streaming(meta: Any, tolerance_s: float) -> None:
    """Refuse to stream videos where LeRobot would show the pictures of other frames.

    LeRobot's streaming dataset takes ``index / fps`` for the time in a video file. That is right only while a frame's
    file starts with the dataset's first frame: in the second file, pictures are those of other frames. The two times
    may differ by `tolerance_s` seconds.

    Raises:
        DatasetError: the times differ; the message names camera and episode.
    """
    streamed_s = np.asarray(meta.episodes["dataset_from_index"], dtype=np.float64) / meta.fps
    for key in meta.video_keys:
        stored_s = np.asarray(meta.episodes[f"videos/{key}/from_timestamp"], dtype=np.float64)
        differing = np.flatnonzero(np.abs(stored_s - streamed_s) > tolerance_s)
        if len(differing):
            first = int(differing[0])
            raise DatasetError(
                f"dataset.streaming: expected episode {first} of {key} at {streamed_s[first]:.3f} s of its video file,"
                f" where LeRobot's streaming looks for it, found it at {stored_s[first]:.3f} s ({len(differing)} of"
                f" {len(stored_s)} episodes differ): it would show pictures of other frames: train with"
                " --dataset.streaming=false"
            )
