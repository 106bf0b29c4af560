"""What is compared between a cache and a run, field by field; stores stand in as plain values."""

import dataclasses
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torchvision.transforms.v2 as v2
from lerobot.transforms import ImageTransformConfig, ImageTransforms, ImageTransformsConfig
from lerobot.transforms.transforms import _CUSTOM_TRANSFORMS

from geomcache.cache import compatibility
from geomcache.errors import CacheIncompleteError, CacheMismatchError, UserInputError
from geomcache.geometry import Camera, DatasetSpec, GeometrySpec
from geomcache.ranges import parse_episodes
from geomcache.training import checks

FRONT = Camera(key="observation.images.image", height=256, width=320)
WRIST = Camera(key="observation.images.image2", height=128, width=128)

SPEC = GeometrySpec(
    model_id="DA3-LARGE",
    model_revision=None,
    model_name="da3-large",
    weights_sha256="ab" * 32,
    da3_version="0.1.1",
    views="joint",
    cameras=(FRONT, WRIST),
    process_res=504,
    grid="14x14",
    grid_hw=(14, 14),
    outputs=("ray", "ray_conf"),
    compute_dtype="bf16",
)

DATASET = DatasetSpec(
    repo_id="me/pens",
    revision=None,
    frames=1000,
    episodes=10,
    fps=10,
    episodes_sha256="01" * 32,
    images_sha256="23" * 32,
    decoder="pyav",
)


def store(
    *, sealed: bool = True, there: tuple[tuple[int, int], ...] = ((0, 10),), dataset: DatasetSpec = DATASET
) -> SimpleNamespace:
    return SimpleNamespace(
        path=Path("pens.zarr"), spec=SPEC, dataset=dataset, sealed=sealed, codec="raw", episodes=lambda: there
    )


# ---- dataset ---------------------------------------------------------------------------------------------------------


def test_the_same_frames_under_another_name_and_decoder_agree() -> None:
    compatibility.compare_datasets(DATASET, dataclasses.replace(DATASET, repo_id="you/copy", decoder="torchcodec"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", 999),
        ("episodes", 11),
        ("fps", 20),
        ("episodes_sha256", "45" * 32),
        ("images_sha256", "67" * 32),
    ],
)
def test_other_frames_are_named_with_both_values(field: str, value: object) -> None:
    with pytest.raises(CacheMismatchError) as caught:
        compatibility.compare_datasets(DATASET, dataclasses.replace(DATASET, **{field: value}))
    error = caught.value
    assert (error.field, error.cached, error.wanted) == (f"dataset.{field}", getattr(DATASET, field), value)
    message = str(error)
    assert f"dataset.{field}" in message
    assert str(value) in message
    assert str(getattr(DATASET, field)) in message
    assert "\n" not in message


def test_every_field_of_a_dataset_is_compared_or_known_to_be_a_label() -> None:
    fields = {field.name for field in dataclasses.fields(DatasetSpec)}
    assert fields == {*compatibility.COMPARED_DATASET_FIELDS, "revision", "repo_id", "decoder"}


def test_revisions_are_compared_where_both_are_known() -> None:
    first, second = (dataclasses.replace(DATASET, revision=revision) for revision in ("aaa", "bbb"))
    compatibility.compare_datasets(DATASET, first)
    compatibility.compare_datasets(first, DATASET)
    compatibility.compare_datasets(first, first)
    with pytest.raises(CacheMismatchError, match=r"dataset\.revision: .* aaa, .* bbb"):
        compatibility.compare_datasets(first, second)


# ---- cameras ---------------------------------------------------------------------------------------------------------


def test_a_dataset_may_have_more_cameras_in_any_order() -> None:
    other = Camera(key="observation.images.top", height=8, width=8)
    compatibility.compare_cameras(SPEC, {camera.key: camera for camera in (other, WRIST, FRONT)})


def test_a_missing_camera_is_named_beside_those_that_are_there() -> None:
    with pytest.raises(CacheMismatchError, match=r"observation\.images\.image2, .* has observation\.images\.image:"):
        compatibility.compare_cameras(SPEC, {FRONT.key: FRONT})


def test_another_picture_size_is_named_with_both() -> None:
    wrong = dataclasses.replace(WRIST, height=120)
    with pytest.raises(CacheMismatchError, match=r"image2: the cache is of 128x128 pictures, .* has 120x128") as caught:
        compatibility.compare_cameras(SPEC, {FRONT.key: FRONT, WRIST.key: wrong})
    assert caught.value.field == f"spec.cameras.{WRIST.key}"


def test_an_environment_of_another_size_is_told_the_options() -> None:
    compatibility.compare_environment(
        SPEC, {FRONT.key: (256, 320), WRIST.key: (128, 128), "observation.images.x": (1, 1)}
    )
    compatibility.compare_environment(SPEC, {})
    with pytest.raises(CacheMismatchError, match=r"360x360.*observation_height=256 --env\.observation_width=320"):
        compatibility.compare_environment(SPEC, {FRONT.key: (360, 360)})


def test_renaming_a_cached_camera_is_refused() -> None:
    checks.check_rename_map(SPEC, {})
    checks.check_rename_map(SPEC, {"observation.images.top": "observation.images.x", FRONT.key: FRONT.key})
    with pytest.raises(UserInputError, match=r"observation\.images\.image2 -> observation\.images\.wrist"):
        checks.check_rename_map(SPEC, {WRIST.key: "observation.images.wrist"})


