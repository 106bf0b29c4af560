"""Find the dataset that a cache was made from, compare it with the cache, and read its images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.commands import update_command
from geomcache.cache.compatibility import compare_cameras, compare_datasets
from geomcache.cache.store import GeometryStore
from geomcache.frames.compare import Pictures, check_pictures, choose_sample, compare_episodes
from geomcache.frames.reader import TOLERANCE_S, FrameReader
from geomcache.frames.source import FrameDataset, open_dataset
from geomcache.ranges import format_ranges, rows_of


def compare_with_cache(path: Path, dataset: FrameDataset) -> None:
    """Require that all episodes of a dataset are those that the cache at a path was, or is to be, made of.

    A cache of schema version 1 or of other cameras is not compared: its header tells that it does not fit.

    Raises:
        CacheMismatchError: episodes differ; the message names which, and in what.
        CacheFormatError, CacheCorruptError: it cannot be read.
    """
    with GeometryStore.open_by_journal(path) as store:
        if store.episode_identity is not None and store.spec.cameras == dataset.cameras:
            current = dataset.reader.episode_length, dataset.identities
            compare_episodes(store, dataset.spec.repo_id, current, root=dataset.root)


def check_cached_pictures(store: GeometryStore, dataset: FrameDataset, episodes: Sequence[tuple[int, int]]) -> None:
    """Compare a sample of a dataset's pictures with those that the frames of an unfinished cache were made of.

    Args:
        store: the cache, by its journal; its header fits the dataset.
        dataset: its dataset.
        episodes: ranges of the episodes whose files are there.

    Raises:
        CacheMismatchError: pictures differ; the message says which episodes, in what, and names a frame.
        CacheFormatError, CacheCorruptError: the cache cannot be read.
    """
    if store.episode_identity is not None:
        _check_sample(store, dataset, rows_of(tuple(episodes)))


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
        CacheMismatchError: it is not the dataset that the cache was made from, or a sample of pictures differs.
    """
    reader, _ = _open(store, episodes, dataset=dataset, root=root, revision=revision)
    return reader


def check_dataset(path: Path, *, dataset: str | None, root: Path | None, revision: str | None) -> str:
    """Compare a dataset's episodes, and a sample of its pictures, with those that a cache was made of.

    A dataset's name or revision that is None is the cache's.

    Returns:
        What was compared, in a line for the user.

    Raises:
        DatasetError: the dataset cannot be found or read.
        CacheError: the cache cannot be read, or is of another dataset; the message says what differs.
    """
    with GeometryStore.open(path) as store:
        episodes = rows_of(store.episodes())
        if len(episodes) == 0:
            return f"{store.path}: no complete episode, so that no picture was compared"
        reader, compared = _open(store, episodes, dataset=dataset, root=root, revision=revision)
        if store.episode_identity is None:
            return f"{reader.root}: compared by its metadata alone, as a cache of schema version 1 knows no pictures"
        return (
            f"{reader.root}: {len(episodes)} episodes in their places; pictures of {compared} sampled frames are those"
            " that the cache was made of"
        )


def reads_pictures(reader: FrameReader) -> Callable[[int], Pictures]:
    """Return a function that decodes the pictures of a row, in the order of the reader's cameras."""
    return lambda row: [view[0] for view in reader.read(row, row + 1).images]


def _open(
    store: GeometryStore, episodes: NDArray[np.int64], *, dataset: str | None, root: Path | None, revision: str | None
) -> tuple[FrameReader, int]:
    """Open the dataset, and compare it; return its reader, and how many frames' pictures were compared.

    A time stamp may be off by half a frame, since signatures decide whose picture it is.
    """
    opened, _ = open_dataset(
        dataset or store.dataset.repo_id,
        root=root,
        revision=revision if revision or root else store.dataset.revision,
        cameras=store.spec.camera_keys,
        episodes=format_ranges(episodes),
        tolerance_s=TOLERANCE_S if store.episode_identity is None else 0.5 / store.dataset.fps,
    )
    compare_cameras(store.spec, {camera.key: camera for camera in opened.cameras})
    compare_datasets(store.dataset, opened.describe(store.schema_version))
    if store.episode_identity is None:
        return opened.reader, 0
    current = opened.reader.episode_length, opened.identities
    compare_episodes(store, opened.spec.repo_id, current, episodes.tolist(), opened.root)
    return opened.reader, _check_sample(store, opened, episodes)


def _check_sample(store: GeometryStore, dataset: FrameDataset, episodes: NDArray[np.int64]) -> int:
    """Compare a sample of the pictures of these episodes, of those that the cache has."""
    rows = choose_sample(store, episodes.tolist())
    if not len(rows):
        return 0
    command = update_command(store.path, dataset.spec.repo_id, dataset.root)
    return check_pictures(store, reads_pictures(dataset.reader), rows, decoder=dataset.spec.decoder, command=command)
