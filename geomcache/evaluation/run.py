"""Evaluate a checkpoint in closed loop: LeRobot's evaluation with our policy, LIBERO set up, results in numbers.

    options ──► LeRobot's parser ──► comparison of checkpoint and simulator ──► lerobot_eval.eval_main(config)
                                                                                  └─ its policy factory, replaced:
                                                                                     LeRobot's, watched by ChunkTimer

Rollouts, videos and eval_info.json are LeRobot's. Geometry is encoded by the policy itself, once a chunk of actions.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomcache.errors import UserInputError
from geomcache.evaluation.latency import ChunkTimer, unwrapped
from geomcache.lerobot_options import given, parse_options, replaced

Z_95 = 1.959963984540054  # the standard normal distribution's 97.5 % point
LIBERO = "libero"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SuccessRate:
    """Success of the episodes of a task, of a suite, or of all suites."""

    name: str
    successes: int
    episodes: int

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the 95 % confidence interval of Wilson, "Probable Inference, the Law of Succession" (1927)."""
        n, p = self.episodes, self.successes / self.episodes
        center = p + Z_95**2 / (2 * n)
        half = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
        scale = 1 + Z_95**2 / n
        return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)

    def line(self, width: int) -> str:
        """Return a line for the user, the name padded to `width`."""
        low, high = self.interval
        share = self.successes / self.episodes
        return f"{self.name:<{width}}  {self.successes:>4}/{self.episodes:<4} {share:>6.1%}  [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of an evaluation."""

    tasks: tuple[SuccessRate, ...]
    suites: tuple[SuccessRate, ...]
    output_dir: Path
    """Folder of eval_info.json and, unless they are switched off, videos."""
    timer: ChunkTimer

    def lines(self) -> list[str]:
        """Return a table for the user."""
        rates = (*self.tasks, *self.suites)
        width = max(len(rate.name) for rate in rates)
        return [
            f"{'success':<{width}}  {'episodes':>9} {'rate':>6}  95 % interval (Wilson)",
            *(rate.line(width) for rate in rates),
            *self.timer.lines(),
            f"written: {self.output_dir / 'eval_info.json'}",
        ]


def evaluate(policy: str, lerobot_args: Sequence[str], *, allow_resize: bool = False) -> Evaluation:
    """Evaluate a checkpoint in closed loop. Lines for the user are logged.

    Args:
        policy: a folder or Hub id of a `pi05_geometry` or plain `pi05` checkpoint.
        lerobot_args: options of `lerobot-eval`, as on its command line.
        allow_resize: accept pictures of another size than the policy's cache was made of.

    Raises:
        UserInputError: LeRobot refuses an option, the environment has no such suite, task or camera, or the checkpoint
            has no adapter that geometry could be evaluated with.
        CacheMismatchError: the environment's pictures have another size than the cache's.
        ModelError: the checkpoint, or the DA3 that it was trained with, is not available or does not fit.
        SimulatorError: LIBERO, its assets or a rendering library is missing.
        GeometryError: geometry cannot be made of the environment's pictures.
    """
    from geomcache.policy import environment
    from geomcache.policy.checkpoint import has_adapter, read_config

    saved = read_config(policy)
    config = parse_evaluation(policy, lerobot_args, saved)
    if config.policy.has_tokens and not has_adapter(saved):
        raise UserInputError(
            f"policy.use_geom_prefix: expected false for {policy}, which has no geometry adapter, got true: leave it"
            " out, or train the checkpoint with geometry first"
        )
    environment.check_parallel_tasks(config)
    _log_policy(policy, config.policy, saved)
    if config.policy.has_tokens:
        spec = config.policy.geometry_spec
        environment.check_cameras(spec, config, allow_resize=allow_resize)
        environment.find_da3(policy, spec, config.policy.geom_model_id)
    if config.env.type == LIBERO:
        from geomcache.evaluation import libero

        libero.prepare(config.env.task, config.env.task_ids)

    from lerobot.scripts import lerobot_eval

    with watched_policy(allow_resize=allow_resize) as timers, environment.watched_environment():
        lerobot_eval.eval_main(config)
    tasks, suites = read_rates(config.output_dir / "eval_info.json", config.env.type)
    return Evaluation(tasks=tasks, suites=suites, output_dir=config.output_dir, timer=timers[0])


