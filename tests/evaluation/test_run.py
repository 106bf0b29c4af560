"""Evaluation: what it asks LeRobot for, what it refuses before the simulator starts, what it counts; an episode."""

import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.scripts import lerobot_eval
from lerobot.utils.random_utils import set_seed
from numpy.typing import NDArray

from geomcache import waits
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheMismatchError, ModelError, ModelNotFoundError, UserInputError
from geomcache.evaluation.latency import ChunkTime, ChunkTimer
from geomcache.evaluation.rollouts import noise_seed
from geomcache.evaluation.run import (
    SuccessRate,
    evaluate,
    parse_evaluation,
    read_rates,
    watched_policy,
    with_defaults,
)
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.run import extract
from geomcache.geometry import Camera, GeometrySpec
from geomcache.policy.checkpoint import read_config
from geomcache.policy.environment import check_cameras, check_parallel_tasks, find_da3, watched_environment
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy
from geomcache.policy.processor_pi05_geometry import make_pi05_geometry_pre_post_processors
from geomcache.simulator.task import TaskFacts
from tests.support.datasets import MINI, make_dataset, needs_mini
from tests.support.logs import logged_lines
from tests.support.policy import make_batch, make_config, make_plain_policy, make_policy, make_spec, shake
from tests.support.simulator import libero_config, needs_simulator, simulator

__all__ = ["libero_config", "simulator"]

KEYS = ("observation.images.image", "observation.images.image2")
SIZE = 64
ROOT = Path(__file__).parents[2]


def libero_spec(height: int = SIZE, width: int = SIZE, keys: tuple[str, ...] = KEYS) -> GeometrySpec:
    cameras = tuple(Camera(key=key, height=height, width=width) for key in keys)
    return GeometrySpec.from_dict(make_spec().to_dict() | {"cameras": [vars(camera) for camera in cameras]})


