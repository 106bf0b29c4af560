"""`geomcache train`: LeRobot's trainer runs on cached geometry, resumes exactly, and refuses what does not fit."""

import dataclasses
import inspect
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import draccus
import numpy as np
import pytest
import torch
from lerobot.common import train_utils
from lerobot.configs import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDatasetMetadata, factory
from lerobot.scripts import lerobot_train
from lerobot.transforms.transforms import ImageTransformConfig, ImageTransformsConfig, make_transform_from_config
from lerobot.utils import utils as lerobot_utils

from geomcache.cache.store import GeometryStore
from geomcache.errors import (
    CacheIncompleteError,
    CacheMismatchError,
    CacheNotFoundError,
    DatasetError,
    DatasetNotFoundError,
    GeomcacheError,
    MissingFrameError,
    ModelNotFoundError,
    UserInputError,
)
from geomcache.geometry import canonical_json
from geomcache.training import checks
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
RAY, VALID = "observation.geometry.ray", "observation.geometry.valid"
FLIP = json.dumps({"x": {"type": "RandomHorizontalFlip"}})


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


def test_an_aligned_run_logs_both_losses_and_in_logged_steps_their_gradients(
    meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path
) -> None:
    """With augmentation that moves pixels, LeRobot's default."""
    augmented = ["--dataset.image_transforms.enable=true", "--dataset.image_transforms.max_num_transforms=6"]
    more = ["--policy.geom_mode=align", "--policy.geom_align_weight=0.25", "--log_freq=2", "--seed=1", *augmented]
    steps = run_training(cache, options(meta, tmp_path / "run", *more, steps=2))
    for step in steps:
        assert step.batch[VALID].shape == (2, 2, 4, 4)
        assert step.batch[VALID].dtype == torch.bool
    for name in ("geom_action_loss", "geom_align_loss", "geom_align_r2"):
        assert name in steps[0].metrics
    assert steps[0].loss == pytest.approx(
        steps[0].metrics["geom_action_loss"] + 0.25 * steps[0].metrics["geom_align_loss"], rel=1e-5
    )
    for name in ("geom_action_grad", "geom_align_grad", "geom_grad_angle"):
        assert name not in steps[0].metrics
        assert steps[1].metrics[name] > 0
    config = json.loads((tmp_path / "run/checkpoints/last/pretrained_model/config.json").read_text())
    assert (config["geom_mode"], config["geom_align_weight"]) == ("align", 0.25)
    assert config["geom_fingerprint"] == GeometryStore.open(cache).fingerprint


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
    """A worker's read fails; the error is the store's, without the worker's traceback."""
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


# LIBERO's cameras have the names and, with these options, the size of this file's dataset.
ENVIRONMENT = ("--env.type=libero", "--env_eval_freq=1", "--env.observation_height=16", "--env.observation_width=16")


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
        (
            ["--dataset.image_transforms.enable=true", f"--dataset.image_transforms.tfs={FLIP}"],
            UserInputError,
            "x (RandomHorizontalFlip)",
        ),
        (["--eval_steps=1"], UserInputError, "eval_steps > 0 requires dataset.eval_split"),
        (["--job.target=a10g-small"], UserInputError, "job.target: expected a run on this machine"),
        (["--dataset.root=/nowhere/pens"], DatasetNotFoundError, "found no meta/info.json"),
        (["--policy.pretrained_path=/nowhere/pi05"], ModelNotFoundError, "/nowhere/pi05"),
        (["--env.type=libero", "--env_eval_freq=1"], CacheMismatchError, "--env.observation_height=16"),
        ([*ENVIRONMENT, "--policy.geom_model_id=/nowhere/da3"], ModelNotFoundError, "/nowhere/da3"),
        ([*ENVIRONMENT, "--env.max_parallel_tasks=2"], UserInputError, "policy.n_action_steps=3, got 2"),
        ([*ENVIRONMENT, "--env.camera_name_mapping={agentview_image: front}"], UserInputError, CAMERAS[0]),
        (["--steps=0"], UserInputError, "steps: expected at least 1, got 0"),
        (["--batch_size=0"], UserInputError, "batch_size: expected at least 1, got 0"),
        (["--num_workers=-1"], UserInputError, "num_workers: expected at least 0, got -1"),
        (
            ["--dataset.streaming=true", "--dataset.episodes=[0,1]"],
            UserInputError,
            "dataset.streaming=true, got [0, 1]",
        ),
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
    with pytest.raises(CacheIncompleteError, match=r"1:3.*`geomcache extract"):
        training.train(unsealed, options(meta, tmp_path / "run"))
    sealed = make_cache(tmp_path / "sealed.zarr", meta, make_spec(meta), episodes=[0, 2])
    with pytest.raises(CacheIncompleteError, match=rf"lacks 1: .*--root {meta.root} .*--episodes 1`"):
        training.train(sealed, options(meta, tmp_path / "run"))


