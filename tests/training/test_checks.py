"""What a training run may do to the pictures: what geometry can follow, and no renamed cameras."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torchvision.transforms.v2 as v2
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.transforms import ImageTransformConfig, ImageTransforms, ImageTransformsConfig
from lerobot.transforms.transforms import _CUSTOM_TRANSFORMS

from geomcache.errors import UserInputError
from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.training import checks
from tests.support.datasets import DEMO
from tests.support.logs import logged_lines
from tests.support.stores import CAMERAS, make_spec

DEPTH = {"is_depth_map": True}


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


def test_a_flip_is_refused_with_an_option_that_keeps_the_others() -> None:
    checks.check_image_transforms(ImageTransformsConfig(enable=True))  # LeRobot's default, with RandomAffine
    flipped = ImageTransformsConfig(enable=True)
    flipped.tfs["flip"] = ImageTransformConfig(type="RandomHorizontalFlip")
    with pytest.raises(UserInputError) as caught:
        checks.check_image_transforms(flipped)
    assert "flip (RandomHorizontalFlip)" in str(caught.value)
    (option,) = [word for word in shlex.split(str(caught.value)) if word.startswith("--dataset.image_transforms.tfs=")]
    tfs = {name: ImageTransformConfig(**tf) for name, tf in json.loads(option.partition("=")[2]).items()}
    assert set(tfs) == {"brightness", "contrast", "saturation", "hue", "sharpness", "affine"}
    advised = ImageTransformsConfig(enable=True, tfs=tfs)
    checks.check_image_transforms(advised)
    ImageTransforms(advised)  # LeRobot takes them


@pytest.mark.parametrize("kind", ["RandomVerticalFlip", "ElasticTransform", "FiveCrop", "Pad", "SomethingNew"])
def test_what_geometry_cannot_follow_or_is_unknown_is_refused(kind: str) -> None:
    tfs = {"mine": ImageTransformConfig(weight=1.0, type=kind)}
    with pytest.raises(UserInputError) as caught:
        checks.check_image_transforms(ImageTransformsConfig(enable=True, tfs=tfs))
    assert "mine" in str(caught.value)
    assert kind in str(caught.value)


@pytest.fixture
def odd_cameras(tmp_path: Path) -> LeRobotDatasetMetadata:
    """Metadata with two colour cameras, a grey and a depth one."""
    root = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    grey = {"dtype": "image", "shape": [48, 64, 1], "names": ["height", "width", "channels"]}
    info["features"] |= {"observation.images.mono": grey, "observation.images.depth": grey | {"info": DEPTH}}
    path.write_text(json.dumps(info))
    return LeRobotDatasetMetadata("demo", root=root)


def test_the_policy_takes_the_colour_cameras_of_a_dataset(odd_cameras: LeRobotDatasetMetadata) -> None:
    config = SimpleNamespace(policy=PI05GeometryConfig(device="cpu"))
    with logged_lines() as lines:
        checks.use_colour_cameras(odd_cameras, config)
    pictures = {"observation.images.image": (3, 256, 256), "observation.images.image2": (3, 256, 256)}
    assert {key: feature.shape for key, feature in config.policy.image_features.items()} == pictures
    assert set(config.policy.input_features) == {*pictures, "observation.state"}
    (line,) = lines
    assert "observation.images.mono, observation.images.depth" in line


def test_a_choice_of_cameras_stays(odd_cameras: LeRobotDatasetMetadata) -> None:
    chosen = {"observation.images.image": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 256, 256))}
    config = SimpleNamespace(policy=PI05GeometryConfig(device="cpu", input_features=dict(chosen)))
    checks.use_colour_cameras(odd_cameras, config)
    assert config.policy.input_features == chosen


def test_a_dataset_of_colour_cameras_leaves_the_choice_to_lerobot() -> None:
    config = SimpleNamespace(policy=PI05GeometryConfig(device="cpu"))
    with logged_lines() as lines:
        checks.use_colour_cameras(LeRobotDatasetMetadata("demo", root=DEMO), config)
    assert not config.policy.input_features
    assert lines == []


def test_cameras_of_other_names_are_told_the_option_that_renames_them() -> None:
    """As LeRobot's own check has it, which is satisfied by the option."""
    meta = LeRobotDatasetMetadata("geomcache/demo", root=DEMO)
    front, wrist = (PolicyFeature(type=FeatureType.VISUAL, shape=(3, 256, 256)) for _ in range(2))
    state = PolicyFeature(type=FeatureType.STATE, shape=(8,))
    policy = SimpleNamespace(
        input_features={
            "observation.state": state,
            "observation.images.front": front,
            "observation.images.wrist": wrist,
        }
    )
    config = SimpleNamespace(rename_map={}, policy=policy)
    with pytest.raises(UserInputError) as caught:
        checks.check_camera_names(meta, config)
    assert "\n" not in str(caught.value)
    (option,) = shlex.split(str(caught.value).partition(", such as ")[2])
    config.rename_map = json.loads(option.partition("=")[2])
    assert config.rename_map == {
        "observation.images.image": "observation.images.front",
        "observation.images.image2": "observation.images.wrist",
    }
    checks.check_camera_names(meta, config)
    config.rename_map = {}
    del policy.input_features["observation.images.front"], policy.input_features["observation.images.wrist"]
    checks.check_camera_names(meta, config)  # a policy of fewer cameras takes those that it has
