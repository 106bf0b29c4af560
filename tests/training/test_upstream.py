"""Training with what LeRobot's next version adds; `make test-next` runs it."""

from pathlib import Path

import pytest
import torch
from lerobot.configs.train import TrainPipelineConfig
from safetensors.torch import load_file

from geomcache.errors import UserInputError
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.policy.pi0.modeling_pi0_geometry import PI0GeometryPolicy
from tests.support.training import make_cache, make_dataset, make_spec, options, run_training

pytestmark = pytest.mark.skipif(
    "ema" not in TrainPipelineConfig.__dataclass_fields__,
    reason="LeRobot 0.6.1 has no averaged weights and no sharded checkpoints",
)


def test_averaged_weights_are_trained_saved_and_load(tmp_path: Path) -> None:
    meta = make_dataset(tmp_path / "dataset")
    cache = make_cache(tmp_path / "cache.zarr", meta, make_spec(meta))
    average = ["--ema.enable=true", "--ema.decay=0.5", "--policy.optimizer_lr=0.01", "--save_freq=3"]
    run_training(cache, options(meta, tmp_path / "run", *average, steps=3))
    last = tmp_path / "run" / "checkpoints" / "last"
    weights, averaged = (
        load_file(last / name / "model.safetensors") for name in ("pretrained_model", "pretrained_model_ema")
    )
    adapter = "model.geometry_adapter.projection.weight"
    assert weights.keys() == averaged.keys()
    assert not torch.equal(weights[adapter], averaged[adapter])
    policy = PI05GeometryPolicy.from_pretrained(last / "pretrained_model_ema")
    assert torch.equal(policy.state_dict()[adapter], averaged[adapter])


def test_averages_of_another_policy_load(tmp_path: Path) -> None:
    meta = make_dataset(tmp_path / "dataset")
    cache = make_cache(tmp_path / "cache.zarr", meta, make_spec(meta))
    average = ["--ema.enable=true", "--ema.decay=0.5", "--policy.type=pi0_geometry"]
    run_training(cache, options(meta, tmp_path / "run", *average))
    averaged = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model_ema"
    policy = PI0GeometryPolicy.from_pretrained(averaged)
    name = "model.geometry_adapter.projection.weight"
    assert torch.equal(policy.state_dict()[name], load_file(averaged / "model.safetensors")[name])


def test_split_parameters_are_refused_before_the_first_step(tmp_path: Path) -> None:
    meta = make_dataset(tmp_path / "dataset")
    cache = make_cache(tmp_path / "cache.zarr", meta, make_spec(meta))
    with pytest.raises(UserInputError, match=r"parallelism: .*dp_shard=2"):
        run_training(cache, options(meta, tmp_path / "run", "--parallelism.dp_shard=2"))


def test_sharded_checkpoints_are_refused_before_the_first_step(tmp_path: Path) -> None:
    meta = make_dataset(tmp_path / "dataset")
    cache = make_cache(tmp_path / "cache.zarr", meta, make_spec(meta))
    sharded = ["--checkpoint_format=safetensors_dcp", "--parallelism.dp_shard=2"]
    with pytest.raises(UserInputError, match="checkpoint_format"):
        run_training(cache, options(meta, tmp_path / "run", *sharded))
