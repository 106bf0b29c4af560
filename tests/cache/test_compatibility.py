"""What is compared between a cache and a run, field by field; plain values stand in for stores."""

import dataclasses
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from geomcache.cache import compatibility
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheIncompleteError, CacheMismatchError, UserInputError
from geomcache.geometry import Camera, DatasetSpec, GeometrySpec
from geomcache.ranges import parse_episodes

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
    *, sealed: bool = True, episodes: tuple[tuple[int, int], ...] = ((0, 10),), dataset: DatasetSpec = DATASET
) -> GeometryStore:
    """What is compared of a store, without one."""
    stand_in = SimpleNamespace(
        path=Path("pens.zarr"), spec=SPEC, dataset=dataset, sealed=sealed, codec="raw", episodes=lambda: episodes
    )
    return cast("GeometryStore", stand_in)


def assert_names(error: CacheMismatchError, field: str, cached: object, wanted: object) -> None:
    """The error has the field and both values, and so has its message."""
    assert (error.field, error.cached, error.wanted) == (field, cached, wanted)
    assert "\n" not in str(error)
    for value in (field, cached, wanted):
        assert str(value) in str(error)


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
def test_other_frames_are_named_with_both_values(field: str, value: Any) -> None:
    with pytest.raises(CacheMismatchError) as caught:
        compatibility.compare_datasets(DATASET, dataclasses.replace(DATASET, **{field: value}))
    assert_names(caught.value, f"dataset.{field}", getattr(DATASET, field), value)


def test_every_field_of_a_dataset_is_compared_or_known_to_be_a_label() -> None:
    fields = {field.name for field in dataclasses.fields(DatasetSpec)}
    by_episode = {"identities_sha256"}  # which geomcache.frames.compare compares
    assert fields == {*compatibility.COMPARED_DATASET_FIELDS, "revision", "repo_id", "decoder"} | by_episode


def test_revisions_are_compared_where_both_are_known() -> None:
    first, second = (dataclasses.replace(DATASET, revision=revision) for revision in ("aaa", "bbb"))
    compatibility.compare_datasets(DATASET, first)
    compatibility.compare_datasets(first, DATASET)
    compatibility.compare_datasets(first, first)
    with pytest.raises(CacheMismatchError) as caught:
        compatibility.compare_datasets(first, second)
    assert_names(caught.value, "dataset.revision", "aaa", "bbb")


# ---- cameras ---------------------------------------------------------------------------------------------------------


def test_a_dataset_may_have_more_cameras_in_any_order() -> None:
    other = Camera(key="observation.images.top", height=8, width=8)
    compatibility.compare_cameras(SPEC, {camera.key: camera for camera in (other, WRIST, FRONT)})


def test_a_missing_camera_is_named_together_with_the_datasets_cameras() -> None:
    with pytest.raises(CacheMismatchError) as caught:
        compatibility.compare_cameras(SPEC, {FRONT.key: FRONT})
    error = caught.value
    assert (error.field, error.cached, error.wanted) == ("spec.cameras", WRIST.key, (FRONT.key,))
    assert str(error).count(FRONT.key) > str(error).count(WRIST.key) > 0


def test_another_picture_size_is_named_with_both() -> None:
    wrong = dataclasses.replace(WRIST, height=120)
    with pytest.raises(CacheMismatchError) as caught:
        compatibility.compare_cameras(SPEC, {FRONT.key: FRONT, WRIST.key: wrong})
    error = caught.value
    assert (error.field, error.cached, error.wanted) == (f"spec.cameras.{WRIST.key}", "128x128", "120x128")
    for value in (WRIST.key, "128x128", "120x128"):
        assert value in str(error)


def test_an_environment_of_another_size_is_told_the_options() -> None:
    compatibility.compare_environment(
        SPEC, {FRONT.key: (256, 320), WRIST.key: (128, 128), "observation.images.x": (1, 1)}
    )
    compatibility.compare_environment(SPEC, {})
    with pytest.raises(CacheMismatchError) as caught:
        compatibility.compare_environment(SPEC, {FRONT.key: (360, 360)})
    for value in ("360x360", "256x320", "--env.observation_height=256", "--env.observation_width=320"):
        assert value in str(caught.value)


# ---- episodes --------------------------------------------------------------------------------------------------------


def test_a_sealed_cache_with_the_asked_episodes_is_enough() -> None:
    compatibility.require_episodes(store(), None)
    compatibility.require_episodes(store(episodes=((0, 3), (5, 6))), [5, 0, 2])


@pytest.mark.parametrize("episodes", [[10], [-1, 3], []])
def test_episodes_that_the_dataset_does_not_have_are_refused(episodes: list[int]) -> None:
    with pytest.raises(UserInputError) as caught:
        compatibility.require_episodes(store(), episodes)
    for value in ("0 to 9", str(episodes)):
        assert value in str(caught.value)


def test_missing_episodes_are_named_with_the_command_that_adds_them() -> None:
    with pytest.raises(CacheIncompleteError) as caught:
        compatibility.require_episodes(store(episodes=((0, 3), (5, 6))), [0, 3, 4, 5, 9], root="data/pens")
    message = str(caught.value)
    assert "3:5, 9" in message
    words = shlex.split(message.split("`")[1])
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["geomcache", "extract"]
    assert parse_episodes(options["--episodes"], 10) == [(3, 5), (9, 10)]
    assert options["--output"] == "pens.zarr"
    assert options["--root"] == "data/pens"
    assert options["--cameras"] == "observation.images.image,observation.images.image2"
    assert (options["--model"], options["--dataset"], options["--dtype"]) == ("DA3-LARGE", "me/pens", "bf16")
    assert "--revision" not in options


def test_an_unsealed_cache_is_refused_even_with_all_episodes() -> None:
    with pytest.raises(CacheIncompleteError) as caught:
        compatibility.require_episodes(store(sealed=False), None)
    assert "`geomcache extract " in str(caught.value)
    assert "--episodes" not in str(caught.value)  # all are wanted: none are named
    with pytest.raises(CacheIncompleteError) as caught:
        compatibility.require_episodes(store(sealed=False, episodes=((0, 2),)), None)
    assert "episodes 2:10" in str(caught.value)
    assert "--episodes 2:10`" in str(caught.value)


def test_many_gaps_make_a_short_line_and_a_command_that_covers_them() -> None:
    dataset = dataclasses.replace(DATASET, episodes=1000)
    every_other = tuple((n, n + 1) for n in range(0, 1000, 2))
    with pytest.raises(CacheIncompleteError) as caught:
        compatibility.require_episodes(store(dataset=dataset, episodes=every_other), None)
    message = str(caught.value)
    assert " 1, 3, 5," in message
    assert "--episodes 1:1000`" in message
    assert len(message) < 600


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_resuming_needs_the_cache_of_the_checkpoint() -> None:
    compatibility.compare_fingerprints("f00", "f00")
    for checkpoint in ("abc", None):
        with pytest.raises(CacheMismatchError) as caught:
            compatibility.compare_fingerprints(checkpoint, "f00")
        assert (caught.value.field, caught.value.cached, caught.value.wanted) == ("fingerprint", "f00", checkpoint)
        for value in ("f00", checkpoint or "no cache"):
            assert value in str(caught.value)
