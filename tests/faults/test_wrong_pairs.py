"""What changed between extraction, resuming and training is refused by name, with both values, field by field."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from geomcache.compatibility import COMPARED_DATASET_FIELDS, compare_cameras, compare_datasets, compare_fingerprints
from geomcache.errors import CacheMismatchError, UserInputError
from geomcache.geometry import Camera, DatasetSpec, GeometrySpec
from tests.faults.common import Figure
from tests.support.stores import CAMERAS, LENGTHS, make_dataset_spec, make_spec, make_store, open_writer

SPEC_CHANGES: dict[str, Any] = {
    "model_revision": "0" * 40,
    "model_name": "da3-base",
    "weights_sha256": "22" * 32,
    "da3_version": "0.1.2",
    "views": "independent",
    "reference_view": "middle",
    "cameras": tuple(Camera(key=key, height=48, width=64) for key in reversed(CAMERAS)),
    "process_res": 70,
    "resize_method": "lower_bound_resize",
    "grid": "3x5",
    "grid_hw": (3, 5),
    "outputs": ("ray", "ray_conf", "depth"),
    "compute_dtype": "bf16",
    "storage_dtype": "float32",
}
DATASET_CHANGES: dict[str, Any] = {
    "revision": "1" * 40,
    "fps": 20,
    "images_sha256": "33" * 32,
    "decoder": "pyav",
}
LABELS = {"model_id", "repo_id"}
# They follow from the lengths of the episodes, which are changed together below.
OF_LENGTHS = {"frames", "episodes", "episodes_sha256"}


def changed(base: Any, name: str, value: object) -> Any:
    """The spec with another value in a field, or the reason why there can be none."""
    try:
        return dataclasses.replace(base, **{name: value})
    except UserInputError as error:
        return error


def fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_every_field_is_tried() -> None:
    assert fields(GeometrySpec) == {*SPEC_CHANGES} | (LABELS & fields(GeometrySpec))
    assert fields(DatasetSpec) == {*DATASET_CHANGES} | OF_LENGTHS | (LABELS & fields(DatasetSpec))


def test_resuming_with_other_settings_is_refused(tmp_path: Path, figure: Figure) -> None:
    path = make_store(tmp_path / "cache")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    spec, dataset = make_spec(), make_dataset_spec()
    refused = impossible = 0
    for group, base, changes in (("spec", spec, SPEC_CHANGES), ("dataset", dataset, DATASET_CHANGES)):
        for name, value in changes.items():
            other = changed(base, name, value)
            if isinstance(other, UserInputError):
                assert name in ("reference_view", "resize_method", "storage_dtype"), other  # only one value can be
                impossible += 1
                continue
            pair: Mapping[str, Any] = {"spec": spec, "dataset": dataset, group: other}
            with pytest.raises(CacheMismatchError) as caught:
                open_writer(path, spec=pair["spec"], dataset=pair["dataset"])
            assert caught.value.field.startswith(f"{group}.{name}")
            assert str(caught.value.cached) in str(caught.value)
            assert str(caught.value.wanted) in str(caught.value)
            refused += 1
    for cameras in (
        tuple(dataclasses.replace(camera, height=96) for camera in spec.cameras),
        (*spec.cameras[:1], dataclasses.replace(spec.cameras[1], key="another")),
        spec.cameras[:1],
    ):
        with pytest.raises(CacheMismatchError, match=r"spec\.cameras: the cache was made with .*, this run has"):
            open_writer(path, spec=dataclasses.replace(spec, cameras=cameras))
        refused += 1
    for lengths in ((20, 30, 25, 16), (30, 20, 25, 15), (20, 30, 40), (20, 30, 25, 10, 5)):
        with pytest.raises(CacheMismatchError, match=r"dataset\.(frames|episodes|episodes_sha256)"):
            open_writer(path, lengths=lengths)
        refused += 1
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    figure(f"{refused} refused of {refused} tried; {impossible} fields have one value only")


def test_training_on_another_dataset_is_refused(figure: Figure) -> None:
    cached = make_dataset_spec(LENGTHS, revision="0" * 40)
    others = [
        dataclasses.replace(cached, **{name: value}) for name, value in DATASET_CHANGES.items() if name != "decoder"
    ]
    others += [make_dataset_spec(lengths, revision="0" * 40) for lengths in ((20, 30, 25, 16), (30, 20, 25, 15))]
    named = set()
    for other in others:
        with pytest.raises(CacheMismatchError) as caught:
            compare_datasets(cached, other)
        named.add(caught.value.field.removeprefix("dataset."))
    assert named >= {*COMPARED_DATASET_FIELDS, "revision"} - {"episodes"}
    spec = make_spec()
    sizes = {key: Camera(key=key, height=48, width=64) for key in CAMERAS}
    pairs: list[dict[str, Camera]] = [
        {CAMERAS[0]: sizes[CAMERAS[0]]},
        {**sizes, CAMERAS[1]: Camera(key=CAMERAS[1], height=48, width=65)},
        {**sizes, CAMERAS[0]: Camera(key=CAMERAS[0], height=96, width=64)},
    ]
    for cameras in pairs:
        with pytest.raises(CacheMismatchError, match=r"spec\.cameras|camera "):
            compare_cameras(spec, cameras)
    with pytest.raises(CacheMismatchError, match="fingerprint"):
        compare_fingerprints("a" * 64, "b" * 64)
    tried = len(others) + len(pairs) + 1
    figure(f"{tried} refused of {tried} tried")