def parse_evaluation(policy: str, lerobot_args: Sequence[str], saved: Mapping[str, Any]) -> Any:
    """Parse options of `lerobot-eval` to LeRobot's `EvalPipelineConfig`, for a checkpoint with this ``config.json``.

    A plain `pi05` checkpoint gets the configuration of `pi05_geometry` with geometry switched off: the same network,
    and weights that are missing or do not fit are an error instead of random numbers.

    Raises:
        UserInputError: LeRobot refuses an option.
        GeomcacheError: the policy's configuration refuses one.
    """
    from lerobot.configs.eval import EvalPipelineConfig

    config = parse_options("lerobot-eval", EvalPipelineConfig, with_defaults(policy, lerobot_args, saved))
    config.policy = as_geometry_config(config.policy)
    return config


def as_geometry_config(config: Any) -> Any:
    """Return the configuration of a plain `pi05` checkpoint as one of `pi05_geometry` with geometry switched off."""
    from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig

    if isinstance(config, PI05GeometryConfig):
        return config
    plain = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return PI05GeometryConfig(**plain, use_geom_prefix=False)


def with_defaults(policy: str, lerobot_args: Sequence[str], saved: Mapping[str, Any]) -> list[str]:
    """Return the options with the checkpoint's path, and our defaults for what they leave open.

    Raises:
        UserInputError: the checkpoint is named twice.
    """
    from lerobot.configs.parser import parse_arg

    if given("policy.path", lerobot_args):
        raise UserInputError(
            f"policy.path: expected the checkpoint in --policy alone, got {policy} in --policy.path too: leave it out"
        )
    args = [f"--policy.path={policy}", *lerobot_args]
    if given("config_path", args):  # a configuration file names its environment
        return args
    if not given("env.type", args):
        args.append(f"--env.type={LIBERO}")
    sizes = {(camera["height"], camera["width"]) for camera in (saved.get("geom_spec") or {}).get("cameras", ())}
    if parse_arg("env.type", args) == LIBERO and len(sizes) == 1:  # LIBERO has one size for all cameras
        ((height, width),) = sizes
        for name, pixels in (("observation_height", height), ("observation_width", width)):
            if not given(f"env.{name}", args):
                args.append(f"--env.{name}={pixels}")
    return args


@contextlib.contextmanager
def watched_policy(*, allow_resize: bool) -> Iterator[list[ChunkTimer]]:
    """While this lasts, LeRobot's evaluation makes policies that are timed; the list gets their timers.

    `eval_main` makes the policy and keeps it to itself: its factory is the one seam into it.
    """
    from lerobot.scripts import lerobot_eval

    timers: list[ChunkTimer] = []

    def watched(make_policy: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            policy = make_policy(*args, **kwargs)
            unwrapped(policy).allow_resize = allow_resize
            timers.append(ChunkTimer(policy))
            return policy

        return make

    with replaced(lerobot_eval, "make_policy", watched):
        yield timers


def read_rates(file: Path, env_type: str) -> tuple[tuple[SuccessRate, ...], tuple[SuccessRate, ...]]:
    """Read the success rates of tasks, of suites and, of several suites, of all from LeRobot's ``eval_info.json``."""
    tasks: list[SuccessRate] = []
    suites: dict[str, list[bool]] = {}
    for entry in json.loads(file.read_text())["per_task"]:
        suite, number, outcomes = entry["task_group"], entry["task_id"], entry["metrics"]["successes"]
        tasks.append(
            SuccessRate(
                name=f"{suite} {number}{_described(env_type, suite, number)}",
                successes=sum(outcomes),
                episodes=len(outcomes),
            )
        )
        suites.setdefault(suite, []).extend(outcomes)
    if len(suites) > 1:
        suites["all"] = [outcome for outcomes in suites.values() for outcome in outcomes]
    rates = [SuccessRate(name=name, successes=sum(out), episodes=len(out)) for name, out in suites.items()]
    return tuple(tasks), tuple(rates)


def _described(env_type: str, suite: str, number: int) -> str:
    if env_type != LIBERO:
        return ""
    from geomcache.evaluation.libero import task_description

    return f" {task_description(suite, number)}"


def _log_policy(policy: str, config: Any, saved: Mapping[str, Any]) -> None:
    if config.has_tokens:
        model, chunk = config.geometry_spec.model_id, config.n_action_steps
        logger.info("policy %s: geometry of %s, encoded once a chunk of %d actions", policy, model, chunk)
    elif config.is_aligned:
        logger.info("policy %s: aligned with geometry in training, which it acts without: DA3 is not needed", policy)
    elif saved["type"] == "pi05":
        logger.info("policy %s: plain Pi0.5, evaluated as it is: it knows no geometry", policy)
    else:
        logger.info("policy %s: evaluated without geometry, use_geom_prefix is false", policy)