def input_features() -> dict[str, PolicyFeature]:
    """Input features of a dataset of LIBERO."""
    pictures = {key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, SIZE, SIZE)) for key in KEYS}
    return {**pictures, "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(8,))}


def save_checkpoint(policy: Any, folder: Path) -> Path:
    """A checkpoint with its processors, as LeRobot's trainer writes one."""
    policy.save_pretrained(folder)
    for processor in make_pi05_geometry_pre_post_processors(policy.config):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a policy whose DA3 nobody has."""
    policy = make_policy(spec=libero_spec(), input_features=input_features())
    return save_checkpoint(policy, tmp_path_factory.mktemp("policy"))


# ---- success rates ----


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_the_interval_is_wilsons(successes: int, episodes: int, low: float, high: float) -> None:
    rate = SuccessRate(name="suite", successes=successes, episodes=episodes)
    assert rate.interval == pytest.approx((low, high), abs=5e-5)


def test_rates_of_tasks_suites_and_all(tmp_path: Path) -> None:
    outcomes = {("a", 0): [True, False], ("a", 3): [True, True], ("b", 1): [False]}
    per_task = [
        {"task_group": suite, "task_id": task, "metrics": {"successes": found}}
        for (suite, task), found in outcomes.items()
    ]
    file = tmp_path / "eval_info.json"
    file.write_text(json.dumps({"per_task": per_task}))
    tasks, suites = read_rates(file, lambda suite, number: TaskFacts(variant="", base_task=""))
    assert [(rate.name, rate.successes, rate.episodes) for rate in tasks] == [
        ("a 0", 1, 2),
        ("a 3", 2, 2),
        ("b 1", 0, 1),
    ]
    assert [(rate.name, rate.successes, rate.episodes) for rate in suites] == [("a", 3, 4), ("b", 0, 1), ("all", 3, 5)]
    assert suites[0].line(5) == "a         3/4     75.0%  [30.1%, 95.4%]"


# ---- options ----


def test_the_simulators_pictures_have_the_caches_size() -> None:
    saved = {"geom_spec": libero_spec(256, 320).to_dict()}
    sizes = ["--env.observation_height=256", "--env.observation_width=320"]
    assert with_defaults("p", [], saved) == ["--policy.path=p", "--env.type=libero", *sizes]
    given = ["--env.type=libero", "--env.observation_height", "360", "--seed=3"]
    assert with_defaults("p", given, saved) == ["--policy.path=p", *given, sizes[1]]
    assert with_defaults("p", ["--env.type=pusht"], saved) == ["--policy.path=p", "--env.type=pusht"]
    assert with_defaults("p", ["--config_path=c.yaml"], saved) == ["--policy.path=p", "--config_path=c.yaml"]
    assert with_defaults("p", [], {"geom_spec": None}) == ["--policy.path=p", "--env.type=libero"]
    with pytest.raises(UserInputError, match="--policy alone"):
        with_defaults("p", ["--policy.path=q"], saved)


def test_lerobots_options_pass_through_and_its_refusals_are_one_line(checkpoint: Path) -> None:
    saved = read_config(str(checkpoint))
    args = ["--env.task=libero_goal", "--env.task_ids=[1,2]", "--policy.n_action_steps=2", "--eval.n_episodes=3"]
    config = parse_evaluation(str(checkpoint), args, saved)
    assert (config.env.task, config.env.task_ids, config.eval.n_episodes) == ("libero_goal", [1, 2], 3)
    assert (config.env.observation_height, config.env.observation_width) == (SIZE, SIZE)
    assert config.policy.n_action_steps == 2
    assert config.policy.geometry_spec == libero_spec()
    assert config.policy.pretrained_path == checkpoint
    for wrong, told in {
        "--eval.episodes=3": "unrecognized arguments: --eval.episodes=3",
        "--env.type=liberro": "liberro",
        "--policy.n_action_steps=99": "n_action_steps",
    }.items():
        with pytest.raises(UserInputError, match=told) as caught:
            parse_evaluation(str(checkpoint), [wrong], saved)
        assert "\n" not in str(caught.value)


# ---- what is refused before the simulator starts ----


def environment(checkpoint: Path, *args: str) -> Any:
    return parse_evaluation(str(checkpoint), args, read_config(str(checkpoint)))


def test_pictures_of_another_size_are_refused_or_logged(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_cameras(libero_spec(), environment(checkpoint), allow_resize=False)
    larger = environment(checkpoint, "--env.observation_height=360", "--env.observation_width=360")
    for allow_resize, option in ((False, True), (None, False)):  # None: training has no such option
        with pytest.raises(CacheMismatchError, match="64x64 .*360x360") as caught:
            check_cameras(libero_spec(), larger, allow_resize=allow_resize)
        assert ("--allow-resize" in str(caught.value)) == option
    caplog.clear()  # LeRobot's lines about the options
    check_cameras(libero_spec(), larger, allow_resize=True)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for value in ("observation.images.image", "360x360", "64x64"):
        assert value in record.getMessage()


def test_a_camera_that_the_simulator_lacks_is_named(checkpoint: Path) -> None:
    names = ("observation.images.front", "observation.images.image2")
    spec = libero_spec(keys=names)
    with pytest.raises(UserInputError, match=r"observation\.images\.front: .*\.image, .*--rename_map"):
        check_cameras(spec, environment(checkpoint), allow_resize=True)
    renamed = environment(checkpoint, f"--rename_map={json.dumps({KEYS[0]: names[0]})}")
    check_cameras(spec, renamed, allow_resize=False)


def test_parallel_tasks_are_refused_where_lerobots_threads_would_share_state(checkpoint: Path) -> None:
    parallel = "--env.max_parallel_tasks=2"
    for options in ([parallel, "--policy.n_action_steps=1"], ["--policy.n_action_steps=2"]):
        check_parallel_tasks(environment(checkpoint, *options))
    for options, named in (
        (["--policy.n_action_steps=2"], r"policy\.n_action_steps=2, got 2"),
        (["--policy.n_action_steps=1", "--policy.use_relative_actions=true"], r"use_relative_actions=True, got 2"),
    ):
        with pytest.raises(UserInputError, match=rf"env\.max_parallel_tasks: expected 1 with .*{named}"):
            evaluate(str(checkpoint), [parallel, *options])


def test_geometry_cannot_be_switched_on_for_a_checkpoint_without_adapter(tmp_path: Path) -> None:
    save_checkpoint(make_policy(use_geom_prefix=False, input_features=input_features()), tmp_path)
    with pytest.raises(UserInputError, match=r"policy\.use_geom_prefix: "):
        evaluate(str(tmp_path), ["--policy.use_geom_prefix=true"])


def test_an_aligned_checkpoint_needs_no_da3_and_no_cameras_of_the_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both policies are of a DA3 that nobody has, and of cameras that this environment lacks."""

    class Reached(Exception):  # noqa: N818
        pass

    def main(config: Any) -> None:
        raise Reached(config.policy.geom_mode)

    monkeypatch.setattr(lerobot_eval, "eval_main", main)
    save_checkpoint(make_policy(geom_mode="align", spec=libero_spec(), input_features=input_features()), tmp_path)
    with caplog.at_level("INFO", logger="geomcache"), pytest.raises(Reached, match="align"):
        evaluate(str(tmp_path), ["--env.type=pusht"])
    assert "DA3 is not needed" in caplog.text
    with pytest.raises(UserInputError, match=KEYS[0]):
        evaluate(str(checkpoint), ["--env.type=pusht"])


def test_a_da3_that_is_not_to_be_had(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"policy p .*nobody/da3.*--policy\.geom_model_id=DIR"):
        find_da3("p", GeometrySpec.from_dict(make_spec().to_dict() | {"model_id": "nobody/da3"}), None)
    with pytest.raises(ModelNotFoundError, match=str(tmp_path)):
        find_da3("p", make_spec(), str(tmp_path / "nothing"))


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"expected config\.json"):
        evaluate(str(tmp_path), [])
    (tmp_path / "config.json").write_text('{"type": "act"}')
    with pytest.raises(ModelError, match="'act'"):
        evaluate(str(tmp_path), [])


