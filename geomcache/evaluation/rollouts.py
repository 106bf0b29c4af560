"""LeRobot's evaluation with a row of results for each episode: tasks are claimed, finished ones are not run again.

    eval_policy_all   ours: claims tasks, hands them to LeRobot's; at the end once more, for the totals of all rows
      run_one         ours: a task whose episodes all have rows is answered from them, otherwise LeRobot's
        rollout       ours: seeds the batch of episodes, runs LeRobot's, appends rows

LeRobot draws the noise of all episodes from one stream. Here each batch of episodes has a seed of its own, made from
suite, variant and episode, so that an episode does not depend on those before it: neither on a resume, nor on which
process ran them. Two policies get the same seeds, which makes their comparison tighter.
"""

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from geomcache.evaluation.episodes import Episode, EpisodeLog
from geomcache.evaluation.latency import ChunkTimer
from geomcache.lerobot_options import replaced
from geomcache.simulator.task import TaskFacts

POLL_S = 2.0
WAIT_LINE_S = 60.0  # between lines about tasks that other processes run

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def logged_rollouts(
    log: EpisodeLog, facts: Callable[[str, int], TaskFacts], timers: Sequence[ChunkTimer]
) -> Iterator[None]:
    """While this lasts, LeRobot's evaluation adds rows to `log` and leaves out what has rows.

    Args:
        log: where rows go.
        facts: what a task is, by suite and number.
        timers: of the policies that LeRobot has made, the first is the one that acts.
    """
    from lerobot.scripts import lerobot_eval

    run = _Run(log, facts, timers)
    with (
        replaced(lerobot_eval, "eval_policy_all", run.all_tasks),
        replaced(lerobot_eval, "run_one", run.one_task),
        replaced(lerobot_eval, "rollout", run.episodes),
    ):
        yield


class _NoEnvironment:
    """What stands for the environment of a task that is answered from its rows."""

    def close(self) -> None:
        """Do nothing."""


class _Current(threading.local):
    """The task that a thread runs: LeRobot may evaluate tasks in threads."""

    suite = ""
    task = 0
    episode = 0
    """The first of the next batch."""
    wanted = 0
    """How many the run has for each task."""