@pytest.mark.usefixtures("no_step")
def test_a_cache_of_another_dataset_is_refused(cache: Path, tmp_path: Path) -> None:
    longer = make_dataset(tmp_path / "longer", (5, 4, 4))
    with pytest.raises(CacheMismatchError, match=r"(order|length): episodes .*frames\)"):
        training.train(cache, options(longer, tmp_path / "run"))
    repainted = make_dataset(tmp_path / "repainted", LENGTHS, seed=1)
    with pytest.raises(CacheMismatchError, match=r"content: episodes 0:3 \(12 frames\)"):
        training.train(cache, options(repainted, tmp_path / "run"))
    other_size = make_dataset(tmp_path / "larger", LENGTHS, size=24)
    with pytest.raises(CacheMismatchError, match="16x16 .*24x24"):
        training.train(cache, options(other_size, tmp_path / "run"))
    one_camera = make_dataset(tmp_path / "one", LENGTHS, cameras=CAMERAS[:1])
    with pytest.raises(CacheMismatchError, match=rf"spec\.cameras: .*{CAMERAS[1]}, .*{CAMERAS[0]}"):
        training.train(cache, options(one_camera, tmp_path / "run"))


@pytest.mark.usefixtures("no_step")
def test_another_policy_is_refused(meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    run = [f"--dataset.repo_id={REPO_ID}", f"--dataset.root={meta.root}", f"--output_dir={tmp_path / 'run'}"]
    with pytest.raises(UserInputError, match=r"policy: .*pi05_geometry, .*pi05\b.*--policy\.type"):
        training.train(cache, [*run, "--policy.type=pi05", "--policy.device=cpu"])
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"type": "pi05", "device": "cpu"}))
    with pytest.raises(UserInputError, match=r"type"):
        training.train(cache, [*run, "--policy.type=pi05_geometry", f"--policy.path={plain}"])
    with pytest.raises(ModelNotFoundError, match=r"nowhere"):
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
    with pytest.raises(CacheMismatchError, match="fingerprint: "):
        training.train(make_cache(tmp_path / "larger.zarr", larger, make_spec(larger)), resume)


def test_a_run_that_is_there_is_not_overwritten(meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="already exists and resume is False"):
        training.train(cache, options(meta, tmp_path))


def without_statistics(meta: LeRobotDatasetMetadata, root: Path, drop: Callable[[str, str], bool]) -> Path:
    """Copy a dataset without the statistics (feature, name) that `drop` names; a feature without any is left out."""
    shutil.copytree(meta.root, root)
    file = root / "meta" / "stats.json"
    stats = {
        feature: {name: value for name, value in of.items() if not drop(feature, name)}
        for feature, of in json.loads(file.read_text()).items()
    }
    file.write_text(json.dumps({feature: of for feature, of in stats.items() if of}))
    return root


class StepReachedError(Exception):
    """A training step was about to be run."""


