"""Evaluation of variants with true geometry, in the simulator: rows, a kill, stock `lerobot-eval`; recording."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDataset

from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import UserInputError
from geomcache.evaluation.episodes import read_episodes
from geomcache.evaluation.run import evaluate, with_defaults
from geomcache.geometry import Camera
from geomcache.policy.checkpoint import read_config
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.policy.processor_pi05_geometry import make_pi05_geometry_pre_post_processors
from geomcache.simulator import plus
from geomcache.simulator.environments import LiberoGeometry, make_environment
from geomcache.simulator.oracle import OracleOptions, oracle_spec
from geomcache.simulator.record import read_demonstrations, record, replay
from geomcache.simulator.simulation import maps_of
from tests.support.datasets import MINI, needs_mini
from tests.support.policy import make_config, make_statistics, shake
from tests.support.simulator import libero_config, needs_plus, needs_simulator, simulator

__all__ = ["libero_config", "simulator"]

SIZE = 64
KEYS = ("observation.images.image", "observation.images.image2")
CAMERAS = tuple(Camera(key=key, height=SIZE, width=SIZE) for key in KEYS)
OPTIONS = [
    *("--env.type=libero_plus_variants", "--env.task=libero_object", "--env.axis=camera", "--env.sample=2"),
    *("--env.episode_length=6", "--policy.n_action_steps=3", "--eval.n_episodes=1", "--eval.batch_size=1", "--seed=7"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small policy with random weights, as if trained with true geometry."""
    spec = oracle_spec(CAMERAS, OracleOptions(outputs=("ray", "depth"), grid_hw=(4, 4)))
    pictures = {key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, SIZE, SIZE)) for key in KEYS}
    config = make_config(
        bound=False,
        input_features={**pictures, "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(8,))},
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(7,))},
        max_action_dim=7,
        max_state_dim=8,
        tokenizer_max_length=120,
        normalization_mapping={},
    )
    config.bind_cache(spec, make_statistics(spec), "f" * 64)
    torch.manual_seed(0)
    policy = PI05GeometryPolicy(config)
    shake(policy)
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    for processor in make_pi05_geometry_pre_post_processors(policy.config):
        processor.save_pretrained(folder)
    return folder


def test_the_environment_gives_the_policys_geometry_unless_it_is_told_otherwise(checkpoint: Path) -> None:
    saved = read_config(str(checkpoint))
    oracle = ["--env.oracle_outputs=ray,depth", "--env.oracle_grid=4x4"]
    sizes = [f"--env.observation_height={SIZE}", f"--env.observation_width={SIZE}"]
    assert with_defaults("p", [], saved)[1:] == ["--env.type=libero_geometry", *sizes, *oracle]
    assert with_defaults("p", ["--env.type=libero"], saved)[1:] == ["--env.type=libero", *sizes]
    off = ["--env.type=libero_geometry", "--policy.use_geom_prefix=false"]
    assert with_defaults("p", off, saved)[1:] == [*off, *sizes]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--env.type=libero"], "libero_geometry"),
        (["--env.type=libero_geometry", "--env.oracle_outputs=ray"], "expected 'ray,depth' .*, got 'ray'"),
        (["--env.type=libero_geometry", "--env.oracle_grid=5x5"], "expected 4x4, .* got 5x5"),
        (["--env.type=libero_geometry", "--env.camera_name=robot0_eye_in_hand_image,agentview_image"], "camera_name"),
    ],
)
def test_an_environment_without_the_policys_geometry_is_refused(
    checkpoint: Path, options: list[str], named: str
) -> None:
    with pytest.raises(UserInputError, match=named):
        evaluate(str(checkpoint), options)