# ---- episodes --------------------------------------------------------------------------------------------------------


def test_a_sealed_cache_with_the_asked_episodes_is_enough() -> None:
    compatibility.require_episodes(store(), None)
    compatibility.require_episodes(store(there=((0, 3), (5, 6))), [5, 0, 2])


@pytest.mark.parametrize("episodes", [[10], [-1, 3], []])
def test_episodes_that_the_dataset_has_not_are_refused(episodes: list[int]) -> None:
    with pytest.raises(UserInputError, match="expected some of 0 to 9"):
        compatibility.require_episodes(store(), episodes)


def test_missing_episodes_are_named_with_the_command_that_adds_them() -> None:
    with pytest.raises(CacheIncompleteError) as caught:
        compatibility.require_episodes(store(there=((0, 3), (5, 6))), [0, 3, 4, 5, 9], root="data/pens")
    message = str(caught.value)
    assert "lacks 3:5, 9:" in message
    words = shlex.split(message.split("`")[1])
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["geomcache", "extract"]
    assert parse_episodes(options["--episodes"], 10) == [(3, 5), (9, 10)]
    assert options["--output"] == "pens.zarr"
    assert options["--root"] == "data/pens"
    assert options["--cameras"] == "observation.images.image,observation.images.image2"
    assert (options["--model"], options["--dataset"], options["--dtype"]) == ("DA3-LARGE", "me/pens", "bf16")
    assert "--revision" not in options


def test_an_unfinished_cache_is_refused_even_with_all_episodes() -> None:
    with pytest.raises(
        CacheIncompleteError, match=r"interrupted one: finish it with `geomcache extract .*--dtype bf16`"
    ):
        compatibility.require_episodes(store(sealed=False), None)
    with pytest.raises(CacheIncompleteError, match=r"interrupted one that lacks episodes 2:10: finish it"):
        compatibility.require_episodes(store(sealed=False, there=((0, 2),)), None)


def test_many_gaps_make_a_short_line_and_a_command_that_covers_them() -> None:
    dataset = dataclasses.replace(DATASET, episodes=1000)
    there = tuple((n, n + 1) for n in range(0, 1000, 2))
    with pytest.raises(CacheIncompleteError) as caught:
        compatibility.require_episodes(store(dataset=dataset, there=there), None)
    message = str(caught.value)
    assert "lacks 1, 3, 5," in message
    assert "--episodes 1:1000`" in message
    assert len(message) < 600


# ---- image transforms ------------------------------------------------------------------------------------------------


def test_every_transform_known_to_keep_pixels_exists_and_is_none_of_torchvisions_geometric_ones() -> None:
    geometric = {name for name, value in vars(v2).items() if "_geometry" in getattr(value, "__module__", "")}
    assert {"RandomAffine", "RandomResizedCrop", "RandomHorizontalFlip", "Resize", "RandomPerspective"} <= geometric
    assert not checks.PIXELS_STAY & geometric
    for name in checks.PIXELS_STAY:
        assert name in _CUSTOM_TRANSFORMS or issubclass(getattr(v2, name), v2.Transform)
    assert set(_CUSTOM_TRANSFORMS) <= checks.PIXELS_STAY, "look at the new one: does it move pixels?"


def test_transforms_that_are_off_do_not_matter() -> None:
    checks.check_image_transforms(ImageTransformsConfig())
    off = {"flip": ImageTransformConfig(weight=0.0, type="RandomHorizontalFlip")}
    checks.check_image_transforms(ImageTransformsConfig(enable=True, tfs=off))


def test_lerobots_default_transforms_are_refused_with_an_option_that_keeps_the_others() -> None:
    with pytest.raises(UserInputError, match=r"affine \(RandomAffine\)") as caught:
        checks.check_image_transforms(ImageTransformsConfig(enable=True))
    (option,) = [word for word in shlex.split(str(caught.value)) if word.startswith("--dataset.image_transforms.tfs=")]
    tfs = {name: ImageTransformConfig(**tf) for name, tf in json.loads(option.partition("=")[2]).items()}
    assert set(tfs) == {"brightness", "contrast", "saturation", "hue", "sharpness"}
    advised = ImageTransformsConfig(enable=True, tfs=tfs)
    checks.check_image_transforms(advised)
    ImageTransforms(advised)  # LeRobot takes them


@pytest.mark.parametrize("kind", ["RandomCrop", "RandomRotation", "ElasticTransform", "FiveCrop", "SomethingNew"])
def test_what_moves_pixels_or_is_unknown_is_refused(kind: str) -> None:
    tfs = {"mine": ImageTransformConfig(weight=1.0, type=kind)}
    with pytest.raises(UserInputError, match=rf"mine \({kind}\)"):
        checks.check_image_transforms(ImageTransformsConfig(enable=True, tfs=tfs))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_resuming_needs_the_cache_of_the_checkpoint() -> None:
    compatibility.compare_fingerprints("f00", "f00")
    with pytest.raises(CacheMismatchError, match="trained from abc, this cache is f00"):
        compatibility.compare_fingerprints("abc", "f00")
    with pytest.raises(CacheMismatchError, match="trained from no cache"):
        compatibility.compare_fingerprints(None, "f00")
