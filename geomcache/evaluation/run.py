"""Evaluate a checkpoint in closed loop: LeRobot's evaluation with our policy, LIBERO set up, results in numbers.

    options ──► LeRobot's parser ──► comparison of checkpoint and simulator ──► lerobot_eval.eval_main(config)
                                                                                  ├─ its policy factory, replaced:
                                                                                  │  LeRobot's, watched by ChunkTimer
                                                                                  └─ its loops over tasks and episodes,
                                                                                     wrapped: a row for each episode

Rollouts, videos and eval_info.json are LeRobot's. Geometry is encoded by the policy itself, once a chunk of actions, or
comes with the observation.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomcache.errors import UserInputError
from geomcache.evaluation.episodes import EpisodeLog, RunIdentity
from geomcache.evaluation.latency import ChunkTimer, unwrapped
from geomcache.geometry import DA3, ORACLE
from geomcache.lerobot_options import given, parse_options, replaced
from geomcache.simulator.task import TaskFacts

Z_95 = 1.959963984540054  # the standard normal distribution's 97.5 % point
LIBERO = "libero"
VARIED = ("libero_geometry", "libero_plus_variants", "libero_pro")  # ours: environments.py
NO_WORLD = frozenset({"type", "features", "features_map", "max_parallel_tasks", "disable_env_checker", "render_mode"})

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
    results: Path
    """The file with a row for each episode."""
    timer: ChunkTimer

    def lines(self) -> list[str]:
        """Return a table for the user."""
        rates = (*self.tasks, *self.suites)
        width = max(len(rate.name) for rate in rates)
        return [
            f"{'success':<{width}}  {'episodes':>9} {'rate':>6}  95 % interval (Wilson)",
            *(rate.line(width) for rate in rates),
            *self.timer.lines(),
            f"written: {self.output_dir / 'eval_info.json'}, {self.results}",
        ]


def evaluate(
    policy: str, lerobot_args: Sequence[str], *, allow_resize: bool = False, results: Path | None = None
) -> Evaluation:
    """Evaluate a checkpoint in closed loop. Lines for the user are logged.

    Args:
        policy: a folder or Hub id of a checkpoint with geometry, or of a plain one of Pi0.5 or Pi0.
        lerobot_args: options of `lerobot-eval`, as on its command line.
        allow_resize: accept pictures of another size than the policy's cache was made of.
        results: file with a row for each episode. If it exists, its episodes are not run again. None:
            ``episodes.csv`` in LeRobot's output folder.

    Raises:
        UserInputError: LeRobot refuses an option, the environment has no such suite, task or camera, the checkpoint
            has no adapter that geometry could be evaluated with, or `results` has rows of another run.
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
        _check_geometry(policy, config, allow_resize=allow_resize)
    _prepare_simulator(config.env)

    from lerobot.scripts import lerobot_eval

    from geomcache.evaluation.rollouts import logged_rollouts
    from geomcache.simulator.environments import task_facts

    file = config.output_dir / "episodes.csv" if results is None else results
    facts = functools.cache(task_facts(config.env))
    identity = run_identity(policy, config, allow_resize=allow_resize)
    with (
        EpisodeLog(file, identity) as log,
        watched_policy(allow_resize=allow_resize) as timers,
        logged_rollouts(log, facts, timers),
        environment.watched_environment(),
    ):
        # LeRobot makes the folder with its first video, and there is none where other runs have run all episodes.
        config.output_dir.mkdir(parents=True, exist_ok=True)
        try:
            lerobot_eval.eval_main(config)
        except BaseException as stopped:
            stopped.add_note(f"run the same command again with --results {file} to resume")
            raise
    tasks, suites = read_rates(config.output_dir / "eval_info.json", facts)
    return Evaluation(tasks=tasks, suites=suites, output_dir=config.output_dir, results=file, timer=timers[0])


def _check_geometry(policy: str, config: Any, *, allow_resize: bool) -> None:
    """Require that the policy's geometry can be made, or read, of what the environment gives."""
    from geomcache.policy import environment

    spec = config.policy.geometry_spec
    environment.check_cameras(spec, config, allow_resize=allow_resize)
    environment.check_source(spec, config)
    if spec.source == DA3:
        environment.find_da3(policy, spec, config.policy.geom_model_id)


def _prepare_simulator(config: Any) -> None:
    from geomcache.simulator import libero
    from geomcache.simulator.environments import LiberoGeometry

    if config.type == LIBERO:
        libero.prepare(config.task, config.task_ids)
    elif isinstance(config, LiberoGeometry):
        config.prepare()


