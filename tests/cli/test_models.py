"""The table of models: bytes against a spec's, and what is on this machine against the Hub's own cache layout."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from geomcache.cli.models import describe_models, table_lines
from geomcache.da3.catalog import MODELS
from tests.support.stores import make_spec

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_model(cache: Path, hub_id: str, commit: str, *names: str) -> None:
    """As huggingface_hub lays a downloaded model out."""
    folder = cache / ("models--" + hub_id.replace("/", "--"))
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "snapshots" / commit).mkdir(parents=True)
    for name in names:
        (folder / "blobs" / name).write_bytes(b"content")
        (folder / "snapshots" / commit / name).symlink_to(folder / "blobs" / name)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


def test_grids_and_bytes_are_those_of_a_spec(hub_cache: Path) -> None:
    facts = {model["name"]: model for model in describe_models()}
    assert facts.keys() == MODELS.keys()
    large = facts["DA3-LARGE"]
    for name, cells in (("patch", (36, 36)), ("native", (288, 288))):
        assert large["grid_hw"][name] == list(cells)
        assert large["view_nbytes"][name] == make_spec(grid_hw=cells, cameras=["one"]).frame_nbytes
    assert large["commits_here"] == []
    assert facts["DA3MONO-LARGE"]["view_nbytes"] is None


def test_what_is_here_is_told(hub_cache: Path) -> None:
    put_model(hub_cache, "depth-anything/DA3-SMALL", COMMIT, "config.json", "model.safetensors")
    put_model(hub_cache, "depth-anything/DA3-BASE", COMMIT, "config.json")
    facts = {model["name"]: model["commits_here"] for model in describe_models()}
    assert facts == {name: [COMMIT] if name == "DA3-SMALL" else [] for name in MODELS}
    lines = list(table_lines(describe_models()))
    (small,) = [line for line in lines if line.startswith("DA3-SMALL ")]
    assert small.split() == ["DA3-SMALL", "34.3", "M", "Apache-2.0", "yes", "288x288", "18,144", "1,161,216", "0123456"]
    (metric,) = [line for line in lines if line.startswith("DA3METRIC-LARGE ")]
    assert metric.split()[-5:] == ["no", "-", "-", "-", "no"]
    assert any("The Hub was not asked" in line for line in lines)