# ---- plain Pi0.5 ----


def test_a_plain_checkpoint_is_evaluated_as_plain_and_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    plain = make_plain_policy(monkeypatch)
    plain.save_pretrained(tmp_path)
    saved = read_config(str(tmp_path))
    assert saved["type"] == "pi05"
    config = parse_evaluation(str(tmp_path), ["--policy.n_action_steps=3"], saved)
    assert config.policy.type == "pi05_geometry"
    assert not config.policy.use_geom_prefix
    assert config.policy.n_action_steps == 3
    config.policy.model_size = "small"  # LeRobot knows only the large ones
    policy = PI05GeometryPolicy.from_pretrained(tmp_path, config=config.policy)
    batch = make_batch(geometry=False)
    chunks = []
    for one in (plain, policy):
        torch.manual_seed(5)
        chunks.append(one.predict_action_chunk(batch))
    assert torch.equal(*chunks)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.action_in_proj.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.action_in_proj\.weight"):
        PI05GeometryPolicy.from_pretrained(tmp_path, config=config.policy)


# ---- the times of chunks ----


def test_a_chunk_is_timed_in_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("geomcache.evaluation.latency.time.perf_counter", lambda: float(next(clock)))
    policy = make_policy(num_inference_steps=3, n_action_steps=2)
    plain = make_policy(num_inference_steps=3, n_action_steps=2)
    timer = ChunkTimer(policy)
    batch = make_batch()
    actions = []
    for one in (policy, plain):
        torch.manual_seed(2)
        actions.append(torch.stack([one.select_action(batch) for _ in range(4)]))
    assert torch.equal(*actions)
    # Every reading of the clock is one second later: 2 around the chunk, 2 around the geometry, 2 around each step.
    expected = ChunkTime(total=9.0, geometry=1.0, denoising=3.0, denoising_steps=3)
    assert timer.times == [expected, expected]  # four actions, two of each chunk
    assert expected.prefix == 5.0
    assert timer.encoder_calls == 0  # the batch brought its geometry
    assert timer.lines()[0] == "chunks of actions: 2; calls of the encoder: 0"
    assert [line.split() for line in timer.lines()[3:]] == [
        ["DA3", "1000.0", "1000.0"],
        ["prefix", "5000.0", "5000.0"],
        ["denoising", "3000.0", "3000.0"],
        ["chunk", "9000.0", "9000.0"],
    ]


def test_chunks_of_threads_are_timed_each_by_itself() -> None:
    policy = make_policy(num_inference_steps=3)
    timer = ChunkTimer(policy)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: policy.predict_action_chunk(make_batch()), range(12)))
    assert len(timer.times) == 12
    for chunk in timer.times:
        assert chunk.denoising_steps == 3
        assert 0 < chunk.geometry + chunk.denoising < chunk.total


