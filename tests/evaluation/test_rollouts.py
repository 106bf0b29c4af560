"""LeRobot's evaluation with rows: as it goes, killed and resumed, shared; in a small environment of the tests' own."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts import lerobot_eval

from geomcache.evaluation.episodes import EpisodeLog, read_episodes
from geomcache.evaluation.latency import ChunkTimer
from geomcache.evaluation.rollouts import logged_rollouts, noise_seed
from geomcache.simulator.task import TaskFacts
from tests.support.policy import CAMERAS, SIZE, TEXT, make_geometry, make_policy
from tests.support.results import make_identity

TASKS = {"b": (2, 0), "a": (1,)}
STEPS = 6


class Killed(BaseException):
    """Ends a run at any place, as a signal does."""


class World(gym.Env[Any, Any]):
    """Counts its resets and adds the actions up: success depends on both, and so on noise and initial state."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - gymnasium's
    _max_episode_steps = STEPS
    task = task_description = "do it"

    def __init__(self, suite: str, number: int, index: int, n_envs: int, on_step: Callable[[], None]) -> None:
        pictures: dict[str, gym.Space[Any]] = {
            key.rpartition(".")[2]: gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8) for key in CAMERAS
        }
        self.observation_space = gym.spaces.Dict(
            {"pixels": gym.spaces.Dict(pictures), "agent_pos": gym.spaces.Box(-9, 9, (2,), np.float32)}
        )
        self.action_space = gym.spaces.Box(-9, 9, (3,), np.float32)
        self._start, self._stride, self._on_step = hash_of(suite, number) + index, n_envs, on_step

    def _observe(self) -> dict[str, Any]:
        pictures = {name: np.full((SIZE, SIZE, 3), self._start % 256, np.uint8) for name in ("front", "wrist")}
        return {"pixels": pictures, "agent_pos": np.array([self._start % 7, self._sum], np.float32)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._start += self._stride
        self._sum = float(self.np_random.normal())
        return self._observe(), {"is_success": False}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._on_step()
        self._sum += float(np.abs(action).sum()) + self._start % 3
        success = self._sum > 25
        return self._observe(), float(success), success, False, {"is_success": success}


def hash_of(suite: str, number: int) -> int:
    return 10 * number + ord(suite)


def facts(suite: str, number: int) -> TaskFacts:
    return TaskFacts(variant=f"{suite}{number}", base_task=f"base {number}")


def evaluate(
    file: Path, *, episodes: int = 3, batch: int = 1, on_step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """LeRobot's evaluation of a small policy that gets geometry; its totals."""
    policy = make_policy(n_action_steps=2)
    timer = ChunkTimer(policy)

    def add_tokens(observation: dict[str, Any]) -> dict[str, Any]:
        count = len(observation["task"])
        tokens = torch.ones(count, TEXT, dtype=torch.long)
        return {
            **{key: value for key, value in observation.items() if key != "task"},
            **make_geometry(count).to_batch(),
            "observation.language.tokens": tokens,
            "observation.language.attention_mask": tokens.bool(),
        }

    envs = {
        suite: {
            number: gym.vector.SyncVectorEnv(
                [
                    lambda suite=suite, number=number, index=index: World(suite, number, index, batch, on_step)  # type: ignore[misc]
                    for index in range(batch)
                ],
                autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
            )
            for number in numbers
        }
        for suite, numbers in TASKS.items()
    }
    nothing: Any = PolicyProcessorPipeline(steps=[])
    with (
        EpisodeLog(file, make_identity(settings={"batch_size": batch})) as log,
        logged_rollouts(log, facts, [timer]),
        torch.no_grad(),
    ):
        totals: dict[str, Any] = lerobot_eval.eval_policy_all(
            envs=envs,
            policy=policy,
            env_preprocessor=nothing,
            env_postprocessor=nothing,
            preprocessor=add_tokens,
            postprocessor=lambda action: action,
            n_episodes=episodes,
            start_seed=log.identity.seed,
            max_parallel_tasks=1,
        )
    return totals


def without_times(totals: dict[str, Any]) -> dict[str, Any]:
    return {**totals, "overall": {k: v for k, v in totals["overall"].items() if not k.startswith("eval_")}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    file = tmp_path_factory.mktemp("whole") / "episodes.csv"
    totals = evaluate(file)
    return file.read_bytes(), without_times(totals)


def test_every_episode_has_a_row(uninterrupted: tuple[bytes, dict[str, Any]], tmp_path: Path) -> None:
    content, totals = uninterrupted
    (tmp_path / "episodes.csv").write_bytes(content)
    rows = read_episodes(tmp_path / "episodes.csv")
    assert [row.key for row in rows] == [(s, t, e) for s, t in (("a", 1), ("b", 0), ("b", 2)) for e in range(3)]
    assert {row.seed for row in rows} == {1000, 1001, 1002}
    assert {row.encoder_calls for row in rows} == {0}  # geometry came with the batch
    assert len({row.success for row in rows}) == 2  # the environment tells episodes apart
    for row in rows:
        assert (row.steps < STEPS) or not row.success or row.steps == STEPS
        assert row.sum_reward == float(row.success)
    assert totals["overall"]["n_episodes"] == 9
    assert totals["overall"]["pc_success"] == pytest.approx(100 * np.mean([row.success for row in rows]))
    by_task = {(task["task_group"], task["task_id"]): task["metrics"]["successes"] for task in totals["per_task"]}
    assert by_task["b", 2] == [row.success for row in rows if (row.suite, row.task) == ("b", 2)]


def steps_until(count: int) -> Iterator[None]:
    yield from [None] * count
    raise Killed


@pytest.mark.parametrize("steps", [1, 9, 17, 30])
def test_a_killed_run_resumes_to_the_same_file(
    uninterrupted: tuple[bytes, dict[str, Any]], tmp_path: Path, steps: int
) -> None:
    file = tmp_path / "episodes.csv"
    left = steps_until(steps)
    with pytest.raises(Killed):
        evaluate(file, on_step=lambda: next(left))
    before = read_episodes(file)
    assert len(before) < 9
    counted: list[int] = []
    totals = evaluate(file, on_step=lambda: counted.append(1))
    assert file.read_bytes() == uninterrupted[0]
    assert without_times(totals) == uninterrupted[1]
    # Episodes that have a row are not run again.
    assert len(counted) == sum(row.steps for row in read_episodes(file)) - sum(row.steps for row in before)


def test_a_finished_run_runs_nothing(uninterrupted: tuple[bytes, dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "episodes.csv"
    evaluate(file)

    def fail() -> None:
        raise AssertionError("an episode was run again")

    totals = evaluate(file, on_step=fail)
    assert without_times(totals) == uninterrupted[1]
    more = evaluate(file, episodes=4)
    assert more["overall"]["n_episodes"] == 12


def test_several_runs_share_the_work_and_end_with_the_same_file(
    uninterrupted: tuple[bytes, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user of the file claims a task: the run does the others, waits, and then does that one too."""
    monkeypatch.setattr("geomcache.evaluation.rollouts.POLL_S", 0.01)
    file = tmp_path / "episodes.csv"
    with EpisodeLog(file, make_identity(settings={"batch_size": 1})) as other:
        assert other.claim("b", 0)
        ran: list[str] = []
        waiting = threading.Thread(target=lambda: ran.append(str(evaluate(file)["overall"]["n_episodes"])))
        waiting.start()
        while len(read_episodes(file)) < 6:  # all but the task that is claimed
            waiting.join(0.05)
        assert waiting.is_alive()
        assert {(row.suite, row.task) for row in read_episodes(file)} == {("a", 1), ("b", 2)}
        other.release("b", 0)
        waiting.join(60)
    assert ran == ["9"]
    assert file.read_bytes() == uninterrupted[0]


def test_episodes_of_a_batch(tmp_path: Path) -> None:
    """Three episodes in two environments: the fourth of the second batch is not wanted."""
    file = tmp_path / "episodes.csv"
    evaluate(file, batch=2)
    rows = read_episodes(file)
    assert [row.key for row in rows] == [(s, t, e) for s, t in (("a", 1), ("b", 0), ("b", 2)) for e in range(3)]
    whole = file.read_bytes()
    left = steps_until(9)
    (tmp_path / "again").mkdir()
    with pytest.raises(Killed):
        evaluate(tmp_path / "again" / "episodes.csv", batch=2, on_step=lambda: next(left))
    evaluate(tmp_path / "again" / "episodes.csv", batch=2)
    assert (tmp_path / "again" / "episodes.csv").read_bytes() == whole


def test_seeds_of_the_noise_differ_and_stay() -> None:
    seeds = {noise_seed(suite, variant, seed) for suite in "ab" for variant in "cd" for seed in (0, 1)}
    assert len(seeds) == 8
    # sha256 of "a/c/0" begins with these four bytes
    import hashlib

    assert noise_seed("a", "c", 0).to_bytes(4, "big") == hashlib.sha256(b"a/c/0").digest()[:4]
