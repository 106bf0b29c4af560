"""docs/cache-format.schema.json against caches as they are written, and against what the reader refuses."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheCorruptError, CacheFormatError
from geomcache.geometry import OUTPUTS
from tests.support.datasets import ROOT
from tests.support.stores import fill, make_spec, make_store, open_writer

SCHEMA = json.loads((ROOT / "docs" / "cache-format.schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)
MISSING = object()

# Members that a cache may not have, by path; MISSING takes the member away.
MUTATIONS: list[tuple[tuple[str | int, ...], Any]] = [
    (("schema_version",), 3),
    (("schema_version",), 1),
    (("dataset", "images_sha256"), "11" * 32),
    (("dataset", "identities_sha256"), MISSING),
    (("dataset", "identities_sha256"), "11"),
    (("schema_version",), MISSING),
    (("fingerprint",), "00"),
    (("fingerprint",), MISSING),
    (("shard_frames",), 15),
    (("shard_frames",), 131_072),
    (("shard_frames",), "16"),
    (("codec",), "lz4"),
    (("codec",), MISSING),
    (("spec",), MISSING),
    (("spec", "views"), "both"),
    (("spec", "cameras"), []),
    (("spec", "cameras", 0, "key"), "../elsewhere"),
    (("spec", "cameras", 0, "key"), ".hidden"),
    (("spec", "cameras", 0, "height"), 0),
    (("spec", "cameras", 0, "width"), 16385),
    (("spec", "cameras", 0, "depth"), 1),
    (("spec", "process_res"), 13),
    (("spec", "process_res"), 504.5),
    (("spec", "grid"), "14"),
    (("spec", "grid_hw"), [14]),
    (("spec", "grid_hw"), [14, 10000]),
    (("spec", "outputs"), ["ray_conf", "ray"]),
    (("spec", "outputs"), ["ray", "rays"]),
    (("spec", "outputs"), ["ray", "ray_conf", "feature"]),
    (("spec", "feature"), {"width": 6, "dim": 5, "basis_sha256": "11" * 32}),
    (("spec", "outputs"), ["ray", "depth", "depth"]),
    (("spec", "compute_dtype"), "fp16"),
    (("spec", "storage_dtype"), "float32"),
    (("spec", "model_revision"), 7),
    (("spec", "weights_sha256"), MISSING),
    (("spec", "colour"), "BGR"),
    (("dataset",), MISSING),
    (("dataset", "frames"), 0),
    (("dataset", "episodes"), "4"),
    (("dataset", "fps"), 0),
    (("dataset", "decoder"), MISSING),
]


def attributes(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]["geomcache"]
    return found


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("schema") / "cache.zarr")


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("outputs", [("ray",), ("ray", "ray_conf"), tuple(OUTPUTS)])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_caches_fit(tmp_path: Path, outputs: tuple[str, ...], codec: str) -> None:
    with open_writer(tmp_path / "cache.zarr", spec=make_spec(outputs=outputs), codec=codec) as writer:
        VALIDATOR.validate(attributes(tmp_path / "cache.zarr"))  # empty
        fill(writer, shards=2)
        VALIDATOR.validate(attributes(tmp_path / "cache.zarr"))  # interrupted
        fill(writer)
        assert writer.seal()
    described = attributes(tmp_path / "cache.zarr")
    VALIDATOR.validate(described)
    assert set(described["statistics"]["pooled"]) == set(outputs)  # the part that only a sealed cache has


@pytest.mark.parametrize(("path", "value"), MUTATIONS, ids=lambda part: "missing" if part is MISSING else str(part))
def test_what_the_schema_refuses_the_reader_refuses(
    sealed: Path, tmp_path: Path, path: tuple[str | int, ...], value: object
) -> None:
    described = copy.deepcopy(attributes(sealed))
    *parents, name = path
    member: Any = described
    for parent in parents:
        member = member[parent]
    if value is MISSING:
        del member[name]
    else:
        member[name] = value
    errors = list(VALIDATOR.iter_errors(described))
    assert errors
    places = [tuple(error.absolute_path) for error in errors]
    assert any(place == path[: len(place)] or place[: len(path)] == path for place in places)  # where the change is

    cache = tmp_path / "cache.zarr"
    cache.mkdir()
    for file in sealed.iterdir():
        (cache / file.name).symlink_to(file)
    (cache / "zarr.json").unlink()
    root = json.loads((sealed / "zarr.json").read_text())
    root["attributes"]["geomcache"] = described
    (cache / "zarr.json").write_text(json.dumps(root))
    with pytest.raises((CacheFormatError, CacheCorruptError)):
        GeometryStore.open(cache)


def test_the_schema_lists_the_fields_of_the_page() -> None:
    page = (ROOT / "docs" / "cache-format.md").read_text(encoding="utf-8")
    for part in ("spec", "dataset"):
        rows = page.partition(f"| member of `{part}` |")[2].partition("\n\n")[0]
        for name in SCHEMA["$defs"][part]["required"]:
            assert f"`{name}`" in rows
