"""`geomcache train`: LeRobot's trainer runs on cached geometry, resumes exactly, and refuses what does not fit."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.common import train_utils
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDatasetMetadata, factory
from lerobot.scripts import lerobot_train
from lerobot.utils import utils as lerobot_utils

from geomcache.cache.store import GeometryStore
from geomcache.errors import (
    CacheIncompleteError,
    CacheMismatchError,
    CacheNotFoundError,
    DatasetNotFoundError,
    GeomcacheError,
    MissingFrameError,
    ModelNotFoundError,
    UserInputError,
)
from geomcache.geometry import canonical_json
from geomcache.training import trainer as training
from tests.support.training import (
    CAMERAS,
    REPO_ID,
    Step,
    make_cache,
    make_dataset,
    make_spec,
    options,
    row_maps,
    run_training,
)

LENGTHS = (5, 4, 3)
RAY = "observation.geometry.ray"


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDatasetMetadata:
    return make_dataset(tmp_path_factory.mktemp("data") / "pens", LENGTHS)


@pytest.fixture(scope="module")
def cache(meta: LeRobotDatasetMetadata, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "pens.zarr", meta, make_spec(meta))


def resume_from(checkpoints: Path, step: int) -> list[str]:
    config = checkpoints / f"{step:06d}" / "pretrained_model" / "train_config.json"
    return ["--resume=true", f"--config_path={config}"]


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(meta: LeRobotDatasetMetadata, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    """Four steps, two checkpoints: the folder of the checkpoints, and the steps."""
    output = tmp_path_factory.mktemp("run") / "run"
    steps = run_training(cache, options(meta, output, "--save_freq=2", steps=4))
    return output / "checkpoints", steps


def test_a_run_trains_on_the_rows_of_its_frames(meta: LeRobotDatasetMetadata, run: tuple[Path, list[Step]]) -> None:
    _, steps = run
    assert len(steps) == 4
    assert all(np.isfinite(step.loss) for step in steps)
    spec = make_spec(meta)
    for step in steps:
        maps = row_maps(spec, step.batch["index"].numpy())
        for name in spec.outputs:
            expected = np.stack([maps[key][name] for key in CAMERAS], axis=1)
            assert torch.equal(step.batch[f"observation.geometry.{name}"], torch.from_numpy(expected))


def test_each_logged_step_shows_whether_geometry_is_learned(run: tuple[Path, list[Step]]) -> None:
    _, steps = run
    shown, metrics = steps[1].shown, steps[1].metrics
    for name in ("geom_alpha", "geom_grad_norm", "geom_token_norm"):
        assert metrics[name] > 0
        assert f"{name}:{metrics[name]:.3g}" in shown
    assert f"image_token_norm:{metrics['image_token_norm']:.3f}" in shown


def test_a_checkpoint_carries_what_its_geometry_was_made_from(cache: Path, run: tuple[Path, list[Step]]) -> None:
    checkpoints, _ = run
    folder = checkpoints / "last" / "pretrained_model"
    store = GeometryStore.open(cache)
    config = json.loads((folder / "config.json").read_text())
    assert config["type"] == "pi05_geometry"
    assert canonical_json(config["geom_spec"]) == canonical_json(store.spec.to_dict())
    assert config["geom_statistics"] == {name: moments.to_dict() for name, moments in store.statistics.items()}
    assert config["geom_fingerprint"] == store.fingerprint
    assert config["push_to_hub"] is False
    assert json.loads((folder / "train_config.json").read_text())["policy"]["geom_fingerprint"] == store.fingerprint


def test_two_steps_and_two_after_resuming_are_four_in_one_run(cache: Path, run: tuple[Path, list[Step]]) -> None:
    checkpoints, steps = run
    resumed = run_training(cache, resume_from(checkpoints, 2))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]


@pytest.mark.slow
def test_resuming_in_a_later_epoch_is_exact_too(meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    """12 frames make 6 steps an epoch: the checkpoint of step 8 is in the second."""
    whole = run_training(cache, options(meta, tmp_path / "run", "--save_freq=8", steps=10))
    resumed = run_training(cache, resume_from(tmp_path / "run" / "checkpoints", 8))
    assert [step.loss for step in resumed] == [step.loss for step in whole[8:]]


@pytest.mark.slow
def test_spawned_workers_train_on_the_same_numbers(meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    alone = run_training(cache, options(meta, tmp_path / "alone", steps=2))
    spawned = run_training(cache, options(meta, tmp_path / "spawned", "--num_workers=1", steps=2))
    assert [step.loss for step in spawned] == [step.loss for step in alone]


def test_a_held_out_split_is_evaluated_with_geometry(
    meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy

    seen = []
    forward = PI05GeometryPolicy.forward

    def watched(self: Any, batch: dict[str, Any], *args: Any) -> Any:
        seen.append((self.training, sorted(set(batch["episode_index"].tolist())), RAY in batch))
        return forward(self, batch, *args)

    monkeypatch.setattr(PI05GeometryPolicy, "forward", watched)
    split = ["--dataset.eval_split=0.3", "--eval_steps=1", "--max_eval_samples=2"]
    run_training(cache, options(meta, tmp_path / "run", *split, steps=1))
    assert [episodes for trains, episodes, _ in seen if not trains] == [[2]]
    assert all(set(episodes) <= {0, 1} for trains, episodes, _ in seen if trains)
    assert all(geometry for *_, geometry in seen)


@pytest.mark.slow
def test_streaming_trains_with_geometry(meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    streamed = ["--dataset.streaming=true", "--num_workers=1"]
    (step,) = run_training(cache, options(meta, tmp_path / "run", *streamed, steps=1))
    maps = row_maps(make_spec(meta), step.batch["index"].numpy())
    assert torch.equal(step.batch[RAY][:, 1], torch.from_numpy(maps[CAMERAS[1]]["ray"]))


def test_without_geom_prefix_no_geometry_is_read(meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    (step,) = run_training(cache, options(meta, tmp_path / "run", "--policy.use_geom_prefix=false", steps=1))
    assert RAY not in step.batch


def test_a_cache_of_the_asked_episodes_is_enough(meta: LeRobotDatasetMetadata, tmp_path: Path) -> None:
    part = make_cache(tmp_path / "part.zarr", meta, make_spec(meta), episodes=[0, 2])
    steps = run_training(part, options(meta, tmp_path / "run", "--dataset.episodes=[0,2]", "--batch_size=4", steps=2))
    assert {episode for step in steps for episode in step.batch["episode_index"].tolist()} == {0, 2}


@pytest.mark.slow
def test_a_row_that_is_lost_while_training_ends_the_run_in_one_line(
    meta: LeRobotDatasetMetadata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's read fails; the message is the store's, without the worker's traceback."""
    part = make_cache(tmp_path / "part.zarr", meta, make_spec(meta), episodes=[0])
    monkeypatch.setattr("geomcache.cache.compatibility.require_episodes", lambda *_: None)
    with pytest.raises(MissingFrameError) as caught:
        run_training(part, options(meta, tmp_path / "run", "--num_workers=1"))
    assert "\n" not in str(caught.value)
    assert "expected episode" in str(caught.value)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a training step was run")

    monkeypatch.setattr(lerobot_train, "update_policy", fail)


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--nonsense=3"], UserInputError, "unrecognized arguments: --nonsense=3"),
        (["--policy.geom_nonsense=3"], UserInputError, "unrecognized arguments: --policy.geom_nonsense=3"),
        (["--steps=many"], UserInputError, "`steps`: Couldn't parse 'many' into an int"),
        (["--policy.dtype=float8"], UserInputError, "Invalid dtype: float8"),
        (["--policy.freeze_geom_model=false"], UserInputError, "freeze_geom_model: expected true"),
        (["--policy.geom_attention=sparse"], UserInputError, "geom_attention: expected 'full' or 'isolated'"),
        (["--policy.geom_target_hw=[4,9]"], UserInputError, "geom_target_hw: expected at most 4 cells"),
        (
            ["--use_policy_training_preset=false", "--optimizer.type=adamw", "--scheduler.type=diffuser"],
            UserInputError,
            "geom_lr_scale: expected 1 with use_policy_training_preset=false, got 10",
        ),
        (["--dataset.episodes=[0,3]"], UserInputError, "dataset.episodes: expected some of 0 to 2"),
        (["--dataset.episodes=[0,0]"], UserInputError, "Episode indices contain duplicates"),
        (["--dataset.image_transforms.enable=true"], UserInputError, "affine (RandomAffine)"),
        (["--eval_steps=1"], UserInputError, "eval_steps > 0 requires dataset.eval_split"),
        (["--job.target=a10g-small"], UserInputError, "job.target: expected a run on this machine"),
        (["--dataset.root=/nowhere/pens"], DatasetNotFoundError, "found no meta/info.json"),
        (["--policy.pretrained_path=/nowhere/pi05"], ModelNotFoundError, "/nowhere/pi05"),
        (["--env.type=libero", "--env_eval_freq=1"], CacheMismatchError, "--env.observation_height=16"),
        (["--discover_packages_path=nowhere"], UserInputError, "Failed to load plugin 'nowhere'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_options_end_the_run_before_the_first_step(
    meta: LeRobotDatasetMetadata,
    cache: Path,
    tmp_path: Path,
    more: list[str],
    error: type[GeomcacheError],
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        training.train(cache, options(meta, tmp_path / "run", *more))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_step")
def test_there_is_no_cache(meta: LeRobotDatasetMetadata, tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match=r"none\.zarr"):
        training.train(tmp_path / "none.zarr", options(meta, tmp_path / "run"))


@pytest.mark.usefixtures("no_step")
def test_an_incomplete_cache_names_the_episodes_and_the_command(meta: LeRobotDatasetMetadata, tmp_path: Path) -> None:
    unsealed = make_cache(tmp_path / "unsealed.zarr", meta, make_spec(meta), episodes=[0], seal=False)
    with pytest.raises(CacheIncompleteError, match=r"lacks episodes 1:3: finish it with `geomcache extract"):
        training.train(unsealed, options(meta, tmp_path / "run"))
    sealed = make_cache(tmp_path / "sealed.zarr", meta, make_spec(meta), episodes=[0, 2])
    with pytest.raises(CacheIncompleteError, match=rf"lacks 1: .*--root {meta.root} .*--episodes 1`"):
        training.train(sealed, options(meta, tmp_path / "run"))


@pytest.mark.usefixtures("no_step")
def test_a_cache_of_another_dataset_is_refused(cache: Path, tmp_path: Path) -> None:
    longer = make_dataset(tmp_path / "longer", (5, 4, 4))
    with pytest.raises(CacheMismatchError, match=r"dataset\.frames: .* with 12, .* with 13"):
        training.train(cache, options(longer, tmp_path / "run"))
    repainted = make_dataset(tmp_path / "repainted", LENGTHS, seed=1)
    with pytest.raises(CacheMismatchError, match=r"dataset\.images_sha256"):
        training.train(cache, options(repainted, tmp_path / "run"))
    other_size = make_dataset(tmp_path / "larger", LENGTHS, size=24)
    with pytest.raises(CacheMismatchError, match=r"the cache is of 16x16 pictures, .* has 24x24"):
        training.train(cache, options(other_size, tmp_path / "run"))
    one_camera = make_dataset(tmp_path / "one", LENGTHS, cameras=CAMERAS[:1])
    with pytest.raises(CacheMismatchError, match=rf"spec\.cameras: the cache has {CAMERAS[1]}"):
        training.train(cache, options(one_camera, tmp_path / "run"))


@pytest.mark.usefixtures("no_step")
def test_another_policy_is_refused(meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    run = [f"--dataset.repo_id={REPO_ID}", f"--dataset.root={meta.root}", f"--output_dir={tmp_path / 'run'}"]
    with pytest.raises(UserInputError, match="policy: expected pi05_geometry, got pi05: leave --policy.type out"):
        training.train(cache, [*run, "--policy.type=pi05", "--policy.device=cpu"])
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"type": "pi05", "device": "cpu"}))
    with pytest.raises(UserInputError, match="checkpoint goes into --policy.pretrained_path, not"):
        training.train(cache, [*run, f"--policy.path={plain}"])
    with pytest.raises(UserInputError, match=r"lerobot-train: .*nowhere"):
        training.train(cache, [*run, f"--policy.path={tmp_path / 'nowhere'}"])


