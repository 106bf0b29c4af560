"""LeRobot datasets whose items carry the cached geometry of their own frame.

    LeRobot item {observation.images.*, action, index, ...}  +  cache row `index`
        ->  {..., observation.geometry.ray [V, h, w, 6], observation.geometry.ray_conf [V, h, w]}   float16, torch

Geometry is that of the current frame alone, also where actions are a chunk over time (`delta_timestamps`). The new keys
are not features of the dataset's metadata: LeRobot would make policy inputs of them, look for their normalisation
statistics, and take them for states. Its processors pass unknown `observation.*` keys on as they are.

Image transforms that move pixels are applied here instead of by LeRobot, so that the maps move along.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from geomcache.cache.commands import update_command
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheMismatchError, DatasetError, errors_kept_whole, one_line
from geomcache.frames.compare import check_pictures, check_watched, choose_sample, compare_episodes, is_watched
from geomcache.frames.source import episode_identities, episode_lengths, local_root
from geomcache.training.moved_pictures import move_maps, moving_transforms

Item = dict[str, Any]


class _WithGeometry:
    """Base of both forms. Everything that is not geometry is the wrapped dataset's own."""

    def __init__(self, dataset: Any, store: GeometryStore) -> None:
        """Wrap `dataset`. Worker processes open the store's files themselves.

        Image transforms that move pixels are taken over from the dataset.

        Raises:
            CacheMismatchError: the dataset has other episodes than the cache.
        """
        if store.schema_version >= 2:
            meta = dataset.meta
            current = episode_lengths(meta), episode_identities(meta, store.spec.camera_keys)
            compare_episodes(store, meta.repo_id, current, dataset.episodes, local_root(meta))
        elif dataset.meta.total_frames != store.dataset.frames:
            raise CacheMismatchError(
                f"cache {store.path}: expected a dataset of {store.dataset.frames} frames, got {dataset.repo_id} with"
                f" {dataset.meta.total_frames}: use the dataset that the cache was made of",
                "dataset.frames",
                store.dataset.frames,
                dataset.meta.total_frames,
            )
        self._dataset = dataset
        self._store = store
        self._transforms = moving_transforms(dataset.image_transforms)
        if self._transforms is not None:
            _without_transforms(dataset)

    def __getattr__(self, name: str) -> Any:
        # LeRobot's trainer reads meta, episodes, num_frames, hf_dataset and more. Private names stop here: unpickling
        # asks for some before `_dataset` exists.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._dataset, name)

    def _add_geometry(self, items: Sequence[Item], read_stored: Callable[[int], Item] | None) -> list[Item]:
        """Compare the pictures of the watched items, and add to all items the geometry of their rows, in one read.

        `read_stored` returns the item of this number among these with the pictures as they are stored; without it no
        picture is compared.
        """
        rows = np.array([int(item["index"]) for item in items], dtype=np.int64)
        with contextlib.nullcontext() if get_worker_info() is None else errors_kept_whole():
            if read_stored is not None and self._store.schema_version >= 2:
                self._watch(rows, read_stored)
            maps = self._store.batch(rows)
        geometry = {key: torch.from_numpy(array) for key, array in maps.to_batch().items()}
        with_maps = [item | {key: values[i] for key, values in geometry.items()} for i, item in enumerate(items)]
        return with_maps if self._transforms is None else [self._moved(item, list(geometry)) for item in with_maps]

    def _watch(self, rows: NDArray[np.int64], read_stored: Callable[[int], Item]) -> None:
        watched = {int(rows[number]): int(number) for number in np.flatnonzero(is_watched(rows))}

        def read(row: int) -> list[NDArray[np.uint8]]:
            item = read_stored(watched[row])
            return [_as_picture(item[key]) for key in self._store.spec.camera_keys]

        command = update_command(self._store.path, self._dataset.repo_id, local_root(self._dataset.meta))
        check_watched(self._store, read, np.array([*watched], dtype=np.int64), command)

    def _moved(self, item: Item, keys: Sequence[str]) -> Item:
        """Transform an item's pictures, in LeRobot's order, and move its maps along."""
        assert self._transforms is not None
        meta = self._dataset.meta
        moved = {key: self._transforms(item[key]) for key in meta.camera_keys if key not in meta.depth_keys}
        homographies = [moved[key][1] for key in self._store.spec.camera_keys]
        pictures = {key: picture for key, (picture, _) in moved.items()}
        return item | pictures | move_maps({key: item[key] for key in keys}, homographies)


