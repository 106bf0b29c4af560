"""Run LeRobot's own trainer on items that carry cached geometry: stage two.

    options ──► LeRobot's parser ──► comparison of cache and run ──► lerobot_train.train(config)
                                                                       └─ its dataset factory, replaced: LeRobot's
                                                                          datasets wrapped in GeometryDataset

Smaller seams make a resumed run exact and the logged numbers readable, and say what the loader waits for. Nothing else
of the trainer is touched: accelerate, mixed precision, PEFT, checkpoints, wandb, the Hub and evaluation are LeRobot's,
and so are the options. A difference between the cache and the run ends it before the first step. The cache's spec,
statistics and fingerprint go into the policy's configuration, and with it into checkpoints.
"""

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import require_intact
from geomcache.errors import DatasetError, UserInputError, one_line
from geomcache.geometry import DA3
from geomcache.lerobot_options import given, parse_options, replaced, short_ffmpeg_warning
from geomcache.waits import hub_call

if TYPE_CHECKING:
    from geomcache.policy.options import GeometryOptions

POLICY_TYPE = "pi05_geometry"  # of a run that names none

logger = logging.getLogger(__name__)


def train(
    cache: str | Path, lerobot_args: Sequence[str], *, verify: bool = False, store: GeometryStore | None = None
) -> None:
    """Train a policy with geometry from a cache.

    An exception that interrupts the run, such as `KeyboardInterrupt`, gets a note that says from which step the run can
    be resumed, and how.

    Args:
        cache: path or address of a sealed cache, for the commands in messages.
        lerobot_args: options of `lerobot-train`, as on its command line.
        store: the same cache, open; None opens the one at the path.
        verify: read the whole cache first, and stop if it is damaged. The processes of a machine share the work, and
            none waits for another.

    Raises:
        UserInputError: LeRobot does not know an option or refuses its value, or it does not go with a cache.
        CacheError: there is no such cache, it lacks episodes, or it is not of this run's dataset, cameras or policy.
        GeomcacheError: the dataset or checkpoint is not available, or geometry cannot be read.
    """
    store = store or GeometryStore.open(cache)  # before LeRobot is imported: a wrong path is reported at once
    if verify:
        require_intact(cache)
    _refuse_finished_output(cache, lerobot_args)
    config = parse_config(lerobot_args)
    bind(config, store, lerobot_args)

    from lerobot.scripts import lerobot_train

    from geomcache.policy.environment import watched_environment
    from geomcache.training.ahead import fetching_ahead
    from geomcache.training.loading import watched_loader

    with contextlib.ExitStack() as seams:
        seams.enter_context(short_ffmpeg_warning())
        seams.enter_context(geometry_datasets(store if config.policy.use_geom_prefix else None))
        seams.enter_context(fetching_ahead(store if config.policy.use_geom_prefix else None))
        seams.enter_context(watched_loader(lambda: resume_note(cache, Path(config.output_dir))))
        if config.env is not None:
            seams.enter_context(watched_environment())
        if config.policy.use_geom_prefix:
            seams.enter_context(readable_metrics())
        if config.policy.is_aligned:
            seams.enter_context(compared_gradients(config))
        if config.resume:
            seams.enter_context(exact_resume(config))
        try:
            lerobot_train.train(config)
        except BaseException as stop:
            if not isinstance(stop, Exception):
                stop.add_note(resume_note(cache, Path(config.output_dir)))
            raise


def resume_note(cache: str | Path, output: Path) -> str:
    """Return how an interrupted run with this output folder is resumed, and from which step, in one line."""
    last = output / "checkpoints" / "last"
    if not (last / "training_state").is_dir():
        remove = f"remove {output} and " if output.exists() else ""
        return (
            f"no checkpoint was saved yet, there is nothing to resume: {remove}run the same command again to start over"
        )
    config_path = last / "pretrained_model" / "train_config.json"
    command = ["geomcache", "train", "--cache", str(cache), f"--config_path={config_path}", "--resume=true"]
    return f"resume from step {int(last.resolve().name)} with `{shlex.join(command)}`"


def _refuse_finished_output(cache: str | Path, lerobot_args: Sequence[str]) -> None:
    """Refuse a new run into the folder of another that can be resumed; LeRobot does, but does not say how.

    Raises:
        UserInputError: the folder has a checkpoint.
    """
    from lerobot.configs.parser import parse_arg

    output = parse_arg("output_dir", lerobot_args)
    if output is None or given("resume", lerobot_args) or given("config_path", lerobot_args):
        return
    if (Path(output) / "checkpoints" / "last" / "training_state").is_dir():
        raise UserInputError(
            f"output_dir: expected a new folder, found {output} with the checkpoint of a run: choose another, or"
            f" {resume_note(cache, Path(output))}"
        )


