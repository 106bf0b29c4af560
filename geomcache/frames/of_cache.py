"""The dataset that a cache was made of: found, compared with the cache, and read for its pictures."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.compatibility import compare_cameras, compare_datasets
from geomcache.cache.store import GeometryStore
from geomcache.frames.reader import FrameReader
from geomcache.frames.source import open_dataset
from geomcache.ranges import format_ranges


def open_pictures(
    store: GeometryStore,
    episodes: NDArray[np.int64],
    *,
    dataset: str | None,
    root: Path | None,
    revision: str | None,
) -> FrameReader:
    """Find the pictures of these episodes (sorted, at least one).

    Args:
        store: the cache.
        episodes: whose files are needed; on the Hub, they are fetched.
        dataset: its name; the cache's where None.
        root: its folder, where it is local.
        revision: its branch, tag or commit on the Hub; the cache's where None.

    Raises:
        DatasetNotFoundError: it is not at hand.
        DatasetError: it cannot be read.
        CacheMismatchError: it is not the dataset that the cache was made of.
    """
    found, _ = open_dataset(
        dataset or store.dataset.repo_id,
        root=root,
        revision=revision if revision or root else store.dataset.revision,
        cameras=store.spec.camera_keys,
        episodes=format_ranges(episodes),
    )
    compare_cameras(store.spec, {camera.key: camera for camera in found.cameras})
    compare_datasets(store.dataset, found.spec)
    return found.reader