class _Run:
    def __init__(self, log: EpisodeLog, facts: Callable[[str, int], TaskFacts], timers: Sequence[ChunkTimer]) -> None:
        self._log, self._facts, self._timers = log, facts, timers
        self._current = _Current()
        self._metrics: dict[tuple[str, int], Mapping[str, Any]] = {}  # of the tasks that this process finished

    def all_tasks(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        """Make `eval_policy_all` of LeRobot's."""

        def eval_policy_all(envs: Mapping[str, Mapping[int, Any]], **options: Any) -> Any:
            wanted, at_once = options["n_episodes"], max(1, options.get("max_parallel_tasks", 1))
            pending = {(suite, task): env for suite, tasks in envs.items() for task, env in tasks.items()}
            waited = time.monotonic()
            while self._leave_out_finished(pending, wanted):
                claimed = self._claim(pending, at_once)
                try:
                    for suite, task in claimed:
                        logger.info("%s %d: %s", suite, task, self._facts(suite, task).variant)
                    if claimed:
                        upstream(envs=_nested({key: pending.pop(key) for key in claimed}), **options)
                finally:
                    for suite, task in claimed:
                        self._log.release(suite, task)
                if not claimed:
                    if time.monotonic() - waited >= WAIT_LINE_S:
                        waited = time.monotonic()
                        logger.info("waiting for %d tasks that other processes run", len(pending))
                    time.sleep(POLL_S)
            self._log.put_in_order()
            finished = {(suite, task): _NoEnvironment() for suite, tasks in envs.items() for task in tasks}
            return upstream(envs=_nested(finished), **options)

        return eval_policy_all

    def one_task(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        """Make `run_one` of LeRobot's."""

        def run_one(suite: str, task: int, env: Any, **options: Any) -> Any:
            wanted, rows = options["n_episodes"], self._log.of_task(suite, task)
            if len(rows) >= wanted:
                return suite, task, self._totals(suite, task, wanted)
            if rows and options.get("videos_dir") is not None:  # LeRobot numbers videos from 0 again
                options["videos_dir"] /= f"resumed_after_{len(rows)}"
            current = self._current
            current.suite, current.task, current.episode, current.wanted = suite, task, 0, wanted
            result = upstream(suite, task, env, **options)
            self._metrics[suite, task] = result[2]
            return result

        return run_one

    def episodes(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        """Make `rollout` of LeRobot's: a batch of episodes, one in each of the task's environments."""

        def rollout(env: Any, policy: Any, *arguments: Any, seeds: list[int], **options: Any) -> Any:
            from lerobot.envs.utils import NEW_ROLLOUT_OPTION
            from lerobot.utils.random_utils import set_seed

            current = self._current
            numbers = range(current.episode, min(current.episode + env.num_envs, current.wanted))
            current.episode += env.num_envs
            rows = self._log.of_task(current.suite, current.task)
            if all(number in rows for number in numbers):
                # An environment counts its resets: the next one must start where it would have started.
                env.reset(seed=seeds, options={NEW_ROLLOUT_OPTION: True})
                return _ended([rows[number].success for number in numbers], env.num_envs)
            facts = self._facts(current.suite, current.task)
            set_seed(noise_seed(current.suite, facts.variant, seeds[0]))
            calls = self._timers[0].encoder_calls_of_thread
            data = upstream(env, policy, *arguments, seeds=seeds, **options)
            calls = self._timers[0].encoder_calls_of_thread - calls
            self._log.append(
                [self._row(facts, data, position, number, calls) for position, number in enumerate(numbers)]
            )
            return data

        return rollout

    def _row(self, facts: TaskFacts, data: Mapping[str, Any], position: int, number: int, calls: int) -> Episode:
        steps = int(data["done"][position].int().argmax()) + 1
        reward = data["reward"][position][:steps]
        return Episode(
            suite=self._current.suite,
            task=self._current.task,
            episode=number,
            seed=self._log.identity.seed + number,
            success=bool(data["success"][position][:steps].any()),
            steps=steps,
            sum_reward=float(reward.sum()),
            max_reward=float(reward.max()),
            encoder_calls=calls,
            **facts.columns(),
            **self._log.identity.columns(),
        )

    def _leave_out_finished(self, pending: dict[tuple[str, int], Any], wanted: int) -> bool:
        """Close the environments of tasks that are complete; return whether others are left."""
        self._log.refresh()
        for key in [key for key in pending if len(self._log.of_task(*key)) >= wanted]:
            pending.pop(key).close()
        return bool(pending)

    def _claim(self, pending: Mapping[tuple[str, int], Any], at_most: int) -> list[tuple[str, int]]:
        claimed: list[tuple[str, int]] = []
        for suite, task in pending:
            if len(claimed) == at_most:
                break
            if self._log.claim(suite, task):
                claimed.append((suite, task))
        return claimed

    def _totals(self, suite: str, task: int, wanted: int) -> dict[str, Any]:
        """Return what LeRobot's `run_one` returns of a task, from its rows; videos are those of this process."""
        rows = list(self._log.of_task(suite, task).values())[:wanted]
        return {
            "predicted_video_paths": [],
            "video_paths": self._metrics.get((suite, task), {}).get("video_paths", []),
            "successes": [row.success for row in rows],
            "sum_rewards": [row.sum_reward for row in rows],
            "max_rewards": [row.max_reward for row in rows],
        }


def noise_seed(suite: str, variant: str, seed: int) -> int:
    """Return the seed of the noise of a batch of episodes, 0 to 2^32 - 1; `seed` is that of its first episode."""
    return int.from_bytes(hashlib.sha256(f"{suite}/{variant}/{seed}".encode()).digest()[:4], "big")


def _nested(tasks: Mapping[tuple[str, int], Any]) -> dict[str, dict[int, Any]]:
    nested: dict[str, dict[int, Any]] = {}
    for (suite, task), env in tasks.items():
        nested.setdefault(suite, {})[task] = env
    return nested


def _ended(successes: Sequence[bool], environments: int) -> dict[str, Any]:
    """Return a rollout of one step, as LeRobot counts it, for episodes whose rows exist."""
    import torch

    success = torch.tensor([*successes, *[False] * (environments - len(successes))])[:, None]
    return {"success": success, "done": torch.ones_like(success), "reward": success.float()}
