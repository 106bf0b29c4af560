"""What a training run may do to the pictures: no moved pixels, no renamed cameras."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torchvision.transforms.v2 as v2
from lerobot.transforms import ImageTransformConfig, ImageTransforms, ImageTransformsConfig
from lerobot.transforms.transforms import _CUSTOM_TRANSFORMS

from geomcache.errors import UserInputError
from geomcache.training import checks
from tests.support.stores import CAMERAS, make_spec


def renamed(rename_map: dict[str, str], *, of_checkpoint: bool) -> tuple[str, ...]:
    features = {"observation.state": None} if of_checkpoint else {}
    config = SimpleNamespace(rename_map=rename_map, policy=SimpleNamespace(input_features=features))
    return checks.renamed_spec(make_spec(), config).camera_keys


def test_the_spec_has_the_names_that_a_checkpoint_knows_the_cameras_by() -> None:
    _, wrist = CAMERAS
    assert renamed({}, of_checkpoint=True) == CAMERAS
    assert renamed({wrist: "observation.images.other"}, of_checkpoint=True) == (CAMERAS[0], "observation.images.other")


def test_renaming_a_cached_camera_for_a_policy_with_the_datasets_names_is_refused() -> None:
    front, wrist = CAMERAS
    others = {"observation.images.top": "observation.images.x", front: front}
    assert renamed(others, of_checkpoint=False) == CAMERAS
    with pytest.raises(UserInputError) as caught:
        renamed({wrist: "observation.images.other"}, of_checkpoint=False)
    assert wrist in str(caught.value)
    assert "observation.images.other" in str(caught.value)


def test_cameras_cannot_share_a_name() -> None:
    with pytest.raises(UserInputError, match=CAMERAS[0]):
        renamed({CAMERAS[1]: CAMERAS[0]}, of_checkpoint=True)


def test_every_transform_known_to_keep_content_in_place_exists_and_is_geometric_by_its_size_alone() -> None:
    geometric = {name for name, value in vars(v2).items() if "_geometry" in getattr(value, "__module__", "")}
    assert {"RandomAffine", "RandomResizedCrop", "RandomHorizontalFlip", "Resize", "RandomPerspective"} <= geometric
    assert checks.PIXELS_STAY & geometric == {"RandomResize", "RandomShortestSize", "Resize", "ScaleJitter"}
    for name in checks.PIXELS_STAY:
        assert name in _CUSTOM_TRANSFORMS or issubclass(getattr(v2, name), v2.Transform)
    assert set(_CUSTOM_TRANSFORMS) <= checks.PIXELS_STAY, "look at the new one: does it move pixels?"


def test_transforms_that_are_off_do_not_matter() -> None:
    checks.check_image_transforms(ImageTransformsConfig())
    off = {"flip": ImageTransformConfig(weight=0.0, type="RandomHorizontalFlip")}
    checks.check_image_transforms(ImageTransformsConfig(enable=True, tfs=off))


def test_lerobots_default_transforms_are_refused_with_an_option_that_keeps_the_others() -> None:
    with pytest.raises(UserInputError) as caught:
        checks.check_image_transforms(ImageTransformsConfig(enable=True))
    assert "RandomAffine" in str(caught.value)
    (option,) = [word for word in shlex.split(str(caught.value)) if word.startswith("--dataset.image_transforms.tfs=")]
    tfs = {name: ImageTransformConfig(**tf) for name, tf in json.loads(option.partition("=")[2]).items()}
    assert set(tfs) == {"brightness", "contrast", "saturation", "hue", "sharpness"}
    advised = ImageTransformsConfig(enable=True, tfs=tfs)
    checks.check_image_transforms(advised)
    ImageTransforms(advised)  # LeRobot takes them


@pytest.mark.parametrize("kind", ["RandomCrop", "RandomRotation", "ElasticTransform", "FiveCrop", "SomethingNew"])
def test_what_moves_pixels_or_is_unknown_is_refused(kind: str) -> None:
    tfs = {"mine": ImageTransformConfig(weight=1.0, type=kind)}
    with pytest.raises(UserInputError) as caught:
        checks.check_image_transforms(ImageTransformsConfig(enable=True, tfs=tfs))
    assert "mine" in str(caught.value)
    assert kind in str(caught.value)
