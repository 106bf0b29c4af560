"""Stage two: LeRobot's own trainer, on items that carry cached geometry.

    options ──► LeRobot's parser ──► comparison of cache and run ──► lerobot_train.train(config)
                                                                       └─ its dataset factory, replaced: LeRobot's
                                                                          datasets wrapped in GeometryDataset

Two smaller seams make a resumed run exact and the logged numbers readable. Nothing else of the trainer is touched:
accelerate, mixed precision, PEFT, checkpoints, wandb, the Hub and evaluation are LeRobot's, and so are the options.
What differs between the cache and the run ends it before the first step. The cache's spec, statistics and fingerprint
go into the policy's configuration, and with it into checkpoints.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import require_intact
from geomcache.errors import DatasetError, UserInputError, one_line
from geomcache.lerobot_options import given, parse_options

POLICY_TYPE = "pi05_geometry"


def train(cache: str | Path, lerobot_args: Sequence[str], *, verify: bool = False) -> None:
    """Train a policy with geometry from a cache.

    Args:
        cache: path of a sealed cache.
        lerobot_args: options of `lerobot-train`, as on its command line.
        verify: read the whole cache first, by the main process, and stop where it is damaged.

    Raises:
        UserInputError: LeRobot does not know an option or refuses its value, or it does not go with a cache.
        CacheError: there is no such cache, it lacks episodes, or it is not of this run's dataset, cameras or policy.
        GeomcacheError: dataset or checkpoint cannot be had, or geometry cannot be read.
    """
    store = GeometryStore.open(cache)  # before LeRobot is imported: a wrong path is told at once
    if verify and os.environ.get("RANK", "0") == "0":
        require_intact(cache)
    config = parse_config(lerobot_args)
    bind(config, store)

    from lerobot.scripts import lerobot_train

    with contextlib.ExitStack() as seams:
        if config.policy.use_geom_prefix:
            seams.enter_context(geometry_datasets(store))
            seams.enter_context(readable_metrics())
        if config.resume:
            seams.enter_context(exact_resume(config))
        lerobot_train.train(config)


def with_defaults(lerobot_args: Sequence[str]) -> list[str]:
    """Options with our defaults, where they leave them open."""
    args = list(lerobot_args)
    if given("config_path", args):  # a configuration file names its policy
        return args
    if not given("policy.type", args) and not given("policy.path", args):
        args.append(f"--policy.type={POLICY_TYPE}")
    if not given("policy.push_to_hub", args) and not given("policy.repo_id", args):
        args.append("--policy.push_to_hub=false")
    return args


def parse_config(lerobot_args: Sequence[str]) -> Any:
    """LeRobot's `TrainPipelineConfig` of these options, parsed and validated by LeRobot.

    Raises:
        UserInputError: LeRobot refuses them; the message is LeRobot's.
        GeomcacheError: the policy's configuration does.
        SystemExit: they ask for LeRobot's help, which is printed.
    """
    from lerobot.configs.train import TrainPipelineConfig

    args = with_defaults(lerobot_args)
    config = parse_options("lerobot-train", TrainPipelineConfig, args, validate=TrainPipelineConfig.validate)
    # The trainer validates again, which would fetch a checkpoint a second time when a run resumes from the Hub.
    config.validate = lambda: None
    return config


def bind(config: Any, store: GeometryStore) -> None:
    """Compare a run's configuration with a cache, and put the cache's identity into the policy's configuration.

    Raises:
        UserInputError: an option does not go with a cache.
        CacheError: cache and run do not fit.
    """
    from lerobot.configs import FeatureType
    from lerobot.envs.utils import env_to_policy_features

    from geomcache.cache import compatibility
    from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
    from geomcache.training import checks

    policy = config.policy
    if not isinstance(policy, PI05GeometryConfig):
        kind = "a reward model" if policy is None else policy.type
        raise UserInputError(
            f"policy: expected {POLICY_TYPE}, got {kind}: leave --policy.type out; a plain Pi0.5 checkpoint goes into"
            " --policy.pretrained_path, not --policy.path"
        )
    if config.job.is_remote:
        raise UserInputError(
            f"job.target: expected a run on this machine, got {config.job.target!r}: the cache is not there; start"
            " `geomcache train` on that machine"
        )
    if not policy.use_geom_prefix:
        return
    if config.dataset.repo_type != "dataset":
        raise UserInputError(f"dataset.repo_type: expected 'dataset', got {config.dataset.repo_type!r}")
    if not config.use_policy_training_preset and policy.geom_lr_scale != 1:
        raise UserInputError(
            f"policy.geom_lr_scale: expected 1 with use_policy_training_preset=false, got {policy.geom_lr_scale:g}:"
            " LeRobot then gives all parameters one learning rate, the adapter too; say so with"
            " --policy.geom_lr_scale=1, or leave the preset on"
        )
    # LeRobot's streaming dataset reads every episode, whichever it is asked for.
    episodes = None if config.dataset.streaming else config.dataset.episodes
    compatibility.require_episodes(store, episodes, config.dataset.root)
    checks.check_image_transforms(config.dataset.image_transforms)
    checks.check_rename_map(store.spec, config.rename_map)
    if config.env is not None and 0 < config.env_eval_freq <= config.steps:
        features = env_to_policy_features(config.env).items()
        sizes = {key: feature.shape[1:] for key, feature in features if feature.type is FeatureType.VISUAL}
        compatibility.compare_environment(store.spec, sizes)
    trained_from = policy.geom_fingerprint
    policy.bind_cache(store.spec, store.statistics, store.fingerprint)
    if config.resume:
        compatibility.compare_fingerprints(trained_from, store.fingerprint)


@contextlib.contextmanager
def geometry_datasets(store: GeometryStore) -> Iterator[None]:
    """While this lasts, LeRobot's trainer makes datasets whose items carry geometry.

    Its main process makes them before the others do, so that a dataset is downloaded once.
    """
    from lerobot.scripts import lerobot_train

    with _replaced(lerobot_train, "make_train_eval_datasets", lambda upstream: _factory(upstream, store)):
        yield


@contextlib.contextmanager
def exact_resume(config: Any) -> Iterator[None]:
    """While this lasts, LeRobot's trainer goes on from a checkpoint with the numbers of an uninterrupted run.

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

    with _replaced(lerobot_train, "cycle", resumed):
        yield


