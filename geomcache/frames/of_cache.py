"""Find the dataset that a cache was made from, compare it with the cache, and read its images."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.compatibility import compare_cameras, compare_datasets
from geomcache.cache.store import GeometryStore
from geomcache.frames.compare import compare_episodes
from geomcache.frames.reader import FrameReader
from geomcache.frames.source import FrameDataset, open_dataset
from geomcache.ranges import format_ranges


def compare_with_cache(path: Path, dataset: FrameDataset) -> None:
    """Require that all episodes of a dataset are those that the cache at a path was, or is to be, made of.

    A cache of schema version 1 or of other cameras is not compared: its header tells that it does not fit.

    Raises:
        CacheMismatchError: episodes differ; the message names which, and in what.
        CacheFormatError, CacheCorruptError: it cannot be read.
    """
    with GeometryStore.open(path) as store:
        if store.episode_identity is not None and store.spec.cameras == dataset.cameras:
            current = dataset.reader.episode_length, dataset.identities
            compare_episodes(store, dataset.spec.repo_id, current, root=dataset.root)


def open_pictures(
    store: GeometryStore,
    episodes: NDArray[np.int64],
    *,
    dataset: str | None,
    root: Path | None,
    revision: str | None,
) -> FrameReader:
    """Return a reader of the images of these episodes (sorted, at least one), whose files are downloaded if need be.

    A dataset's name or revision that is None is the cache's.

    Raises:
        DatasetNotFoundError: there is no such dataset.
        DatasetError: it cannot be read.
        CacheMismatchError: it is not the dataset that the cache was made from.
    """
    opened, _ = open_dataset(
        dataset or store.dataset.repo_id,
        root=root,
        revision=revision if revision or root else store.dataset.revision,
        cameras=store.spec.camera_keys,
        episodes=format_ranges(episodes),
    )
    compare_cameras(store.spec, {camera.key: camera for camera in opened.cameras})
    compare_datasets(store.dataset, opened.describe(store.schema_version))
    if store.episode_identity is not None:
        current = opened.reader.episode_length, opened.identities
        compare_episodes(store, opened.spec.repo_id, current, episodes.tolist(), opened.root)
    return opened.reader
