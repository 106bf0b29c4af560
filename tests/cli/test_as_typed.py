"""The commands that the README shows, typed word for word against a small Hub that has stand-ins under their names."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lerobot.configs import FeatureType, PolicyFeature

from geomcache.cache.store import GeometryStore
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.policy.processor_pi05_geometry import make_pi05_geometry_pre_post_processors
from tests.support.datasets import ROOT, make_dataset
from tests.support.hub_server import HubHere, Repository, hub
from tests.support.policy import make_config

# The process of a command. Training is cut to two steps: LeRobot's default is 100,000.
START = """
import sys
if sys.argv[1] == "train":
    from lerobot.scripts import lerobot_train
    def short(config, train=lerobot_train.train):
        config.steps, config.save_freq, config.batch_size, config.num_workers = 2, 2, 2, 0
        train(config)
    lerobot_train.train = short
from geomcache.cli.main import main
main()
"""
__all__ = ["hub"]  # a fixture
CAMERAS = {"observation.images.image": (56, 56), "observation.images.image2": (56, 56)}


def readme_commands() -> list[str]:
    block = (ROOT / "README.md").read_text().partition("```bash\n")[2].partition("```")[0]
    return block.splitlines()


def publish(hub: HubHere, name: str, folder: Path) -> None:
    tree = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    repository = hub.hub.repositories[name] = Repository()
    repository.commit("main", tree)
    repository.branches["v3.0"] = repository.branches["main"]  # of a dataset: LeRobot's format


def save_plain_policy(folder: Path) -> None:
    """A checkpoint of the small Pi0.5 without geometry, whose configuration is that of a plain one but for its size."""
    pictures = {key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, *size)) for key, size in CAMERAS.items()}
    config = make_config(
        bound=False,
        use_geom_prefix=False,
        max_action_dim=7,
        max_state_dim=8,
        tokenizer_max_length=96,
        input_features={**pictures, "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(8,))},
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(7,))},
    )
    PI05GeometryPolicy(config).save_pretrained(folder)
    for processor in make_pi05_geometry_pre_post_processors(config):
        processor.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    ours = {field.name for field in dataclasses.fields(config)} & {name for name in saved if "geom" in name}
    plain = {name: value for name, value in saved.items() if name not in {*ours, "tokenizer_name", "random_init"}}
    (folder / "config.json").write_text(json.dumps(plain | {"type": "pi05"}))


def test_the_readme_shows_these_three() -> None:
    assert readme_commands() == ["geomcache extract --model DA3-LARGE", "geomcache train", "make eval-libero"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_extract_and_train_as_they_are_typed(hub: HubHere, random_da3_folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "libero", (3, 2), CAMERAS)
    save_plain_policy(tmp_path / "policy")
    publish(hub, "HuggingFaceVLA/libero", tmp_path / "libero")
    publish(hub, "depth-anything/DA3-LARGE", random_da3_folder)
    publish(hub, "lerobot/pi05_libero_base", tmp_path / "policy")
    folder = tmp_path / "work"
    folder.mkdir()
    environ = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.wire.port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_LEROBOT_HOME": str(tmp_path / "lerobot"),
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(command: str) -> list[str]:
        program, *arguments = command.split()
        assert program == "geomcache"
        done = subprocess.run(
            [sys.executable, "-c", START, *arguments],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    extract, train, _ = readme_commands()
    lines = run(extract)
    commit = hub.hub.repositories["HuggingFaceVLA/libero"].find("v3.0")
    assert any(line.startswith("dataset: HuggingFaceVLA/libero;") for line in lines)
    assert any("HuggingFaceVLA/libero: downloading " in line for line in lines)
    store = GeometryStore.open(folder / "libero.zarr")
    assert (store.dataset.repo_id, store.dataset.revision, store.dataset.frames) == (
        "HuggingFaceVLA/libero",
        commit,
        5,
    )
    assert store.spec.model_id == "DA3-LARGE"

    lines = run(train)
    chosen = [line for line in lines if "choose another" in line]
    assert [line.partition(":")[0] for line in chosen] == ["cache", "dataset", "policy", "output"]
    checkpoint = folder / "outputs" / "pi05_geometry" / "checkpoints" / "last" / "pretrained_model"
    saved = json.loads((checkpoint / "train_config.json").read_text())
    assert saved["dataset"]["repo_id"] == "HuggingFaceVLA/libero"
    assert saved["dataset"]["revision"] == commit
    policy = json.loads((checkpoint / "config.json").read_text())
    assert (policy["type"], policy["use_geom_prefix"]) == ("pi05_geometry", True)
    assert policy["geom_fingerprint"] == store.fingerprint
    assert policy["chunk_size"] == 4  # the stand-in's own
