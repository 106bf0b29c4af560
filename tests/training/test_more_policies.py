"""Train `pi0_geometry` and `smolvla_geometry` by LeRobot's trainer from a cache, and predict once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from geomcache.cache.store import GeometryStore
from geomcache.errors import ModelError
from geomcache.evaluation.run import parse_evaluation
from geomcache.policy.checkpoint import read_config
from geomcache.policy.small_paligemma import SMALL_GEMMA
from geomcache.training import trainer as training
from geomcache.training.probe_policy import LEAST_FRAMES, probe_policy
from tests.support import smolvla
from tests.support.policy import make_plain_policy
from tests.support.training import CAMERAS, make_cache, make_dataset, make_spec, options, row_maps, run_training


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDatasetMetadata:
    return make_dataset(tmp_path_factory.mktemp("data") / "pens", (5, 4, 3))


@pytest.fixture(scope="module")
def cache(meta: LeRobotDatasetMetadata, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "pens.zarr", meta, make_spec(meta))


def small_smolvla(folder: Path) -> list[str]:
    """Options of a policy whose language model has 100,000 parameters."""
    model = smolvla.make_language_model(folder / "smolvlm")
    return [
        "--policy.type=smolvla_geometry",
        f"--policy.vlm_model_name={model}",
        "--policy.random_init=true",
        f"--policy.resize_imgs_with_padding=[{smolvla.SIDE},{smolvla.SIDE}]",
        "--policy.num_vlm_layers=2",
        "--policy.num_steps=2",
        *("--policy.chunk_size=3", "--policy.n_action_steps=3", "--policy.geom_target_hw=[2,2]", "--policy.device=cpu"),
    ]


@pytest.mark.parametrize("kind", ["pi0", "smolvla"])
def test_a_run_and_a_prediction(kind: str, meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    args = options(meta, tmp_path / "run", "--policy.type=pi0_geometry")
    if kind == "smolvla":
        args = [each for each in args if not each.startswith("--policy.")] + small_smolvla(tmp_path)
    steps = run_training(cache, args)
    spec = make_spec(meta)
    for step in steps:
        rows = step.batch["index"].numpy().reshape(-1)
        for number, key in enumerate(CAMERAS):
            maps = torch.from_numpy(row_maps(spec, rows)[key]["ray"])
            assert torch.equal(step.batch["observation.geometry.ray"][:, number], maps)
        assert step.metrics["geom_token_norm"] > 0
        assert step.metrics["image_token_norm"] > 0
    assert steps[1].metrics["geom_grad_norm"] > 0

    folder = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    saved = json.loads((folder / "config.json").read_text())
    assert saved["type"] == f"{kind}_geometry"
    assert saved["geom_fingerprint"] == GeometryStore.open(cache).fingerprint
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder)
    preprocess, postprocess = make_pre_post_processors(config, pretrained_path=str(folder))
    batch = steps[-1].batch
    observation = {key: value for key, value in batch.items() if key in (*CAMERAS, "observation.state")}
    geometry = {key: value for key, value in batch.items() if key.startswith("observation.geometry.")}
    raw = preprocess({**observation, **geometry, "task": ["pick up the pen"] * 2})
    actions = postprocess(policy.predict_action_chunk(raw))
    assert actions.shape == (2, 3, 2)
    assert torch.isfinite(actions).all()

    ask: dict[str, Any] = {"root": Path(meta.root), "frames": LEAST_FRAMES, "batch_size": 5, "device": "cpu"}
    if kind == "pi0":
        assert len(probe_policy(str(folder), cache, **ask).layers) == 1 + SMALL_GEMMA.depth
    else:  # its image tokens are no patches of the picture
        with pytest.raises(ModelError, match="smolvla_geometry"):
            probe_policy(str(folder), cache, **ask)


def test_a_plain_pi0_gains_geometry_and_is_evaluated_as_plain(
    meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plain_policy(monkeypatch, kind="pi0", chunk_size=3, n_action_steps=2).save_pretrained(tmp_path / "plain")
    path = str(tmp_path / "plain")
    args = [each for each in options(meta, tmp_path / "run") if not each.startswith("--policy.")]
    args += [f"--policy.path={path}", "--policy.geom_target_hw=[3,3]", "--policy.geom_mode=both"]
    config = training.parse_config(args)
    training.bind(config, GeometryStore.open(cache), args)
    policy = config.policy
    assert (policy.type, policy.geom_target_hw, policy.n_action_steps) == ("pi0_geometry", (3, 3), 2)
    assert str(policy.pretrained_path) == path
    assert policy.geometry_spec == GeometryStore.open(cache).spec
    evaluated = parse_evaluation(path, ["--policy.n_action_steps=1"], read_config(path)).policy
    assert (evaluated.type, evaluated.use_geom_prefix, evaluated.n_action_steps) == ("pi0_geometry", False, 1)