def edit_dataset(monkeypatch: pytest.MonkeyPatch, command: Sequence[str]) -> None:
    """Run LeRobot's command with these words, and let training stop before its first step from now on."""
    from lerobot.scripts import lerobot_edit_dataset

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*command])
            lerobot_edit_dataset.main()
    finally:
        root.handlers[:], root.level = handlers, level

    def stop(*_: Any, **__: Any) -> None:
        raise StepReachedError

    monkeypatch.setattr(lerobot_train, "update_policy", stop)


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize("geometry", ["true", "false"])
def test_missing_quantiles_are_refused_with_lerobots_remedy(
    meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path, geometry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = ("observation.state", "action")  # the cameras' statistics belong to the identity of the cache's dataset
    root = without_statistics(meta, tmp_path / "pens", lambda key, name: key in low and name.startswith("q"))
    run = [f"--dataset.root={root}", f"--policy.use_geom_prefix={geometry}"]
    with pytest.raises(DatasetError, match=r"q01, q99 .*observation\.state, .*QUANTILES") as caught:
        training.train(cache, options(meta, tmp_path / "run", *run))
    command = shlex.split(str(caught.value).partition("`")[2].partition("`")[0])
    assert command[0] == "lerobot-edit-dataset"
    assert f"--root={root}" in command
    edit_dataset(monkeypatch, command)
    with pytest.raises(StepReachedError):  # nothing is missing any more, and the cache still fits
        training.train(cache, options(meta, tmp_path / "run", *run))


def test_features_and_statistics_are_checked(meta: LeRobotDatasetMetadata, tmp_path: Path) -> None:
    config = training.parse_config(options(meta, tmp_path / "run"))

    def check(features: Sequence[str], stats: dict[str, dict[str, Any]] | None) -> None:
        checks.check_features(SimpleNamespace(repo_id="me/x", features=features, stats=stats), config)

    both = ["observation.state", "action"]
    enough = {key: {"q01": 0, "q99": 1} for key in both}
    check(both, enough)
    with pytest.raises(DatasetError, match=r"observation\.state, .*state, action"):
        check(["state", "action"], enough)
    with pytest.raises(DatasetError, match=r"action, .*observation\.state"):
        check(["observation.state"], enough)
    with pytest.raises(DatasetError, match=r"q01, q99 .*observation\.state.*recompute_stats"):
        check(both, None)
    with pytest.raises(DatasetError, match=r"dataset me/x: .*q99 .*action, .*q01, mean"):
        check(both, enough | {"action": {"q01": 0, "mean": 0}})
    config.policy.normalization_mapping = {"ACTION": "IDENTITY", "STATE": "MEAN_STD", "VISUAL": "IDENTITY"}
    with pytest.raises(DatasetError, match=r"mean, std .*observation\.state, .*MEAN_STD"):
        check(both, enough)
    check(both, {"observation.state": {"mean": 0, "std": 1}})
    config.resume = True  # by the checkpoint's statistics
    check(both, None)
    config.resume, config.rename_map = False, {"state": "observation.state"}
    check(["state", "action"], {"state": {"mean": 0, "std": 1}})


def test_streaming_is_refused_where_lerobot_would_show_other_frames() -> None:
    """The second video file starts at 0 s: LeRobot would look for its first frame, of index 6, at 0.6 s."""
    key = "observation.images.image"

    def check(from_timestamps: list[float], tolerance_s: float = 1e-4) -> None:
        episodes = {"dataset_from_index": [0, 6, 20], f"videos/{key}/from_timestamp": from_timestamps}
        meta = SimpleNamespace(episodes=episodes, fps=10, video_keys=[key])
        checks.check_streaming(meta, tolerance_s)

    check([0.0, 0.6, 2.0])
    check([0.0, 0.601, 2.0], tolerance_s=2e-3)
    with pytest.raises(DatasetError, match=rf"episode 1 of {key} at 0\.600 s .* found it at 0\.000 s \(2 of 3"):
        check([0.0, 0.0, 0.0])
    with pytest.raises(DatasetError, match="episode 1"):
        check([0.0, 0.601, 2.0])


@pytest.mark.parametrize(
    ("kind", "kwargs", "stays"),
    [
        ("Resize", {"size": [8, 12]}, True),
        ("RandomResize", {"min_size": 8, "max_size": 9}, True),
        ("ScaleJitter", {"target_size": [16, 16]}, True),
        ("RandomShortestSize", {"min_size": [8]}, True),
        ("Pad", {"padding": 4}, False),
        ("RandomHorizontalFlip", {"p": 1.0}, False),
        ("RandomVerticalFlip", {"p": 1.0}, False),
    ],
)
def test_transforms_may_resize_and_not_move(kind: str, kwargs: dict[str, Any], stays: bool) -> None:
    """A patch in the corner, a quarter of each side, is there afterwards, a quarter of each side."""
    torch.manual_seed(1)  # some draw a size
    picture = torch.zeros(3, 16, 16)
    picture[:, :4, :4] = 1.0
    config = ImageTransformsConfig(enable=True, tfs={"x": ImageTransformConfig(type=kind, kwargs=kwargs)})
    changed = make_transform_from_config(config.tfs["x"])(picture)
    height, width = changed.shape[1:]
    rows, columns = torch.arange(height) < height / 4, torch.arange(width) < width / 4
    expected = (rows[:, None] & columns).float().expand(3, -1, -1)
    assert ((changed - expected).abs().mean().item() < 0.05) == stays  # edges blur
    if stays:
        checks.check_image_transforms(config)
    else:
        with pytest.raises(UserInputError, match=rf"got x \({kind}\)"):
            checks.check_image_transforms(config)


def test_the_option_that_a_refused_transform_is_told_leaves_it_out(
    meta: LeRobotDatasetMetadata, tmp_path: Path
) -> None:
    enabled = "--dataset.image_transforms.enable=true"
    defaults = training.parse_config(options(meta, tmp_path / "run", enabled)).dataset.image_transforms.tfs
    chosen = {name: dataclasses.asdict(tf) for name, tf in defaults.items()}
    chosen["flip"] = {"weight": 1.0, "type": "RandomHorizontalFlip", "kwargs": {"p": 0.5}}
    given = f"--dataset.image_transforms.tfs={json.dumps(chosen)}"
    config = training.parse_config(options(meta, tmp_path / "run", enabled, given))
    with pytest.raises(UserInputError, match="RandomHorizontalFlip") as caught:
        checks.check_image_transforms(config.dataset.image_transforms)
    (option,) = shlex.split(str(caught.value).partition("leave it out with ")[2])
    config = training.parse_config(options(meta, tmp_path / "run", enabled, option))
    checks.check_image_transforms(config.dataset.image_transforms)
    assert [*config.dataset.image_transforms.tfs] == [*defaults]


# ---- which process, and how a run is resumed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        ({"RANK": "1"}, True),  # a lone process where a shell exports it
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),
        ({"RANK": "1", "WORLD_SIZE": "4"}, True),  # a job's variables, no launcher
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, True),
        ({"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, False),
    ],
)
def test_the_main_process_is_lerobots(environ: dict[str, str], expected: bool) -> None:
    assert training.is_main_process(environ) == expected


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_verifies_first(cache: Path, monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    """A lone process whose shell exports RANK=1 as well; and none waits for another one that reads alone."""
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    verified: list[Path] = []
    monkeypatch.setattr(training, "require_intact", verified.append)
    with pytest.raises(UserInputError, match="nonsense"):
        training.train(cache, ["--nonsense=3"], verify=True)
    assert verified == [cache]


def test_an_interrupted_run_notes_how_it_is_resumed(
    meta: LeRobotDatasetMetadata,
    cache: Path,
    tmp_path: Path,
    run: tuple[Path, list[Step]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command of the note resumes the run from the step that it names."""
    output = tmp_path / "run"
    args = options(meta, output, "--save_freq=2", steps=4)

    def interrupted_at(step: int) -> str:
        seen = iter(range(1, 5))
        update = lerobot_train.update_policy

        def stopping(*args: Any, **kwargs: Any) -> Any:
            if next(seen) == step:
                raise KeyboardInterrupt
            return update(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(lerobot_train, "update_policy", stopping)
            with pytest.raises(KeyboardInterrupt) as caught:
                run_training(cache, args)
        (note,) = caught.value.__notes__
        return note

    early = interrupted_at(1)
    assert "no checkpoint" in early
    assert (f"remove {output} and run the same command again" in early) == output.exists()
    assert "geomcache train" not in early
    shutil.rmtree(output, ignore_errors=True)
    note = interrupted_at(3)
    assert "from step 2 " in note
    with pytest.raises(UserInputError) as again:  # the same command does not resume, and says what does
        training.train(cache, args)
    assert note in str(again.value)
    command = shlex.split(note.partition("`")[2].rstrip("`"))
    assert command[:4] == ["geomcache", "train", "--cache", str(cache)]
    resumed = run_training(cache, command[4:])
    assert [step.loss for step in resumed] == [step.loss for step in run[1][2:]]


# ---- checkpoints to start from ---------------------------------------------------------------------------------------


def test_geometry_off_and_on_again_with_another_cache(
    meta: LeRobotDatasetMetadata, cache: Path, run: tuple[Path, list[Step]], tmp_path: Path
) -> None:
    """A fresh adapter standardises by the cache that it is trained from, not by that of an adapter left behind."""
    trained = run[0] / "last" / "pretrained_model"
    off = [f"--policy.path={trained}", "--policy.use_geom_prefix=false"]
    run_training(cache, [*small_run(meta, tmp_path / "off"), *off])
    last = tmp_path / "off" / "checkpoints" / "last" / "pretrained_model"
    spec = make_spec(meta)
    maps = {
        key: {name: values * 2 + 4 for name, values in of.items()}
        for key, of in row_maps(spec, np.arange(meta.total_frames)).items()
    }
    other = GeometryStore.open(make_cache(tmp_path / "other.zarr", meta, spec, maps=maps))
    for stale in (False, True):  # checkpoints of older versions keep the first cache's spec and statistics
        config_file = last / "config.json"
        saved = json.loads(config_file.read_text())
        assert saved["geom_spec"] is None or stale
        if stale:
            old = json.loads((trained / "config.json").read_text())
            config_file.write_text(json.dumps(saved | {k: old[k] for k in ("geom_spec", "geom_statistics")}))
        again = [*small_run(meta, tmp_path / "again"), f"--policy.path={last}", "--policy.use_geom_prefix=true"]
        config = training.parse_config(again)
        training.bind(config, other, again)
        assert config.policy.geometry_statistics == other.statistics
        assert config.policy.geom_fingerprint == other.fingerprint


def small_run(meta: LeRobotDatasetMetadata, output: Path) -> list[str]:
    """Options of a run that leave the policy's to its checkpoint."""
    return [option for option in options(meta, output, steps=1) if not option.startswith("--policy.")]


def test_weights_of_a_geometry_checkpoint_keep_its_adapters_options(
    meta: LeRobotDatasetMetadata,
    cache: Path,
    run: tuple[Path, list[Step]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained = run[0] / "last" / "pretrained_model"
    store = GeometryStore.open(cache)
    pretrained = [*options(meta, tmp_path / "run"), f"--policy.pretrained_path={trained}"]
    without_grid = [option for option in pretrained if "geom_target_hw" not in option]
    with pytest.raises(UserInputError, match=r"policy\.geom_target_hw: .*\[2, 2\], .*\[14, 14\]"):
        training.bind(training.parse_config(without_grid), store, without_grid)
    changed = [*pretrained, "--policy.num_inference_steps=5"]
    with caplog.at_level("WARNING", logger="geomcache"):
        training.bind(training.parse_config(changed), store, changed)
    (record,) = [record for record in caplog.records if record.name.startswith("geomcache")]
    assert "num_inference_steps=5 (checkpoint: 2)" in record.getMessage()
    assert record.getMessage().count("(checkpoint:") == 1


def test_a_plain_checkpoint_by_path_keeps_its_options_and_gains_geometry(
    meta: LeRobotDatasetMetadata, cache: Path, tmp_path: Path
) -> None:
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    mapping = {"ACTION": "MEAN_STD", "STATE": "MEAN_STD", "VISUAL": "IDENTITY"}
    plain = PI05Config(device="cpu", chunk_size=10, n_action_steps=5, num_inference_steps=3, tags=["a"])
    saved = draccus.encode(plain, PreTrainedConfig) | {"normalization_mapping": mapping}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(saved))
    for form in ([f"--policy.path={tmp_path / 'plain'}"], ["--policy.path", str(tmp_path / "plain")]):
        args = [*small_run(meta, tmp_path / "run"), *form, "--policy.n_action_steps=4", "--policy.device=cpu"]
        args += ["--policy.geom_target_hw=[3,3]"]
        config = training.parse_config(args)
        training.bind(config, GeometryStore.open(cache), args)
        policy = config.policy
        assert (policy.type, policy.use_geom_prefix, policy.geom_target_hw) == ("pi05_geometry", True, (3, 3))
        assert (policy.chunk_size, policy.num_inference_steps, policy.tags) == (10, 3, None)
        assert policy.n_action_steps == 4  # the command line wins
        assert draccus.encode(policy)["normalization_mapping"] == mapping
        assert str(policy.pretrained_path) == str(tmp_path / "plain")
        assert policy.geometry_spec == GeometryStore.open(cache).spec


def test_a_geometry_checkpoint_goes_on_with_other_camera_names(run: tuple[Path, list[Step]], tmp_path: Path) -> None:
    trained = run[0] / "last" / "pretrained_model"
    names = ("observation.images.high", "observation.images.wrist")
    other = make_dataset(tmp_path / "other", (4,), cameras=names)
    cache = make_cache(tmp_path / "other.zarr", other, make_spec(other, cameras=names))
    renamed = json.dumps(dict(zip(names, CAMERAS, strict=True)))
    args = [*small_run(other, tmp_path / "run"), f"--policy.path={trained}"]
    with pytest.raises(CacheMismatchError) as caught:
        training.train(cache, args)
    assert f"--rename_map='{renamed}'" in str(caught.value)
    (step,) = run_training(cache, [*args, f"--rename_map={renamed}"])
    maps = row_maps(make_spec(other, cameras=names), step.batch["index"].numpy())
    assert torch.equal(step.batch[RAY][:, 0], torch.from_numpy(maps[names[0]]["ray"]))
    config = json.loads((tmp_path / "run" / "checkpoints" / "last" / "pretrained_model" / "config.json").read_text())
    assert [camera["key"] for camera in config["geom_spec"]["cameras"]] == list(CAMERAS)
    fresh = [*options(other, tmp_path / "fresh"), f"--policy.pretrained_path={trained}", f"--rename_map={renamed}"]
    with pytest.raises(UserInputError, match="rename_map: expected none"):
        training.train(cache, fresh)


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
    assert {"make_train_eval_datasets", "cycle", "MetricsTracker", "update_policy"} <= set(used)
    (restore,) = {"load_training_state", "resume_before_prepare"} & set(used)  # the second one in LeRobot after 0.6.1
    parameters = list(inspect.signature(lerobot_train.update_policy).parameters)
    assert parameters[:2] == ["train_metrics", "policy"]
    assert "accelerator" in parameters
    assert lerobot_train.make_train_eval_datasets is factory.make_train_eval_datasets
    assert lerobot_train.cycle is lerobot_utils.cycle
    assert list(inspect.signature(factory.make_train_eval_datasets).parameters) == ["cfg"]
    assert list(inspect.signature(lerobot_utils.cycle).parameters) == ["iterable"]
    source = inspect.getsource(inspect.unwrap(lerobot_train.train))
    assert "dl_iter = cycle(dataloader)" in source
    assert "accelerator=accelerator," in source
    assert "is_log_step = cfg.log_freq > 0 and step % cfg.log_freq == 0" in source
    assert source.index("train_tracker, _ = update_policy(") < source.index("train_tracker.step()")
    assert "cfg.validate()" in source
    assert "load_rng_state(training_state_dir)" in inspect.getsource(getattr(train_utils, restore))


def test_seams_are_restored(cache: Path) -> None:
    before = lerobot_train.make_train_eval_datasets
    with training.geometry_datasets(GeometryStore.open(cache)):
        assert lerobot_train.make_train_eval_datasets is not before
    assert lerobot_train.make_train_eval_datasets is before