@contextlib.contextmanager
def readable_metrics() -> Iterator[None]:
    """While this lasts, the trainer logs the policy's `geom_` numbers with three digits that count.

    LeRobot's trainer logs what a policy returns beside its loss, with three decimals: the gradient of an adapter that
    learns well would read 0.000.
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

    with _replaced(lerobot_train, "MetricsTracker", with_digits):
        yield


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """A name of a module, replaced by what `make` makes of it: the form of all seams into LeRobot's trainer."""
    upstream = getattr(module, name)
    setattr(module, name, make(upstream))
    try:
        yield
    finally:
        setattr(module, name, upstream)


def _factory(make_datasets: Callable[[Any], tuple[Any, Any]], store: GeometryStore) -> Callable[[Any], tuple[Any, Any]]:
    import httpx

    from geomcache.cache import compatibility
    from geomcache.frames.source import describe_cameras, describe_dataset, open_metadata
    from geomcache.training.dataset import with_geometry

    def make(config: Any) -> tuple[Any, Any]:
        asked = config.dataset
        meta = open_metadata(asked.repo_id, None if asked.root is None else Path(asked.root), asked.revision)
        compatibility.compare_cameras(store.spec, describe_cameras(meta))
        compatibility.compare_datasets(store.dataset, describe_dataset(meta, store.spec.camera_keys))
        try:
            train_dataset, eval_dataset = make_datasets(config)
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise DatasetError(f"dataset {asked.repo_id}: LeRobot cannot open it: {one_line(error)}") from error
        logging.info(f"Geometry from {store.path}: {', '.join(store.spec.outputs)} of {len(store.spec.cameras)} views")
        held_out = None if eval_dataset is None else with_geometry(eval_dataset, store)
        return with_geometry(train_dataset, store), held_out

    return make
