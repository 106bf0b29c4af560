"""Whatever changes between extraction, resuming and training is refused with its field and both values."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from geomcache.cache.compatibility import (
    COMPARED_DATASET_FIELDS,
    compare_cameras,
    compare_datasets,
    compare_fingerprints,
)
from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import CacheMismatchError, GeomcacheError, GeometryError, ModelError, UserInputError
from geomcache.geometry import Camera, DatasetSpec, FeatureSpec, GeometrySpec
from geomcache.policy.online import OnlineEncoder
from tests.faults.common import Figure
from tests.support.stores import (
    CAMERAS,
    LENGTHS,
    make_dataset_spec,
    make_identities,
    make_spec,
    make_store,
    open_writer,
)

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
    "feature": FeatureSpec(width=768, dim=128, basis_sha256="44" * 32),
}
DATASET_CHANGES: dict[str, Any] = {
    "fps": 20,
    "identities_sha256": hashlib.sha256(make_identities()[::-1].tobytes()).hexdigest(),
    "decoder": "pyav",
}
V1_CHANGES: dict[str, Any] = {"revision": "1" * 40, "images_sha256": "33" * 32}
LABELS = {"model_id", "repo_id", "revision"}
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
    assert fields(DatasetSpec) == {*DATASET_CHANGES, *V1_CHANGES} | OF_LENGTHS | (LABELS & fields(DatasetSpec))


def test_resuming_with_other_settings_is_refused(tmp_path: Path, figure: Figure) -> None:
    path = make_store(tmp_path / "cache")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    spec, dataset = make_spec(), make_dataset_spec()
    refused = impossible = 0
    for group, base, changes in (("spec", spec, SPEC_CHANGES), ("dataset", dataset, DATASET_CHANGES)):
        for name, value in changes.items():
            other = changed(base, name, value)
            if isinstance(other, UserInputError):
                # Of the first three there is one value only; another basis is tried in extraction/test_feature.py.
                assert name in ("reference_view", "resize_method", "storage_dtype", "feature"), other
                impossible += 1
                continue
            pair: Mapping[str, Any] = {"spec": spec, "dataset": dataset, group: other}
            identities = make_identities()[:: -1 if name == "identities_sha256" else 1]
            with pytest.raises(CacheMismatchError) as caught:
                open_writer(path, spec=pair["spec"], dataset=pair["dataset"], identities=identities)
            assert caught.value.field.startswith(f"{group}.{name}")
            assert str(caught.value.cached) in str(caught.value)
            assert str(caught.value.wanted) in str(caught.value)
            refused += 1
    for cameras in (
        tuple(dataclasses.replace(camera, height=96) for camera in spec.cameras),
        (*spec.cameras[:1], dataclasses.replace(spec.cameras[1], key="another")),
        spec.cameras[:1],
    ):
        with pytest.raises(CacheMismatchError) as caught:
            open_writer(path, spec=dataclasses.replace(spec, cameras=cameras))
        assert caught.value.field == "spec.cameras"
        refused += 1
    for lengths in ((20, 30, 25, 16), (30, 20, 25, 15), (20, 30, 40), (20, 30, 25, 10, 5)):
        with pytest.raises(CacheMismatchError) as caught:
            open_writer(path, lengths=lengths)
        assert caught.value.field in ("dataset.frames", "dataset.episodes", "dataset.episodes_sha256")
        refused += 1
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    figure(f"{refused} refused of {refused} tried; {impossible} fields have one value only")


def test_training_on_another_dataset_is_refused(figure: Figure) -> None:
    v1 = {"revision": "0" * 40, "images_sha256": "11" * 32}  # from version 2 on, episodes are compared one by one
    cached = make_dataset_spec(LENGTHS, **v1)
    others = [dataclasses.replace(cached, **{name: value}) for name, value in {**V1_CHANGES, "fps": 20}.items()]
    others += [make_dataset_spec(lengths, **v1) for lengths in ((20, 30, 25, 16), (30, 20, 25, 15))]
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
        with pytest.raises(CacheMismatchError) as caught:
            compare_cameras(spec, cameras)
        assert caught.value.field.startswith("spec.cameras")
    with pytest.raises(CacheMismatchError) as caught:
        compare_fingerprints("a" * 64, "b" * 64)
    assert caught.value.field == "fingerprint"
    tried = len(others) + len(pairs) + 1
    figure(f"{tried} refused of {tried} tried")


# What an installation may have that the cache was not made with, and values that the error names.
ENCODER_CHANGES: dict[str, tuple[Any, type[GeomcacheError], tuple[str, ...]]] = {
    "weights_sha256": ("22" * 32, ModelError, ("sha256 2222",)),
    "da3_version": ("0.0.9", CacheMismatchError, ("spec.da3_version", "'0.0.9'")),
    "model_name": ("da3-base", CacheMismatchError, ("'da3-base'", "'da3-small'")),
    "grid_hw": ((3, 3), CacheMismatchError, ("spec.grid_hw", "(3, 3)")),
    "model_id": ("/nowhere/da3", ModelError, ("/nowhere/da3",)),
}


def test_inference_with_another_encoder_or_other_pictures_is_refused(random_da3_folder: Path, figure: Figure) -> None:
    cameras = tuple(Camera(key=key, height=28, width=42) for key in CAMERAS)
    spec = DA3Encoder.from_pretrained(str(random_da3_folder), cameras=cameras, process_res=42, device="cpu").spec
    cpu = torch.device("cpu")
    pictures = {key: torch.randint(256, (1, 3, 28, 42), dtype=torch.uint8) for key in CAMERAS}
    for name, (value, kind, named) in ENCODER_CHANGES.items():
        online = OnlineEncoder(dataclasses.replace(spec, **{name: value}), None)
        with pytest.raises(kind) as caught:
            online(pictures, cpu, allow_resize=False)
        assert [each for each in named if each not in str(caught.value)] == []
        assert online.encoder is None
    front, wrist = CAMERAS
    others: list[tuple[dict[str, torch.Tensor], tuple[str, ...]]] = [
        ({front: pictures[front]}, (wrist, front)),
        ({front: pictures[front], "hand": pictures[wrist]}, (wrist, front)),
        (pictures | {front: pictures[front].permute(0, 1, 3, 2)}, (front, "28x42", "42x28")),
        (pictures | {wrist: pictures[wrist][..., :41]}, (wrist, "28x42", "28x41")),
        (pictures | {wrist: pictures[wrist].permute(0, 2, 3, 1)}, (wrist, "[B, 3, H, W]")),
        (pictures | {wrist: pictures[wrist] / 255 * 2 - 1}, (wrist, "1/255")),  # to [-1, 1]
        (pictures | {wrist: pictures[wrist].float()}, (wrist, "1/255")),  # not divided
    ]
    online = OnlineEncoder(spec, None)
    for batch, named in others:
        with pytest.raises(GeometryError) as refusal:
            online(batch, cpu, allow_resize=False)
        assert [each for each in named if each not in str(refusal.value)] == []
    assert online(pictures, cpu, allow_resize=False).ray.shape[:2] == (1, 2)
    tried = len(ENCODER_CHANGES) + len(others)
    figure(f"{tried} refused of {tried} tried")
