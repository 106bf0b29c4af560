"""What evaluation, and training with evaluation, do about an environment.

Before anything is started: can the policy act in it, by its cameras, its DA3, its threads? While it runs: is it waited
for? Configurations are LeRobot's, of either command.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from geomcache.errors import CacheMismatchError, ModelNotFoundError, UserInputError
from geomcache.geometry import DA3, GeometrySpec
from geomcache.lerobot_options import replaced
from geomcache.waits import waiting

logger = logging.getLogger(__name__)


def check_cameras(spec: GeometrySpec, config: Any, *, allow_resize: bool | None) -> None:
    """Check that an environment has the cameras that the policy's cache was made of, in their size.

    Args:
        spec: the policy's spec.
        config: LeRobot's `EvalPipelineConfig` or `TrainPipelineConfig`, with an environment.
        allow_resize: log another size as a warning instead of refusing it; None where the command has no such option.

    Raises:
        UserInputError: a camera is missing.
        CacheMismatchError: pictures have another size.
    """
    from lerobot.envs.utils import env_to_policy_features

    from geomcache.cache.compatibility import compare_environment

    sizes = {
        config.rename_map.get(key, key): feature.shape[1:]
        for key, feature in env_to_policy_features(config.env).items()
        if len(feature.shape) == 3
    }
    missing_keys = [key for key in spec.camera_keys if key not in sizes]
    if missing_keys:
        without = ", or train without evaluation (--env_eval_freq=0)" if allow_resize is None else ""
        raise UserInputError(
            f"camera {missing_keys[0]}: expected in the environment {config.env.type}, it has"
            f" {', '.join(sizes) or 'none'}: the policy acts by {', '.join(spec.camera_keys)}: give the environment's"
            f" cameras these names with --rename_map{without}"
        )
    try:
        compare_environment(spec, sizes)
    except CacheMismatchError as error:
        if allow_resize is None:
            raise
        if not allow_resize:
            message = f"{error}, or accept another size with --allow-resize"
            raise CacheMismatchError(message, error.field, error.cached, error.wanted) from None
        logger.warning(
            "allow-resize: %s has %s pictures, the cache was made of %s: DA3 scales both to %d px, but from other"
            " detail: its geometry is not quite what the policy was trained with, and the success rate not that of the"
            " original size",
            error.field.removeprefix("spec.cameras."),
            error.wanted,
            error.cached,
            spec.process_res,
        )


def check_source(spec: GeometrySpec, config: Any) -> None:
    """Check that an environment gives geometry if, and only if, the policy was trained with an environment's.

    Args:
        spec: the policy's spec.
        config: LeRobot's `EvalPipelineConfig` or `TrainPipelineConfig`, with an environment.

    Raises:
        UserInputError: geometry is missing, of other outputs, on another grid, or of another source.
    """
    given = getattr(config.env, "oracle_outputs", "")
    wanted = "" if spec.source == DA3 else ",".join(spec.outputs)
    if given != wanted:
        advice = (
            "leave it out: the policy encodes pictures" if spec.source == DA3 else f"give --env.oracle_outputs={wanted}"
        )
        if wanted and not hasattr(config.env, "oracle_outputs"):
            advice = "give an environment that has geometry, such as --env.type=libero_geometry"
        raise UserInputError(
            f"env.oracle_outputs: expected {wanted!r} for a policy that was trained with geometry of {spec.source}, got"
            f" {given!r}: {advice}"
        )
    if not wanted:
        return
    views = tuple(config.rename_map.get(key, key) for key in config.env.view_keys())
    if views != spec.camera_keys:
        raise UserInputError(
            f"env.camera_name: expected the views {', '.join(spec.camera_keys)}, in the order of which the policy was"
            f" trained, got {', '.join(views)}"
        )
    if config.env.oracle_grid != spec.grid:
        raise UserInputError(
            f"env.oracle_grid: expected {spec.grid}, which the policy was trained with, got {config.env.oracle_grid}"
        )


def find_da3(policy: str, spec: GeometrySpec, model: str | None) -> None:
    """Find or download the DA3 that a policy with this spec acts with; `model` is the run's `geom_model_id`, if set.

    Raises:
        ModelNotFoundError: the model is not available.
    """
    from geomcache.da3.catalog import find_model

    try:
        find_model(model or spec.model_id, None if model else spec.model_revision)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"policy {policy} cannot act without the DA3 that its cache was made with: {error}; name it with"
            " --policy.geom_model_id=DIR"
        ) from error


def check_parallel_tasks(config: Any) -> None:
    """Refuse parallel tasks where LeRobot keeps state of a task in what the tasks' threads share.

    With `max_parallel_tasks` over 1 LeRobot evaluates tasks in threads with one policy and one pair of processors. The
    policy's action queue and the processor for relative actions would mix the tasks up.

    Raises:
        UserInputError: the policy keeps a queue of actions, or acts by relative actions.
    """
    parallel = config.env.max_parallel_tasks
    if parallel <= 1:
        return
    for name, allowed in (("n_action_steps", 1), ("use_relative_actions", False)):
        value = getattr(config.policy, name)
        if value != allowed:
            raise UserInputError(
                f"env.max_parallel_tasks: expected 1 with policy.{name}={value}, got {parallel}: LeRobot's threads"
                " would take one another's actions; leave it out (several episodes of a task run at once with"
                f" --eval.batch_size), or set --policy.{name}={str(allowed).lower()}"
            )


@contextlib.contextmanager
def watched_environment() -> Iterator[None]:
    """Let LeRobot's rollouts say every 30 s that they wait for a reset or step of the environment."""
    from lerobot.scripts import lerobot_eval

    def watched(rollout: Callable[..., Any]) -> Callable[..., Any]:
        def run(env: Any, *args: Any, **kwargs: Any) -> Any:
            for name in ("reset", "step"):
                setattr(env, name, _waited(getattr(env, name), f"waiting for a {name} of the environment"))
            try:
                return rollout(env, *args, **kwargs)
            finally:
                del env.reset, env.step  # of this object; its class has them

        return run

    with replaced(lerobot_eval, "rollout", watched):
        yield


def _waited(call: Callable[..., Any], what: str) -> Callable[..., Any]:
    def waited(*args: Any, **kwargs: Any) -> Any:
        with waiting(
            f"{what}: its processes are at work, or stuck: end this command and run it again", group="rollout"
        ):
            return call(*args, **kwargs)

    return waited