@needs_plus
@needs_simulator
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_resumes_and_stock_lerobot_runs_the_same(
    simulator: None, libero_config: Path, checkpoint: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.csv"
    found = evaluate(str(checkpoint), [*OPTIONS, f"--output_dir={tmp_path / 'whole'}"], results=whole)
    rows = read_episodes(whole)
    assert len(rows) == len(found.tasks) == 2
    for row in rows:
        variant = plus.VariantName.parse(plus.variant_names("libero_object")[row.task])
        assert (row.variant, row.camera, row.axis) == (variant.name, str(variant.camera), "camera")
        assert (row.seed, row.steps, row.success, row.encoder_calls) == (7, 6, False, 0)
        assert row.camera_moved_m > 0 or row.camera_turned_deg > 0

    # A process that is killed when its first row is there, and the same command again.
    command = [str(Path(sys.executable).parent / "geomcache"), "eval", "--policy", str(checkpoint), *OPTIONS]
    command += [f"--output_dir={tmp_path / 'killed'}", "--results", str(tmp_path / "killed.csv")]
    environment = os.environ | {"LIBERO_CONFIG_PATH": str(libero_config.parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "killed.csv").exists() or len(read_episodes(tmp_path / "killed.csv")) < 1:
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(read_episodes(tmp_path / "killed.csv")) == 1
    subprocess.run(command, env=environment, check=True, capture_output=True)
    identical = (tmp_path / "killed.csv").read_bytes() == whole.read_bytes()
    assert identical

    stock = [str(Path(sys.executable).parent / "lerobot-eval"), "--discover_packages_path=geomcache.policy"]
    stock += [
        "--env.discover_packages_path=geomcache.simulator",
        *with_defaults(str(checkpoint), OPTIONS, read_config(str(checkpoint))),
    ]
    done = subprocess.run(
        [*stock, f"--output_dir={tmp_path / 'stock'}"], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    info = json.loads((tmp_path / "stock" / "eval_info.json").read_text())
    assert [task["task_id"] for task in info["per_task"]] == [row.task for row in rows]


@needs_mini
@needs_simulator
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_demonstration_seen_by_a_moved_camera_and_its_cache(
    simulator: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LiberoGeometry(
        task="libero_object",
        observation_height=SIZE,
        observation_width=SIZE,
        oracle_outputs="ray,depth",
        oracle_grid="4x4",
    )
    demonstrations = read_demonstrations("local/mini", MINI, "libero_object", [0])
    assert [(each.task, each.initial_state, len(each.actions)) for each in demonstrations] == [(0, 0, 138)]
    move = "20_15_130_0_0"
    record(demonstrations, ["", move], config, tmp_path / "moved", tmp_path / "cache.zarr")
    assert not verify(tmp_path / "cache.zarr").problems
    recorded = LeRobotDataset("geomcache/moved", root=tmp_path / "moved", video_backend="pyav")
    original = LeRobotDataset("local/mini", root=MINI, episodes=[0], video_backend="pyav")
    assert len(original) == 138
    assert len(recorded) == 2 * 138
    for first in (0, 138):  # the camera as it is, and moved: the same motion
        seen = recorded[first + 90]
        assert seen["task"] == original[90]["task"]
        torch.testing.assert_close(seen["action"], original[90]["action"])
        torch.testing.assert_close(seen["observation.state"], original[90]["observation.state"], atol=1e-4, rtol=0)

    # What the environment gives while acting is what the cache has, to the bit.
    environment: Any = make_environment(LiberoGeometry(**vars(config) | {"camera": move}), "libero_object", 0, 0, 1)
    observation, _ = environment.reset(seed=0)
    with GeometryStore.open(tmp_path / "cache.zarr") as store:
        assert store.spec.source == "oracle:mujoco"
        for row in range(8):
            stored = store.batch([138 + row])
            for name, values in maps_of(observation).items():
                np.testing.assert_array_equal(dict(stored.items())[name][0], values)
            observation, *_ = environment.step(demonstrations[0].actions[row])
    environment.close()

    # One that ends before the task is solved, and one that was recorded with other actions.
    (whole,) = demonstrations
    cut = {name: getattr(whole, name)[:4] for name in ("actions", "executed", "states")}
    for wrong, named in (
        (dataclasses.replace(whole, **cut), "solve the task"),
        (dataclasses.replace(whole, executed=-whole.executed), "recorded state in frame 1"),
    ):
        with pytest.raises(UserInputError, match=f"episode 0: .*{named}"):
            list(replay(wrong, config))