def run_identity(policy: str, config: Any, *, allow_resize: bool) -> RunIdentity:
    """Return what the rows of an evaluation depend on, of LeRobot's `EvalPipelineConfig`.

    Raises:
        UserInputError: the run has no seed.
        ModelError: the checkpoint has no weights.
    """
    import draccus
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

    from geomcache.policy.checkpoint import LORA_WEIGHTS, RUN_OPTIONS, checkpoint_file
    from geomcache.simulator.environments import CHOICES

    if config.seed is None:
        raise UserInputError("seed: expected a number, by which episodes are told apart, got none: leave --seed out")
    world = {name: value for name, value in draccus.encode(config.env).items() if name not in CHOICES | NO_WORLD}
    options = {name: value for name, value in draccus.encode(config.policy).items() if name not in RUN_OPTIONS}
    del options["geom_model_id"]  # where the weights are; their hash is in the spec
    weights = checkpoint_file(policy, LORA_WEIGHTS if config.policy.use_peft else SAFETENSORS_SINGLE_FILE)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return RunIdentity(
        environment=config.env.type,
        world=_json(world),
        settings=_json(
            {
                "policy": options,
                "batch_size": config.eval.batch_size,
                "rename_map": config.rename_map,
                "allow_resize": allow_resize,
            }
        ),
        policy=policy,
        weights=digest,
        fingerprint=config.policy.geom_fingerprint or "",
        seed=config.seed,
    )


def _json(content: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return data


def parse_evaluation(policy: str, lerobot_args: Sequence[str], saved: Mapping[str, Any]) -> Any:
    """Parse options of `lerobot-eval` to LeRobot's `EvalPipelineConfig`, for a checkpoint with this ``config.json``.

    A plain checkpoint gets the configuration of the policy with geometry, switched off: the same network, and weights
    that are missing or do not fit are an error instead of random numbers.

    Raises:
        UserInputError: LeRobot refuses an option.
        GeomcacheError: the policy's configuration refuses one.
    """
    from lerobot.configs.eval import EvalPipelineConfig

    from geomcache.policy.options import as_geometry_config
    from geomcache.simulator import environments  # registers our types of environments

    assert environments
    config = parse_options("lerobot-eval", EvalPipelineConfig, with_defaults(policy, lerobot_args, saved))
    config.policy = as_geometry_config(config.policy)
    return config


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
    spec = saved.get("geom_spec") or {}
    is_oracle = spec.get("model_name") == ORACLE
    if not given("env.type", args):
        args.append(f"--env.type={'libero_geometry' if is_oracle else LIBERO}")
    kind = parse_arg("env.type", args)
    defaults: dict[str, Any] = {}
    sizes = {(camera["height"], camera["width"]) for camera in spec.get("cameras", ())}
    if kind in (LIBERO, *VARIED) and len(sizes) == 1:  # LIBERO has one size for all cameras
        ((defaults["observation_height"], defaults["observation_width"]),) = sizes
    if kind in VARIED and is_oracle and parse_arg("policy.use_geom_prefix", args) != "false":
        defaults["oracle_outputs"], defaults["oracle_grid"] = ",".join(spec["outputs"]), spec["grid"]
    return [*args, *(f"--env.{name}={value}" for name, value in defaults.items() if not given(f"env.{name}", args))]


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


def read_rates(
    file: Path, facts: Callable[[str, int], TaskFacts]
) -> tuple[tuple[SuccessRate, ...], tuple[SuccessRate, ...]]:
    """Read the success rates of tasks, of suites and, of several suites, of all from LeRobot's ``eval_info.json``.

    `facts` says what a task is, by suite and number.
    """
    tasks: list[SuccessRate] = []
    suites: dict[str, list[bool]] = {}
    for entry in json.loads(file.read_text())["per_task"]:
        suite, number, outcomes = entry["task_group"], entry["task_id"], entry["metrics"]["successes"]
        tasks.append(
            SuccessRate(
                name=f"{suite} {number} {facts(suite, number).description}".rstrip(),
                successes=sum(outcomes),
                episodes=len(outcomes),
            )
        )
        suites.setdefault(suite, []).extend(outcomes)
    if len(suites) > 1:
        suites["all"] = [outcome for outcomes in suites.values() for outcome in outcomes]
    rates = [SuccessRate(name=name, successes=sum(out), episodes=len(out)) for name, out in suites.items()]
    return tuple(tasks), tuple(rates)


def _log_policy(policy: str, config: Any, saved: Mapping[str, Any]) -> None:
    if config.has_tokens and config.geometry_spec.source != DA3:
        logger.info("policy %s: geometry of %s, from the environment", policy, config.geometry_spec.source)
    elif config.has_tokens:
        model, chunk = config.geometry_spec.model_id, config.n_action_steps
        logger.info("policy %s: geometry of %s, encoded once a chunk of %d actions", policy, model, chunk)
    elif config.is_aligned:
        logger.info("policy %s: aligned with geometry in training, which it acts without: DA3 is not needed", policy)
    elif saved["type"] == config.plain_type:
        logger.info("policy %s: plain %s, evaluated as it is: it knows no geometry", policy, config.plain_name)
    else:
        logger.info("policy %s: evaluated without geometry, use_geom_prefix is false", policy)
