"""What a training run may not do to the pictures: move their pixels, or rename their cameras."""

import json
from collections.abc import Mapping
from typing import Any

from geomcache.errors import UserInputError
from geomcache.geometry import GeometrySpec

# Transforms that leave every pixel where it is: colours, noise, blur, holes. A list of what is known to be harmless, so
# that a transform which a later version brings is refused until somebody has looked at it.
PIXELS_STAY = frozenset(
    {
        # torchvision.transforms.v2
        *(
            "ColorJitter",
            "GaussianBlur",
            "GaussianNoise",
            "Grayscale",
            "Identity",
            "JPEG",
            "RGB",
            "RandomAdjustSharpness",
        ),
        *("RandomAutocontrast", "RandomChannelPermutation", "RandomEqualize", "RandomErasing", "RandomGrayscale"),
        *("RandomInvert", "RandomPhotometricDistort", "RandomPosterize", "RandomSolarize"),
        # LeRobot's own
        *("CoarseDropout", "GammaCorrection", "GaussianPatchBrightness", "JPEGCompression", "MotionBlur"),
        *("PlanckianJitter", "RandomShadow", "SharpnessJitter"),
    }
)


def check_image_transforms(config: Any) -> None:
    """Refuse augmentation that moves pixels: the cached geometry is that of the pictures as they are stored.

    Args:
        config: LeRobot's `ImageTransformsConfig`.

    Raises:
        UserInputError: a transform that is switched on is not known to leave pixels in place.
    """
    if not config.enable:
        return
    active = {name: tf for name, tf in config.tfs.items() if tf.weight > 0.0}
    moving = {name: tf.type for name, tf in active.items() if tf.type not in PIXELS_STAY}
    if moving:
        others = {
            name: {"weight": tf.weight, "type": tf.type, "kwargs": tf.kwargs}
            for name, tf in active.items()
            if name not in moving
        }
        named = ", ".join(f"{name} ({kind})" for name, kind in moving.items())
        option = f"--dataset.image_transforms.tfs='{json.dumps(others)}'"
        raise UserInputError(
            f"dataset.image_transforms: expected transforms that leave pixels in place, got {named}: the cached"
            f" geometry would not fit the picture: leave it out with {option}"
        )


def check_rename_map(spec: GeometrySpec, rename_map: Mapping[str, str]) -> None:
    """Refuse to rename the cache's cameras: at inference the encoder looks for them under the cache's names.

    Raises:
        UserInputError: a camera of the cache is renamed.
    """
    for key in spec.camera_keys:
        if rename_map.get(key, key) != key:
            raise UserInputError(
                f"rename_map: expected the cache's cameras to keep their names, got {key} -> {rename_map[key]}: the"
                " online encoder looks for the cache's names: leave it out; pi05_geometry takes any camera names"
            )
