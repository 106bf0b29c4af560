"""What can differ between a cache and a run, and the comparison: nothing is assumed to agree.

Training compares before its first step, resuming and evaluation with the same functions. They take plain values and
LeRobot's configuration objects, and import neither LeRobot nor torch. Each raises at the first difference, with one
line that names the field, both values and what to do.

What a policy's adapter was built for (model, views, grid, outputs, target grid) is compared where the cache is bound to
the policy's configuration: `PI05GeometryConfig.bind_cache`.
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

# `repo_id` is a label: copies of one dataset under two names have the same frames. `decoder` is what stage one used;
# a run's own decoder only makes the pictures that the policy sees, the geometry is computed already.
COMPARED_DATASET_FIELDS = ("frames", "episodes", "fps", "episodes_sha256", "images_sha256")


def compare_datasets(cached: DatasetSpec, run: DatasetSpec) -> None:
    """See that a run's dataset has the frames that the cache was made of.

    Raises:
        CacheMismatchError: they differ; `field` is such as ``dataset.frames``.
    """
    fields: tuple[str, ...] = COMPARED_DATASET_FIELDS
    if cached.revision is not None and run.revision is not None:  # a local folder does not tell its revision
        fields = (*fields, "revision")
    for name in fields:
        there, here = getattr(cached, name), getattr(run, name)
        if there != here:
            raise CacheMismatchError(
                f"dataset.{name}: the cache is of {cached.repo_id} with {there}, this run is on {run.repo_id} with"
                f" {here}: train on the dataset and revision that the cache was made of, or extract this one",
                f"dataset.{name}",
                there,
                here,
            )


def compare_cameras(spec: GeometrySpec, cameras: Mapping[str, Camera]) -> None:
    """See that a run's dataset has the cache's cameras in the cache's sizes. It may have more.

    Args:
        spec: the cache's.
        cameras: the dataset's, by key.

    Raises:
        CacheMismatchError: a camera is missing or of another size.
    """
    for camera in spec.cameras:
        if camera.key not in cameras:
            found = ", ".join(cameras) or "none"
            raise CacheMismatchError(
                f"spec.cameras: the cache has {camera.key}, the dataset of this run has {found}: train on the dataset"
                " that the cache was made of, or extract this one",
                "spec.cameras",
                camera.key,
                tuple(cameras),
            )
        found_camera = cameras[camera.key]
        if found_camera != camera:
            raise _size_mismatch(
                camera, found_camera, "the dataset of this run", "train on the dataset that the cache was made of"
            )


def compare_environment(spec: GeometrySpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """See that a simulator's pictures have the sizes of those that the cache was made of.

    Args:
        spec: the cache's or the checkpoint's.
        sizes: (height, width) of the environment's pictures, by the key that the policy sees.

    Raises:
        CacheMismatchError: a picture has another size.
    """
    for camera in spec.cameras:
        height, width = sizes.get(camera.key, (camera.height, camera.width))
        found = Camera(key=camera.key, height=height, width=width)
        if found != camera:
            raise _size_mismatch(
                camera,
                found,
                "the environment",
                f"for LIBERO set --env.observation_height={camera.height} --env.observation_width={camera.width}",
            )


def _size_mismatch(cached: Camera, found: Camera, whose: str, advice: str) -> CacheMismatchError:
    there, here = f"{cached.height}x{cached.width}", f"{found.height}x{found.width}"
    return CacheMismatchError(
        f"camera {cached.key}: the cache is of {there} pictures, {whose} has {here}: {advice}",
        f"spec.cameras.{cached.key}",
        there,
        here,
    )


def require_episodes(store: "GeometryStore", episodes: Sequence[int] | None, root: str | None = None) -> None:
    """See that a cache is finished and has the episodes of a run.

    An unfinished cache is refused even where it has these episodes: its statistics, which the adapter standardises by,
    are not final.

    Args:
        store: the cache.
        episodes: numbers of the episodes that the run reads; all where None.
        root: the dataset's folder, where it is local: part of the command that the message gives.

    Raises:
        UserInputError: the dataset has no such episode.
        CacheIncompleteError: the cache is not sealed, or lacks episodes; the message has the command that adds them.
    """
    total = store.dataset.episodes
    wanted = np.arange(total) if episodes is None else np.unique(np.asarray(episodes, dtype=np.int64))
    if len(wanted) == 0 or wanted[0] < 0 or wanted[-1] >= total:
        raise UserInputError(f"dataset.episodes: expected some of 0 to {total - 1}, got {list(episodes or ())!r:.80}")
    there = np.zeros(total, dtype=bool)
    for start, stop in store.episodes():
        there[start:stop] = True
    missing = wanted[~there[wanted]]
    command = f"`{extract_command(store, missing if len(missing) else wanted, root)}`"
    lacks = textwrap.shorten(format_ranges(missing).replace(",", ", "), 80, placeholder=" ...")
    if not store.sealed:
        lacking = f" that lacks episodes {lacks}" if len(missing) else ""
        raise CacheIncompleteError(
            f"cache {store.path}: expected a finished cache, found an interrupted one{lacking}: finish it with"
            f" {command}"
        )
    if len(missing):
        raise CacheIncompleteError(
            f"cache {store.path}: expected all episodes of this run, lacks {lacks}: add them with"
            f" {command}, or name the others in --dataset.episodes"
        )


def compare_fingerprints(checkpoint: str | None, cache: str) -> None:
    """See that a run resumes from the cache that it began with.

    Raises:
        CacheMismatchError: another cache, or a checkpoint that was trained without one.
    """
    if checkpoint != cache:
        raise CacheMismatchError(
            f"fingerprint: the checkpoint was trained from {checkpoint or 'no cache'}, this cache is {cache}: resume"
            " with the cache that the run began with, or start a new run with --policy.path",
            "fingerprint",
            cache,
            checkpoint,
        )
