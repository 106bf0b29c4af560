"""Whole training runs: two processes, LoRA, what is never imported, and whether geometry is of use. Minutes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets import LeRobotDatasetMetadata

from geomcache.cache.store import GeometryStore
from tests.support.training import CAMERAS, make_cache, make_dataset, make_spec, options, run_training

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

# Runs at the start of every Python process, spawned workers included: an import of DA3 leaves a file and fails.
NO_DA3 = """
import sys
from pathlib import Path

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "depth_anything_3":
            Path(__file__).with_name("imported").touch()
            raise ImportError(name)

sys.meta_path.insert(0, Guard())
Path(__file__).with_name("guarded").open("a").write(".")
"""

TRAIN = """
import sys
from geomcache.training.trainer import train

if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2:])
"""

# As TRAIN, and each process writes what it did in each step.
TRAIN_AND_TELL = """
import hashlib, json, os, sys
from pathlib import Path
from geomcache.training.trainer import train

if __name__ == "__main__":
    from lerobot.scripts import lerobot_train

    update, told = lerobot_train.update_policy, []

    def watched(tracker, policy, batch, *args, **kwargs):
        result = update(tracker, policy, batch, *args, **kwargs)
        digest = hashlib.sha256()
        for _, parameter in sorted(policy.named_parameters()):
            digest.update(parameter.detach().numpy().tobytes())
        told.append({"parameters": digest.hexdigest(), "frames": batch["index"].tolist()})
        return result

    lerobot_train.update_policy = watched
    train(sys.argv[1], sys.argv[2:])
    Path(__file__).with_name(f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDatasetMetadata:
    return make_dataset(tmp_path_factory.mktemp("data") / "pens", (8, 8))


@pytest.fixture(scope="module")
def cache(meta: LeRobotDatasetMetadata, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "pens.zarr", meta, make_spec(meta))


def run_script(folder: Path, text: str, args: Sequence[object], *, launcher: Sequence[str] = ()) -> None:
    script = folder / "script.py"
    script.write_text(text)
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script), *map(str, args)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_depth_anything_is_imported_by_no_process_of_a_run(
    meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_DA3)
    run_script(tmp_path, TRAIN, [cache, *options(meta, tmp_path / "run", "--num_workers=1", steps=1)])
    assert (tmp_path / "run" / "checkpoints" / "last").exists()
    assert len((tmp_path / "guarded").read_text()) >= 2  # the main process and its spawned worker at least
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("mode", ["prefix", "both"])
def test_two_processes_agree_on_the_parameters(
    meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path, mode: str
) -> None:
    # What `accelerate launch` starts for several GPUs; on CPUs it asks for MPI.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = options(meta, tmp_path / "run", f"--policy.geom_mode={mode}", steps=3)  # each step compares the gradients
    run_script(tmp_path, TRAIN_AND_TELL, [cache, *run], launcher=launcher)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == 3
    for here, there in zip(first, second, strict=True):
        assert here["parameters"] == there["parameters"]
    assert len({step["parameters"] for step in first}) == 3  # they did learn
    frames = [frame for step in (*first, *second) for frame in step["frames"]]
    assert len(set(frames)) == len(frames) == 12  # each process has its own share of the epoch


def test_a_geometry_checkpoint_goes_on_with_another_dataset(
    meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path
) -> None:
    """The adapter was trained with the first cache's statistics: they stay, whatever the second cache's are."""
    run_training(cache, options(meta, tmp_path / "first", steps=1))
    first = tmp_path / "first" / "checkpoints" / "last" / "pretrained_model"
    other = make_dataset(tmp_path / "other", (6,))
    second_cache = make_cache(tmp_path / "other.zarr", other, make_spec(other))
    more = [arg for arg in options(other, tmp_path / "second", steps=1) if arg != "--policy.model_size=small"]
    run_training(second_cache, [*more, f"--policy.path={first}"])
    configs = [
        json.loads((tmp_path / run / "checkpoints" / "last" / "pretrained_model" / "config.json").read_text())
        for run in ("first", "second")
    ]
    assert configs[1]["geom_statistics"] == configs[0]["geom_statistics"]
    fingerprints = [GeometryStore.open(path).fingerprint for path in (cache, second_cache)]
    assert [config["geom_fingerprint"] for config in configs] == fingerprints
    assert fingerprints[0] != fingerprints[1]


def test_a_lora_run_trains_and_reloads(meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: uv sync --extra peft")
    run_training(cache, options(meta, tmp_path / "base", steps=1))
    base = tmp_path / "base" / "checkpoints" / "last" / "pretrained_model"
    lora = [f"--policy.pretrained_path={base}", "--peft.method_type=LORA", "--peft.r=2", "--save_freq=2"]
    whole = run_training(cache, options(meta, tmp_path / "lora", *lora, steps=4))
    saved = tmp_path / "lora" / "checkpoints" / "000002" / "pretrained_model"
    assert (saved / "adapter_model.safetensors").exists()
    resumed = run_training(cache, ["--resume=true", f"--config_path={saved / 'train_config.json'}"])
    assert [step.loss for step in resumed] == [step.loss for step in whole[2:]]


def test_geometry_carries_information(tmp_path: Path) -> None:
    """Actions are told by the geometry and by nothing else: with it the loss falls below a third of that without."""
    lengths = [16] * 12
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(sum(lengths), 2)).astype(np.float32)
    meta = make_dataset(tmp_path / "signs", lengths, actions=signs)
    spec = make_spec(meta, grid_hw=(2, 2))
    maps = {
        key: {
            "ray": np.tile(signs[:, None, None, :], (1, 2, 2, 3)).astype(np.float16),
            "ray_conf": np.full((len(signs), 2, 2), 2.0, dtype=np.float16),
        }
        for key in CAMERAS
    }
    cache = make_cache(tmp_path / "signs.zarr", meta, spec, maps=maps)
    learning = ["--policy.optimizer_lr=1e-3", "--policy.geom_lr_scale=1", "--policy.scheduler_warmup_steps=10"]
    learning += ["--policy.scheduler_decay_steps=1000", "--policy.scheduler_decay_lr=1e-3", "--policy.chunk_size=1"]
    learning += ["--policy.n_action_steps=1", "--batch_size=16", "--save_checkpoint=false"]
    steps = 150
    seeing = run_training(cache, options(meta, tmp_path / "seeing", *learning, steps=steps))
    blind = ["--policy.use_geom_prefix=false"]
    without = run_training(cache, options(meta, tmp_path / "blind", *learning, *blind, steps=steps))
    last = [float(np.mean([step.loss for step in run[-30:]])) for run in (seeing, without)]
    print(f"loss of the last 30 of {steps} steps: {last[0]:.4f} with geometry, {last[1]:.4f} without")
    assert last[0] < last[1] / 3