@pytest.mark.usefixtures("no_step")
def test_resuming_from_another_cache_is_refused(
    meta: LeRobotDatasetMetadata, run: tuple[Path, list[Step]], tmp_path: Path
) -> None:
    resume = resume_from(run[0], 2)
    finer = make_cache(tmp_path / "finer.zarr", meta, make_spec(meta, grid_hw=(5, 4)))
    with pytest.raises(CacheMismatchError, match=r"spec\.grid"):
        training.train(finer, resume)
    larger = make_dataset(tmp_path / "larger", (*LENGTHS, 2))
    with pytest.raises(CacheMismatchError, match="fingerprint: the checkpoint was trained from"):
        training.train(make_cache(tmp_path / "larger.zarr", larger, make_spec(larger)), resume)


def test_a_run_that_is_there_is_not_overwritten(meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="already exists and resume is False"):
        training.train(cache, options(meta, tmp_path))


# ---- options and seams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], ["--policy.type=pi05_geometry", "--policy.push_to_hub=false"]),
        (["--policy.type=mine"], ["--policy.push_to_hub=false"]),
        (["--policy.path", "me/mine"], ["--policy.push_to_hub=false"]),
        (["--policy.repo_id=me/mine"], ["--policy.type=pi05_geometry"]),
        (["--policy.push_to_hub=true"], ["--policy.type=pi05_geometry"]),
        (["--resume=true", "--config_path=outputs/train_config.json"], []),
    ],
)
def test_defaults_fill_what_is_left_open(given: list[str], added: list[str]) -> None:
    assert training.with_defaults(given) == [*given, *added]