def with_defaults(lerobot_args: Sequence[str]) -> list[str]:
    """Return the options with our defaults for what they leave open."""
    args = list(lerobot_args)
    if given("config_path", args):  # a configuration file names its policy
        return args
    if not given("policy.type", args) and not given("policy.path", args):
        args.append(f"--policy.type={POLICY_TYPE}")
    if not given("policy.push_to_hub", args) and not given("policy.repo_id", args):
        args.append("--policy.push_to_hub=false")
    return args


def with_plain_checkpoint(lerobot_args: Sequence[str]) -> list[str]:
    """Return the options with a plain checkpoint's own, where ``--policy.path`` names one.

    LeRobot would make a policy without geometry of it. As ``--policy.pretrained_path`` it gains geometry; the options
    that it was saved with come first, so that those of the command line win. Its cameras and action size come from the
    dataset.

    Raises:
        ModelNotFoundError: there is no such checkpoint.
        ModelError: it is of a policy that geometry cannot be added to.
    """
    import json

    import draccus
    from lerobot.configs import parser

    path = parser.parse_arg("policy.path", lerobot_args)
    if path is None or given("policy.type", lerobot_args):
        return list(lerobot_args)

    from geomcache.policy.checkpoint import RUN_OPTIONS, read_config
    from geomcache.policy.options import SUFFIX, geometry_config_class

    saved = read_config(path, revision=parser.parse_arg("policy.pretrained_revision", lerobot_args))
    if saved["type"].endswith(SUFFIX):
        return list(lerobot_args)
    config_class = geometry_config_class(saved["type"])
    defaults = draccus.encode(config_class(device="cpu"))
    kept = {
        name: value for name, value in saved.items() if name not in RUN_OPTIONS and defaults.get(name, ...) != value
    }
    plain = config_class.plain_name
    logger.info("policy %s: plain %s, with its own options; what geometry adds to it starts fresh", path, plain)
    return [
        f"--policy.type={saved['type']}{SUFFIX}",
        f"--policy.pretrained_path={path}",
        *(f"--policy.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in kept.items()),
        *parser.filter_arg("policy.path", lerobot_args),
    ]


def parse_config(lerobot_args: Sequence[str]) -> Any:
    """Parse and validate options to LeRobot's `TrainPipelineConfig`, by LeRobot.

    Raises:
        UserInputError: LeRobot refuses an option; the message is LeRobot's.
        GeomcacheError: the policy's configuration refuses one, or a checkpoint cannot be read.
        SystemExit: the options ask for LeRobot's help, which is printed.
    """
    from lerobot.configs.train import TrainPipelineConfig

    args = with_defaults(with_plain_checkpoint(lerobot_args))
    config = parse_options("lerobot-train", TrainPipelineConfig, args, validate=TrainPipelineConfig.validate)
    # The trainer validates again, which would fetch a checkpoint a second time when a run resumes from the Hub.
    config.validate = lambda: None
    return config


def bind(config: Any, store: GeometryStore, lerobot_args: Sequence[str] = ()) -> None:
    """Compare a `TrainPipelineConfig`, parsed from `lerobot_args`, with a cache; put the cache's identity into it.

    Raises:
        UserInputError: an option does not go with a cache.
        CacheError: cache and run do not fit.
        ModelError: the run's checkpoint, or the DA3 that its evaluation needs, is not available.
    """
    from geomcache.cache import compatibility
    from geomcache.policy import environment
    from geomcache.policy.checkpoint import adopt_geometry, check_options, read_config, trained_parts
    from geomcache.training import checks

    policy = _our_policy(config)
    checks.check_options(config)
    checkpoint = None
    if policy.pretrained_path is not None:
        checkpoint = read_config(str(policy.pretrained_path), revision=policy.pretrained_revision)
        if not (config.resume or given("policy.path", lerobot_args) or given("config_path", lerobot_args)):
            check_options(policy, checkpoint, str(policy.pretrained_path), lambda name: given(name, lerobot_args))
    evaluates = config.env is not None and 0 < config.env_eval_freq <= config.steps
    if evaluates:
        environment.check_parallel_tasks(config)
    if not policy.use_geom_prefix:
        return
    compatibility.require_episodes(store, config.dataset.episodes, config.dataset.root)
    checks.check_image_transforms(config.dataset.image_transforms)
    trained_from = policy.geom_fingerprint
    if checkpoint is not None and trained_parts(checkpoint) & policy.parts:
        adopt_geometry(policy, checkpoint)
    else:
        policy.forget_geometry()  # of parts that the checkpoint had once
    policy.bind_cache(checks.renamed_spec(store.spec, config), store.statistics, store.fingerprint)
    if evaluates and policy.has_tokens:
        _check_environment(config, policy)
    if config.resume:
        compatibility.compare_fingerprints(trained_from, store.fingerprint)


def _our_policy(config: Any) -> "GeometryOptions":
    """Return the policy's configuration of a run that a cache can be bound to.

    Raises:
        UserInputError: another policy, machine or kind of dataset is asked for, or a rate that LeRobot would ignore.
    """
    from geomcache.policy.checkpoint import PLAIN_TYPES
    from geomcache.policy.options import SUFFIX, GeometryOptions

    policy = config.policy
    if not isinstance(policy, GeometryOptions):
        kind = "a reward model" if policy is None else policy.type
        *ours, last = (f"{plain}{SUFFIX}" for plain in PLAIN_TYPES)
        raise UserInputError(
            f"policy: expected {', '.join(ours)} or {last}, got {kind}: leave --policy.type out; a plain checkpoint"
            " goes into --policy.path, which keeps its options, or --policy.pretrained_path"
        )
    if config.job.is_remote:
        raise UserInputError(
            f"job.target: expected a run on this machine, got {config.job.target!r}: the cache is not on that machine;"
            " start `geomcache train` there"
        )
    if config.dataset.repo_type != "dataset":
        raise UserInputError(f"dataset.repo_type: expected 'dataset', got {config.dataset.repo_type!r}")
    if policy.use_geom_prefix and not config.use_policy_training_preset and policy.geom_lr_scale != 1:
        raise UserInputError(
            f"policy.geom_lr_scale: expected 1 with use_policy_training_preset=false, got {policy.geom_lr_scale:g}:"
            " LeRobot then gives all parameters one learning rate, what geometry adds too; say so with"
            " --policy.geom_lr_scale=1, or leave the preset on"
        )
    return policy


def _check_environment(config: Any, policy: "GeometryOptions") -> None:
    """Check that the policy will be able to act when LeRobot evaluates it, as `geomcache eval` does."""
    from geomcache.policy import environment

    spec = policy.geometry_spec
    assert spec is not None
    environment.check_cameras(spec, config, allow_resize=None)
    environment.check_source(spec, config)
    if spec.source == DA3 and is_main_process():  # the others do not evaluate, and may be on a machine without network
        environment.find_da3(policy.type, spec, policy.geom_model_id)


def is_main_process(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether LeRobot will treat this process as the main one of its run.

    RANK alone tells nothing: a shell of a cluster may export it. Launchers set LOCAL_RANK too, by which accelerate
    knows a process of a distributed run.
    """
    distributed = int(environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in environ
    return not distributed or environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def geometry_datasets(store: GeometryStore | None) -> Iterator[None]:
    """Let LeRobot's trainer check its datasets, and make them of items that carry geometry where there is a cache.

    Its main process makes them before the others do, so that a dataset is downloaded once.
    """
    from lerobot.scripts import lerobot_train

    with replaced(lerobot_train, "make_train_eval_datasets", lambda upstream: _factory(upstream, store)):
        yield


@contextlib.contextmanager
def exact_resume(config: Any) -> Iterator[None]:
    """Let LeRobot's trainer resume from a checkpoint with the numbers of an uninterrupted run.

    LeRobot 0.6.1 restores the random state before its data loader starts, which draws a seed of its own from it: the
    noise of the next steps is other noise. And accelerate's loader counts epochs from 0 again: LeRobot's sampler then
    repeats the order of the first one.
    """
    from lerobot.scripts import lerobot_train
    from lerobot.utils.constants import TRAINING_STATE_DIR
    from lerobot.utils.random_utils import load_rng_state

    def resumed(cycle: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        def batches(loader: Any) -> Iterator[Any]:
            if not config.dataset.streaming:
                batch_sampler = loader.batch_sampler
                # with several processes, accelerate's share of the batches around LeRobot's sampler
                batch_sampler = getattr(batch_sampler, "batch_sampler", batch_sampler)
                loader.iteration = batch_sampler.sampler.state_dict()["epoch"]
            iterator = cycle(loader)
            first = next(iterator)
            load_rng_state(config.checkpoint_path / TRAINING_STATE_DIR)
            yield first
            yield from iterator

        return batches

    with replaced(lerobot_train, "cycle", resumed):
        yield


@contextlib.contextmanager
def readable_metrics() -> Iterator[None]:
    """Let the trainer log the policy's `geom_` numbers with three significant digits.

    LeRobot's trainer logs the numbers that a policy returns next to its loss with three decimals: the gradient of an
    adapter that learns well would read 0.000.
    """
    from lerobot.scripts import lerobot_train

    def with_digits(tracker_class: Any) -> Any:
        class Tracker(tracker_class):  # type: ignore[misc]  # LeRobot is not typed
            def update_metrics(self, values: dict[str, Any]) -> None:
                super().update_metrics(values)
                for name, meter in self.metrics.items():
                    if name.startswith("geom_"):
                        meter.fmt = ":.3g"

        return Tracker

    with replaced(lerobot_train, "MetricsTracker", with_digits):
        yield


@contextlib.contextmanager
def compared_gradients(config: Any) -> Iterator[None]:
    """Let a policy with an alignment loss compare the gradients of both losses in the steps that are logged.

    Under FSDP it does not: the parameters are in pieces then.
    """
    from accelerate.utils import DistributedType
    from lerobot.scripts import lerobot_train

    def asking(update: Callable[..., Any]) -> Callable[..., Any]:
        def update_policy(tracker: Any, policy: Any, *args: Any, accelerator: Any, **kwargs: Any) -> Any:
            own = accelerator.unwrap_model(policy)
            own = own.get_base_model() if hasattr(own, "get_base_model") else own
            is_whole = accelerator.distributed_type != DistributedType.FSDP
            own.measures_gradients = is_whole and config.log_freq > 0 and (tracker.steps + 1) % config.log_freq == 0
            return update(tracker, policy, *args, accelerator=accelerator, **kwargs)

        return update_policy

    with replaced(lerobot_train, "update_policy", asking):
        yield


def _factory(
    make_datasets: Callable[[Any], tuple[Any, Any]], store: GeometryStore | None
) -> Callable[[Any], tuple[Any, Any]]:
    """Return LeRobot's dataset factory with our checks before it and geometry after it."""
    import httpx

    from geomcache.cache import compatibility
    from geomcache.frames.compare import compare_episodes
    from geomcache.frames.source import (
        describe_cameras,
        describe_dataset,
        episode_identities,
        episode_lengths,
        open_metadata,
    )
    from geomcache.training import checks
    from geomcache.training.columns import read_columns_alone
    from geomcache.training.dataset import check_sample, with_geometry
    from geomcache.training.loading import fit_shared_memory

    def make(config: Any) -> tuple[Any, Any]:
        options = config.dataset
        meta = open_metadata(options.repo_id, None if options.root is None else Path(options.root), options.revision)
        if store is not None:
            compatibility.compare_cameras(store.spec, describe_cameras(meta))
            dataset = describe_dataset(meta, store.spec.camera_keys, schema_version=store.schema_version)
            compatibility.compare_datasets(store.dataset, dataset)
            if store.schema_version >= 2:
                current = episode_lengths(meta), episode_identities(meta, store.spec.camera_keys)
                compare_episodes(store, meta.repo_id, current, options.episodes, options.root)
        checks.check_features(meta, config)
        checks.use_colour_cameras(meta, config)
        checks.check_camera_names(meta, config)
        if options.streaming:
            checks.check_streaming(meta, config.tolerance_s)
        try:
            with hub_call(f"dataset {options.repo_id}: waiting until LeRobot has opened it"):
                train_dataset, eval_dataset = make_datasets(config)
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise DatasetError(f"dataset {options.repo_id}: LeRobot cannot open it: {one_line(error)}") from error
        if not options.streaming:
            read_columns_alone(train_dataset)
            if eval_dataset is not None:
                read_columns_alone(eval_dataset)
        if store is None:
            fit_shared_memory(config, train_dataset)
            return train_dataset, eval_dataset
        if store.schema_version >= 2 and not options.streaming:
            check_sample(train_dataset, store)
        elif options.streaming and options.image_transforms.enable:
            logger.info(
                "streaming with image transforms: pictures are not compared with those of the cache, only episodes"
            )
        outputs, views = ", ".join(store.spec.outputs), len(store.spec.cameras)
        logger.info("geometry from %s: %s of %d views", store.path, outputs, views)
        held_out = None if eval_dataset is None else with_geometry(eval_dataset, store)
        with_maps = with_geometry(train_dataset, store)
        fit_shared_memory(config, with_maps)
        return with_maps, held_out

    return make
