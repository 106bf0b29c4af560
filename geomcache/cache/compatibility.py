"""Compare a cache with a run: its dataset, cameras, episodes, environment and checkpoint.

Training compares before its first step; resuming and evaluation use the same functions. They take plain values, and
import neither LeRobot nor torch. Each raises at the first difference, with one line that names the field, both values
and what to do.

`PI05GeometryConfig.bind_cache` compares what a policy's adapter was built for: model, views, grid, outputs and target
grid.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from geomcache.cache.commands import extract_command
from geomcache.errors import CacheIncompleteError, CacheMismatchError, UserInputError
from geomcache.geometry import Camera, DatasetSpec, GeometrySpec
from geomcache.ranges import format_ranges

if TYPE_CHECKING:
    from geomcache.cache.store import GeometryStore

# Not `repo_id`: copies of one dataset under two names have the same frames. Nor `decoder`: a run's own decoder makes
# the pictures that the policy sees, and the geometry is computed already.
COMPARED_DATASET_FIELDS = ("frames", "episodes", "fps", "episodes_sha256", "images_sha256")


def compare_datasets(cached: DatasetSpec, run: DatasetSpec) -> None:
    """Require that a run's dataset has the frames that the cache was made of.

    From schema version 2 on, `geomcache.frames.compare` compares them episode by episode; little is left to do here.

    Raises:
        CacheMismatchError: the two differ; `field` is for example ``dataset.frames``.
    """
    fields: tuple[str, ...] = COMPARED_DATASET_FIELDS
    if cached.schema_version >= 2:
        fields = ("fps",)
    elif cached.revision is not None and run.revision is not None:  # a local folder has none
        fields = (*fields, "revision")
    for name in fields:
        cached_value, run_value = getattr(cached, name), getattr(run, name)
        if cached_value != run_value:
            raise CacheMismatchError(
                f"dataset.{name}: expected {cached_value}, as the cache's dataset {cached.repo_id} has, found"
                f" {run_value} in this run's dataset {run.repo_id}: train on the dataset and revision that the cache"
                " was made of, or make a cache of this one",
                f"dataset.{name}",
                cached_value,
                run_value,
            )


def compare_cameras(spec: GeometrySpec, cameras: Mapping[str, Camera]) -> None:
    """Require that a run's dataset has the cache's cameras, with the same picture sizes. It may have more cameras.

    Raises:
        CacheMismatchError: a camera is missing or of another size.
    """
    for camera in spec.cameras:
        if camera.key not in cameras:
            raise CacheMismatchError(
                f"spec.cameras: expected {camera.key}, which the cache has, found {', '.join(cameras) or 'none'} in"
                " this run's dataset: train on the dataset that the cache was made of, or make a cache of this one",
                "spec.cameras",
                camera.key,
                tuple(cameras),
            )
        if cameras[camera.key] != camera:
            advice = "train on the dataset that the cache was made of"
            raise _size_mismatch(camera, cameras[camera.key], "this run's dataset", advice)


def compare_environment(spec: GeometrySpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Require that a simulator's pictures have the sizes of those that the cache was made of.

    Args:
        spec: spec of the cache or the checkpoint.
        sizes: (height, width) in pixels of the environment's pictures, by the key that the policy sees.

    Raises:
        CacheMismatchError: a picture has another size.
    """
    for camera in spec.cameras:
        height, width = sizes.get(camera.key, (camera.height, camera.width))
        rendered = Camera(key=camera.key, height=height, width=width)
        if rendered != camera:
            advice = f"for LIBERO set --env.observation_height={camera.height} --env.observation_width={camera.width}"
            raise _size_mismatch(camera, rendered, "the environment", advice)


def _size_mismatch(cached: Camera, other: Camera, owner: str, advice: str) -> CacheMismatchError:
    cached_size, other_size = f"{cached.height}x{cached.width}", f"{other.height}x{other.width}"
    return CacheMismatchError(
        f"camera {cached.key}: the cache is of {cached_size} pictures, {owner} has {other_size}: {advice}",
        f"spec.cameras.{cached.key}",
        cached_size,
        other_size,
    )


def require_episodes(store: "GeometryStore", episodes: Sequence[int] | None, root: str | None = None) -> None:
    """Require that a cache is sealed and has the episodes of a run.

    An unsealed cache is refused even if it has these episodes: its statistics, with which the adapter standardises, are
    not final.

    Args:
        store: the cache.
        episodes: numbers of the episodes that the run reads; None for all.
        root: folder of a local dataset, for the command in the message.

    Raises:
        UserInputError: the dataset has no such episode.
        CacheIncompleteError: the cache is not sealed, or lacks episodes; the message has the command that adds them.
    """
    total = store.dataset.episodes
    wanted = np.arange(total) if episodes is None else np.unique(np.asarray(episodes, dtype=np.int64))
    if len(wanted) == 0 or wanted[0] < 0 or wanted[-1] >= total:
        raise UserInputError(f"dataset.episodes: expected some of 0 to {total - 1}, got {list(episodes or ())!r:.80}")
    complete = np.zeros(total, dtype=bool)
    for start, stop in store.episodes():
        complete[start:stop] = True
    missing = wanted[~complete[wanted]]
    command = f"`{extract_command(store, missing if len(missing) else wanted, root)}`"
    listed = textwrap.shorten(format_ranges(missing).replace(",", ", "), 80, placeholder=" ...")
    if not store.sealed:
        gaps = f" that lacks episodes {listed}" if len(missing) else ""
        raise CacheIncompleteError(
            f"cache {store.path}: expected a sealed cache, found an interrupted one{gaps}: finish it with {command}"
        )
    if len(missing):
        raise CacheIncompleteError(
            f"cache {store.path}: expected all episodes of this run, lacks {listed}: add them with {command}, or select"
            " others with --dataset.episodes"
        )


def compare_fingerprints(checkpoint: str | None, cache: str) -> None:
    """Require that a run resumes with the cache that it began with.

    Raises:
        CacheMismatchError: the two differ.
    """
    if checkpoint != cache:
        raise CacheMismatchError(
            f"fingerprint: expected {checkpoint or 'no cache'}, with which the checkpoint was trained, found cache"
            f" {cache}: resume with the cache that the run began with, or start a new run with --policy.path",
            "fingerprint",
            cache,
            checkpoint,
        )