def test_lerobots_help_is_lerobots(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        training.parse_config(["--help"])
    assert not stop.value.code
    assert "--policy.geom_target_hw" in capsys.readouterr().out


def test_a_configuration_is_validated_once(meta: LeRobotDatasetMetadata, tmp_path: Path) -> None:
    config = training.parse_config(options(meta, tmp_path / "run"))
    assert type(config) is TrainPipelineConfig  # by which LeRobot's trainer tells a configuration from a command line
    config.output_dir.mkdir()
    config.validate()  # the trainer's own call; the second look would refuse the folder
    assert config.to_dict()["steps"] == 2


def test_the_seams_into_lerobots_trainer_are_where_they_were() -> None:
    """The trainer must look these names up in its own module when it runs, and call them in this way."""
    used = inspect.unwrap(lerobot_train.train).__code__.co_names
    assert {"make_train_eval_datasets", "cycle", "load_training_state", "MetricsTracker"} <= set(used)
    assert lerobot_train.make_train_eval_datasets is factory.make_train_eval_datasets
    assert lerobot_train.cycle is lerobot_utils.cycle
    assert list(inspect.signature(factory.make_train_eval_datasets).parameters) == ["cfg"]
    assert list(inspect.signature(lerobot_utils.cycle).parameters) == ["iterable"]
    source = inspect.getsource(inspect.unwrap(lerobot_train.train))
    assert "dl_iter = cycle(dataloader)" in source
    assert "cfg.validate()" in source
    assert "load_rng_state(training_state_dir)" in inspect.getsource(train_utils.load_training_state)


def test_seams_are_restored(cache: Path) -> None:
    before = lerobot_train.make_train_eval_datasets
    with training.geometry_datasets(GeometryStore.open(cache)):
        assert lerobot_train.make_train_eval_datasets is not before
    assert lerobot_train.make_train_eval_datasets is before