def _without_transforms(dataset: Any) -> None:
    """Let a dataset of LeRobot give its pictures as they are stored."""
    if isinstance(dataset, IterableDataset):
        dataset.image_transforms = None  # type: ignore[attr-defined]  # LeRobot is not typed
    else:
        dataset.set_image_transforms(None)


def check_sample(dataset: Any, store: GeometryStore) -> int:
    """Compare a sample of a dataset's pictures, as the loader decodes them, with those that the cache was made of.

    Args:
        dataset: a `LeRobotDataset`.
        store: a cache of schema version 2.

    Returns:
        How many frames were compared: one of each of at most 500 episodes, in at most 20 s.

    Raises:
        CacheMismatchError: a picture is another one; the message names episode, frame and camera.
    """
    indices = dataset.hf_dataset.data.column("index").to_numpy()  # of each position: some episodes may be left out
    has_video = any(key in dataset.meta.video_keys for key in store.spec.camera_keys)
    decoder = dataset._video_backend if has_video else "image"  # which LeRobot keeps to itself

    def read(row: int) -> list[NDArray[np.uint8]]:
        try:
            item = dataset[int(np.flatnonzero(indices == row)[0])]
        except (OSError, ValueError, RuntimeError) as error:  # LeRobot's FrameTimestampError is a ValueError
            episode, frame = store.locate(row)
            raise DatasetError(
                f"dataset {dataset.repo_id}: episode {episode} frame {frame}: LeRobot cannot decode it"
                f" ({one_line(error)}): if its time stamps are only inexact, pass --tolerance_s; otherwise its video is"
                " damaged or cut off: get it again"
            ) from error
        return [_as_picture(item[key]) for key in store.spec.camera_keys]

    rows = choose_sample(store, dataset.episodes)
    command = update_command(store.path, dataset.repo_id, local_root(dataset.meta))
    with _stored_pictures(dataset):
        return check_pictures(store, read, rows[np.isin(rows, indices)], decoder=decoder, command=command)


@contextlib.contextmanager
def _stored_pictures(dataset: Any) -> Iterator[None]:
    """Let a `LeRobotDataset` return its pictures as they are stored, without image transforms."""
    transforms = dataset.image_transforms
    if transforms is None:
        yield
        return
    dataset.set_image_transforms(None)
    try:
        yield
    finally:
        dataset.set_image_transforms(transforms)


def _as_picture(image: torch.Tensor) -> NDArray[np.uint8]:
    """Return the picture of LeRobot's [3, H, W], uint8 or float32 in 0 to 1; of several over time the last one."""
    current = image if image.ndim == 3 else image[-1]
    if current.dtype != torch.uint8:  # the trainer's datasets return uint8
        current = (current * 255).round().to(torch.uint8)
    picture: NDArray[np.uint8] = current.permute(1, 2, 0).numpy()
    return picture


class GeometryDataset(_WithGeometry, Dataset[Item]):
    """A `LeRobotDataset` with geometry: one read of the cache a batch, where the loader asks by `__getitems__`.

    Raises:
        MissingFrameError: on access to an item whose frame is not in the cache.
    """

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Return the items at these positions, which in a dataset of some episodes are not the frames' indices."""
        items: list[Item] = [self._dataset[position] for position in positions]

        def read_stored(number: int) -> Item:
            if self._dataset.image_transforms is None:
                return items[number]
            with _stored_pictures(self._dataset):
                stored: Item = self._dataset[positions[number]]
            return stored

        return self._add_geometry(items, read_stored)


class StreamingGeometryDataset(_WithGeometry, IterableDataset[Item]):
    """A `StreamingLeRobotDataset` with geometry: one read of the cache an item, in whatever order they come.

    Raises:
        MissingFrameError: when an item comes whose frame is not in the cache.
    """

    def __iter__(self) -> Iterator[Item]:
        for item in self._dataset:
            # An item cannot be read again without its transforms.
            stored = None if self._dataset.image_transforms is not None else partial(_always, item)
            yield self._add_geometry([item], stored)[0]


def _always(item: Item, _number: int) -> Item:
    return item


def with_geometry(dataset: Any, store: GeometryStore) -> GeometryDataset | StreamingGeometryDataset:
    """Wrap a `LeRobotDataset` or a `StreamingLeRobotDataset`.

    Raises:
        CacheMismatchError: the dataset has another number of frames than the cache's.
    """
    kind = StreamingGeometryDataset if isinstance(dataset, IterableDataset) else GeometryDataset
    return kind(dataset, store)
