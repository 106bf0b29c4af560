"""The card says what is known, and that the rest is not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from geomcache.cache.header import Header
from geomcache.cache.store import GeometryStore
from geomcache.sharing.card import published_header, write_card
from tests.support.stores import fill, make_dataset_spec, make_spec, open_writer

ADDRESS = "hf://datasets/me/made-up"


def card_of(path: Path, *, revision: str | None = None, **fields: Any) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    with open_writer(path, [(0, 20)], spec=make_spec(**fields), dataset=make_dataset_spec(revision=revision)) as writer:
        fill(writer)
        assert writer.seal()
    _, front, text = write_card(path, ADDRESS, published_header(Header.read(path))).split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize(
    ("model", "preset", "license_id", "license_name"),
    [
        ("DA3-SMALL", "da3-small", "apache-2.0", "Apache-2.0"),
        ("depth-anything/DA3-LARGE-1.1", "da3-large", "cc-by-nc-4.0", "CC BY-NC 4.0"),
    ],
)
def test_a_published_models_licence(
    tmp_path: Path, model: str, preset: str, license_id: str, license_name: str
) -> None:
    front, text = card_of(
        tmp_path / "cache", model_id=model, model_name=preset, model_revision="ab" * 20, revision="v1"
    )
    assert front["license"] == license_id
    assert front["pretty_name"] == f"{model} geometry of tests/made-up"
    assert f"| licence of the weights | {license_name}, as upstream's README says |" in text
    assert f"revision {'ab' * 20} |" in text
    assert "| dataset | tests/made-up, revision v1;" in text
    assert "| episodes | 0 of 4 |" in text
    assert "| frames | 20 of 90, at 10 fps |" in text
    assert f"`{GeometryStore.open(tmp_path / 'cache').fingerprint}`" in text
    assert f"geomcache train --cache {ADDRESS} --dataset.repo_id=tests/made-up --dataset.revision=v1 \\\n" in text
    assert f"geomcache pull {ADDRESS} cache.zarr" in text


def test_weights_of_a_folder_have_no_licence_that_is_known(tmp_path: Path) -> None:
    front, text = card_of(tmp_path / "cache", model_id="/home/me/models/a: b | c", model_name="da3-giant")
    assert "license" not in front
    assert front["pretty_name"] == "a: b | c geometry of tests/made-up"
    assert "| model | a: b \\| c (da3-giant, fp32), revision unknown: a local folder |" in text
    assert "upstream's da3-giant is under CC" in text
    assert "--dataset.revision" not in text
    assert "/home" not in text


@pytest.mark.parametrize(
    ("label", "published"),
    [
        ("DA3-LARGE-1.1", "DA3-LARGE-1.1"),
        ("depth-anything/DA3-SMALL", "depth-anything/DA3-SMALL"),
        ("/home/me/da3", "da3"),
        ("../../me/da3/", "da3"),
        ("~/da3", "da3"),
        ("./da3", "da3"),
        ("C:\\Users\\me\\da3", "da3"),
        ("/", "local"),
    ],
)
def test_paths_are_published_by_their_last_name_alone(label: str, published: str) -> None:
    header = Header.new(make_spec(model_id=label), make_dataset_spec(repo_id=label))
    shown = published_header(header)
    assert (shown.spec.model_id, shown.dataset.repo_id) == (published, published)
    assert shown.fingerprint == header.fingerprint