def test_lerobots_evaluation_makes_policies_that_are_watched() -> None:
    from lerobot.policies import make_policy as upstream

    assert lerobot_eval.make_policy is upstream
    made = make_policy()
    lerobot_eval.make_policy = lambda *args, **kwargs: (made, args, kwargs)[0]
    try:
        with watched_policy(allow_resize=True) as timers:
            assert lerobot_eval.make_policy("config", env_cfg="env") is made
    finally:
        lerobot_eval.make_policy = upstream
    assert made.allow_resize
    made.predict_action_chunk(make_batch())
    assert [len(timer.times) for timer in timers] == [1]


# ---- in the simulator ----


@pytest.fixture(scope="module")
def acting(tmp_path_factory: pytest.TempPathFactory, random_da3_folder: Path) -> Path:
    """A checkpoint of a small policy with random weights, for LIBERO's cameras and actions, and its DA3 there."""
    folder = tmp_path_factory.mktemp("acting")
    make_dataset(folder / "dataset", (3,), dict.fromkeys(KEYS, (SIZE, SIZE)))
    options = ExtractOptions(
        model=str(random_da3_folder),
        dataset="geomcache/test",
        root=folder / "dataset",
        output=folder / "cache.zarr",
        process_res=56,
        num_workers=0,
        device="cpu",
    )
    extract(options)
    config = make_config(
        bound=False,
        input_features=input_features(),
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(7,))},
        max_action_dim=7,
        max_state_dim=8,
        tokenizer_max_length=120,
        normalization_mapping={},
    )
    with GeometryStore.open(folder / "cache.zarr") as store:
        config.bind_cache(store.spec, store.statistics, store.fingerprint)
    torch.manual_seed(0)
    policy = PI05GeometryPolicy(config)
    shake(policy)
    return save_checkpoint(policy, folder / "policy")


EPISODE = ["--env.task=libero_goal", "--env.task_ids=[4]", "--env.episode_length=9", "--policy.n_action_steps=4"]
EPISODE += ["--eval.n_episodes=1", "--eval.batch_size=1", "--seed=7"]


def frames_of(video: Path) -> NDArray[np.uint8]:
    """Decode a video: uint8 [T, H, W, 3]."""
    import av

    with av.open(video) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


@needs_simulator
def test_an_episode_and_the_same_by_stock_lerobot_eval(
    simulator: None, acting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="geomcache")
    monkeypatch.setattr("sys.stdin", None)  # nothing is asked
    found = evaluate(
        str(acting),
        [*EPISODE, f"--output_dir={tmp_path / 'ours'}"],
    )
    assert "encoded once a chunk of 4 actions" in caplog.text
    # Nine steps are chunks at step 0, 4 and 8, and the encoder runs once in each.
    assert len(found.timer.times) == found.timer.encoder_calls == 3
    assert all(chunk.denoising_steps == 2 and chunk.geometry > 0 for chunk in found.timer.times)
    assert [(rate.successes, rate.episodes) for rate in (*found.tasks, *found.suites)] == [(0, 1), (0, 1)]
    assert found.tasks[0].name == "libero_goal 4 put the bowl on top of the cabinet"
    video = frames_of(tmp_path / "ours" / "videos" / "libero_goal_4" / "eval_episode_0.mp4")
    assert video.shape == (9, SIZE, SIZE, 3)
    assert video.std() > 20  # a picture, which changes over time
    assert np.abs(video[0].astype(int) - video[-1]).max() > 40

    again = evaluate(str(acting), [*EPISODE, f"--output_dir={tmp_path / 'again'}"], results=found.results)
    assert (again.tasks, again.timer.times) == (found.tasks, [])  # all has been run: nothing is left to do

    sizes = [f"--env.observation_height={SIZE}", f"--env.observation_width={SIZE}"]
    stock = ["--discover_packages_path=geomcache.policy", f"--policy.path={acting}", "--env.type=libero", *sizes]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *stock, *EPISODE, f"--output_dir={tmp_path / 'stock'}"])
    with found.results.open(newline="") as file:
        (row,) = csv.DictReader(file)
    rollout = lerobot_eval.rollout

    def with_our_noise(*args: Any, **options: Any) -> Any:
        """Stock LeRobot draws the noise of all tasks from one stream; ours can be resumed at any episode."""
        set_seed(noise_seed(row["suite"], row["variant"], int(row["seed"])))
        return rollout(*args, **options)

    monkeypatch.setattr(lerobot_eval, "rollout", with_our_noise)
    lerobot_eval.eval_main()
    infos = [json.loads((tmp_path / name / "eval_info.json").read_text()) for name in ("ours", "stock")]
    outcomes = [{**info["per_task"][0]["metrics"], "video_paths": None} for info in infos]
    assert outcomes[0] == outcomes[1]
    np.testing.assert_array_equal(
        video, frames_of(tmp_path / "stock" / "videos" / "libero_goal_4" / "eval_episode_0.mp4")
    )


