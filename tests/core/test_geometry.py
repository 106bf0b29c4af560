"""The specs: their JSON form, their fingerprint, and what is refused of JSON from elsewhere."""

import dataclasses
import hashlib
import json
from typing import Any

import pytest

from geomcache.errors import CacheFormatError, UserInputError
from geomcache.geometry import Camera, DatasetSpec, GeometrySpec, canonical_json, fingerprint

SPEC = GeometrySpec(
    model_id="depth-anything/DA3-LARGE-1.1",
    model_revision="0123456789abcdef",
    model_name="da3-large",
    weights_sha256="5a" * 32,
    da3_version="0.1.1",
    views="joint",
    cameras=(
        Camera(key="observation.images.image", height=256, width=256),
        Camera(key="observation.images.wrist_image", height=240, width=320),
    ),
    process_res=504,
    grid="patch",
    grid_hw=(36, 36),
    outputs=("ray", "ray_conf"),
    compute_dtype="bf16",
)
DATASET = DatasetSpec(
    repo_id="HuggingFaceVLA/libero",
    revision=None,
    frames=273_465,
    episodes=1693,
    fps=10,
    episodes_sha256="c3" * 32,
    images_sha256="d4" * 32,
    decoder="image",
)

V2 = dataclasses.replace(DATASET, images_sha256=None, identities_sha256="e5" * 32)


def test_the_fingerprint_of_existing_caches_never_changes() -> None:
    """The literals are those of the first release: another one makes every cache that exists unreadable."""
    assert fingerprint(SPEC, DATASET) == "cafb89dc1781ec29d430488e8e0e43e61e75f000a494b1cb6552be8835261d7e"
    assert canonical_json(SPEC.to_dict()) == (
        b'{"cameras":[{"height":256,"key":"observation.images.image","width":256},'
        b'{"height":240,"key":"observation.images.wrist_image","width":320}],"compute_dtype":"bf16",'
        b'"da3_version":"0.1.1","grid":"patch","grid_hw":[36,36],"model_id":"depth-anything/DA3-LARGE-1.1",'
        b'"model_name":"da3-large","model_revision":"0123456789abcdef","outputs":["ray","ray_conf"],'
        b'"process_res":504,"reference_view":"first","resize_method":"upper_bound_resize",'
        b'"storage_dtype":"float16","views":"joint","weights_sha256":"' + b"5a" * 32 + b'"}'
    )
    assert canonical_json(DATASET.to_dict()) == (
        b'{"decoder":"image","episodes":1693,"episodes_sha256":"' + b"c3" * 32 + b'","fps":10,"frames":273465,'
        b'"images_sha256":"' + b"d4" * 32 + b'","repo_id":"HuggingFaceVLA/libero","revision":null}'
    )


def test_version_2_tells_a_dataset_by_its_episodes() -> None:
    assert (DATASET.schema_version, V2.schema_version) == (1, 2)
    assert "images_sha256" not in V2.to_dict()
    assert "identities_sha256" not in DATASET.to_dict()
    assert fingerprint(SPEC, dataclasses.replace(V2, revision="0" * 40)) == fingerprint(SPEC, V2)
    assert fingerprint(SPEC, dataclasses.replace(DATASET, revision="0" * 40)) != fingerprint(SPEC, DATASET)
    assert fingerprint(SPEC, dataclasses.replace(V2, identities_sha256="e6" * 32)) != fingerprint(SPEC, V2)
    for neither_or_both in ({"identities_sha256": None}, {"images_sha256": "d4" * 32}):
        with pytest.raises(UserInputError):
            dataclasses.replace(V2, **neither_or_both)
    with pytest.raises(CacheFormatError, match=r"dataset\.images_sha256"):
        DatasetSpec.from_dict({**V2.to_dict(), "images_sha256": None})