@needs_simulator
def test_two_tasks_as_make_does_it(simulator: None, acting: Path, tmp_path: Path) -> None:
    """The script behind `make eval-libero`, an episode of each task, cut off after nine steps."""
    done = subprocess.run(
        ["bash", "pipelines/eval_libero.sh"],
        cwd=ROOT,
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "POLICY": str(acting),
            "SUITE": "libero_object",
            "TASKS": "0,1",
            "N_EPISODES": "1",
            "OUTPUT": str(tmp_path / "eval"),
            "ARGS": "--env.episode_length=9 --policy.n_action_steps=4",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for number, task in enumerate(("pick up the alphabet soup", "pick up the cream cheese")):
        (line,) = [line for line in lines if line.startswith(f"libero_object {number} {task}")]
        assert "0/1" in line
    assert "chunks of actions: 6; calls of the encoder: 6" in lines
    info = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert [(entry["task_id"], entry["metrics"]["successes"]) for entry in info["per_task"]] == [
        (0, [False]),
        (1, [False]),
    ]
    for number in (0, 1):
        video = frames_of(tmp_path / "eval" / "videos" / f"libero_object_{number}" / "eval_episode_0.mp4")
        assert video.shape == (9, SIZE, SIZE, 3)
        assert video.std() > 20


@needs_mini
@needs_simulator
def test_a_live_frame_is_the_first_of_the_episode_recorded_from_its_state(simulator: None) -> None:
    from lerobot.datasets import LeRobotDataset
    from lerobot.envs import make_env, make_env_pre_post_processors, preprocess_observation
    from lerobot.envs.configs import LiberoEnv

    config = LiberoEnv(task="libero_object", task_ids=[0], observation_height=256, observation_width=256)
    env = make_env(config, n_envs=1)["libero_object"][0]
    processor, _ = make_env_pre_post_processors(env_cfg=config, policy_cfg=None)
    live = processor(preprocess_observation(env.reset(seed=[0])[0]))
    env.close()
    recorded = LeRobotDataset("local/mini", root=MINI, episodes=[0], video_backend="pyav")[0]
    torch.testing.assert_close(live["observation.state"][0], recorded["observation.state"], rtol=0, atol=1e-6)

    def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(-10 * torch.log10((a - b).square().mean()))

    for key in KEYS:  # recorded with plainer textures and meshes, and in a lossy video
        same = psnr(live[key][0], recorded[key])
        others = (recorded[key].flip(1), recorded[key].flip(2), recorded[KEYS[key == KEYS[0]]])
        assert same > 20
        for other in others:
            assert psnr(live[key][0], other) < same - 4


def test_an_environment_that_does_not_answer_is_waited_for_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Environment:
        def reset(self, seed: int) -> str:
            return f"reset with {seed}"

        def step(self, action: int) -> int:
            for _ in range(200):
                if lines:
                    break
                time.sleep(0.05)
            return action + 1

    def rollout(env: Environment, policy: str) -> tuple[str, int, str]:
        return env.reset(seed=3), env.step(4), policy

    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.1)
    monkeypatch.setattr(lerobot_eval, "rollout", rollout)
    environment = Environment()
    with logged_lines() as lines, watched_environment():
        assert lerobot_eval.rollout(environment, "policy") == ("reset with 3", 5, "policy")
    assert lines[0].startswith("waiting for a step of the environment")
    assert vars(environment) == {}
    assert lerobot_eval.rollout is rollout