def test_labels_are_no_part_of_the_fingerprint() -> None:
    content = {"spec": SPEC.to_dict(), "dataset": DATASET.to_dict()}
    del content["spec"]["model_id"], content["dataset"]["repo_id"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert fingerprint(SPEC, DATASET) == hashlib.sha256(text.encode("ascii")).hexdigest()


@pytest.mark.parametrize("spec", [SPEC, DATASET, V2])
def test_a_spec_comes_back_from_its_json(spec: GeometrySpec | DatasetSpec) -> None:
    assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


CAMERA = {"key": "observation.images.image", "height": 256, "width": 256}
MISSING = object()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("process_res", None, ["spec.process_res", "int", "null"]),
        ("process_res", "504", ["spec.process_res", "int", "str"]),
        ("process_res", 504.0, ["spec.process_res", "int", "float"]),
        ("process_res", float("nan"), ["spec.process_res", "int", "float"]),
        ("process_res", True, ["spec.process_res", "int", "bool"]),
        ("process_res", -1, ["14 to 8192", "-1"]),
        ("process_res", 10**4000, ["14 to 8192", "1000"]),
        ("views", "both", ["spec.views", "joint, independent", "'both'"]),
        ("views", 7, ["spec.views", "str", "int"]),
        ("model_revision", 7, ["spec.model_revision", "str", "int"]),
        ("cameras", {}, ["spec.cameras", "array", "object"]),
        ("cameras", [], ["cameras", "at least one", "none"]),
        ("cameras", [7], ["spec.cameras[0]", "object", "int"]),
        ("cameras", [CAMERA, CAMERA | {"width": 2.5}], ["spec.cameras[1].width", "int", "float"]),
        ("cameras", [{"key": "a", "height": 1}], ["spec.cameras[0]", "width"]),
        ("cameras", [CAMERA | {"height": 10**300}], ["camera observation.images.image", "1 to 16384"]),
        ("cameras", [CAMERA | {"extra": 1}], ["spec.cameras", "'extra': 1"]),
        ("grid_hw", [36], ["spec.grid_hw", "2", "1"]),
        ("grid_hw", [36, 36, 36], ["spec.grid_hw", "2", "3"]),
        ("grid_hw", [36, 10**9], ["grid", "1 to 9999", "1000000000"]),
        ("outputs", ["ray", 3], ["spec.outputs[1]", "str", "int"]),
        ("outputs", "ray", ["spec.outputs", "array", "str"]),
        ("outputs", ["ray_conf", "ray"], ["spec.outputs", "['ray', 'ray_conf']", "['ray_conf', 'ray']"]),
        ("extra", 1, ["spec.extra", "no such field", "1"]),
        ("to_dict", 1, ["spec.to_dict", "no such field", "1"]),
        ("grid", MISSING, ["spec", "grid"]),
        ("storage_dtype", MISSING, ["spec.storage_dtype", "'float16'", "None"]),  # it has a default: not in a file
        ("model_id", "a\x1b[2Jb", ["spec.model_id", "'a\\x1b[2Jb'"]),
        ("model_id", "a\ud800b", ["spec.model_id", "'a\\ud800b'"]),
    ],
)
def test_other_values_are_refused_with_their_field(field: str, value: object, named: list[str]) -> None:
    data = {name: item for name, item in {**SPEC.to_dict(), field: value}.items() if item is not MISSING}
    with pytest.raises(CacheFormatError) as caught:
        GeometrySpec.from_dict(data)
    text = str(caught.value)
    assert text.startswith("spec")
    assert all(part in text for part in named), text
    assert "\n" not in text
    assert len(text) < 500


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), 0, 0.5, -30.0, "30", True, None])
def test_frame_rates_that_no_dataset_has_are_refused(fps: object) -> None:
    with pytest.raises(CacheFormatError, match="fps"):
        DatasetSpec.from_dict({**DATASET.to_dict(), "fps": fps})
    assert DatasetSpec.from_dict({**DATASET.to_dict(), "fps": 29.97}).fps == 29.97


@pytest.mark.parametrize("data", [[], None, 7, "spec"])
def test_other_things_are_no_spec(data: Any) -> None:
    with pytest.raises(CacheFormatError, match="dataset: .*object"):
        DatasetSpec.from_dict(data)
