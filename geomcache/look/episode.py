"""One episode of a cache, ready to draw: its frames one by one, and what drawing them needs to know of all of them.

Legend of shapes:  V views   h, w grid   n frames of the episode
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.commands import extract_command
from geomcache.cache.store import GeometryStore
from geomcache.errors import GeometryError, MissingFrameError, UserInputError
from geomcache.frames.reader import FrameReader
from geomcache.geometry import FEATURE
from geomcache.look.pinhole import Pinhole, fit_pinhole, mean_origin
from geomcache.look.value_counts import ValueCounts
from geomcache.ranges import format_ranges, rows_of

MAX_VIEWS = 32  # no robot has more cameras, and a header may claim any number
BLOCK_NBYTES = 32 << 20  # of maps in memory at a time
BLOCK_PICTURES = 16  # frames decoded together
SCALARS = ("ray_conf", "depth", "depth_conf")
FEATURE_SHOWN = slice(1, 4)  # numbers of a feature, as red, green and blue: the first is hardly more than their mean

FrameMaps = dict[str, NDArray[np.float16]]  # by output, [V, h, w(, 6)]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of an episode."""

    number: int
    """Within the episode."""
    maps: FrameMaps
    pictures: tuple[NDArray[np.uint8], ...] | None
    """For each camera [H, W, 3]; None without a dataset."""

    @property
    def directions(self) -> NDArray[np.float16]:
        """Directions of the rays, [V, h, w, 3], not normalised."""
        return self.maps["ray"][..., :3]

    def pinhole(self, view: int) -> Pinhole | None:
        """Fit a camera to a view's rays; None where they are no pinhole camera's."""
        confidence = self.maps.get("ray_conf")
        try:
            return fit_pinhole(self.maps["ray"][view], None if confidence is None else confidence[view])
        except GeometryError:
            return None


@dataclass(frozen=True, kw_only=True)
class Episode:
    """An episode that is cached as a whole."""

    store: GeometryStore
    reader: FrameReader | None
    """Reads its pictures; None to leave them out."""
    number: int
    limits: dict[str, NDArray[np.float64]]
    """The range that colours span in all frames: [2] for each of `SCALARS` that is cached, [2, 3] for ``direction``
    and for ``feature`` where it has enough numbers."""
    origins: NDArray[np.float64]  # [n, V, 3] mean origin of the rays, weighted by their confidence
    confidence: NDArray[np.float64] | None  # [n, V] mean ray_conf, where it is cached

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras' keys without LeRobot's common prefix."""
        return tuple(short_key(key) for key in self.store.spec.camera_keys)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Yield frames in order, with one block in memory at a time."""
        first = int(self.store.episode_start[self.number])
        stop = len(self) if stop is None else stop
        size = min(block_frames(self.store), BLOCK_PICTURES)
        for begin in range(first + start, first + stop, size):
            end = min(begin + size, first + stop)
            maps = dict(self.store.batch(range(begin, end)).items())
            images = None if self.reader is None else self.reader.read(begin, end).images
            for position in range(end - begin):
                yield Frame(
                    number=begin - first + position,
                    maps={name: values[position] for name, values in maps.items()},
                    pictures=None if images is None else tuple(views[position] for views in images),
                )


def require_cached(store: GeometryStore, episode: int) -> None:
    """Check that all frames of an episode are in the cache.

    Raises:
        UserInputError: the dataset has no such episode.
        MissingFrameError: the cache lacks the episode, or some of its frames.
    """
    store.index(episode, 0)
    if any(first <= episode < last for first, last in store.episodes()):
        return
    raise MissingFrameError(
        f"{store.path}: expected episode {episode}, found complete episodes"
        f" {format_ranges(rows_of(store.episodes())) or 'none'}: choose one of these, or add it with"
        f" `{extract_command(store, np.array([episode]))}`"
    )


def require_few_views(store: GeometryStore) -> None:
    """Check that the cameras fit into one picture: each costs memory, whatever is behind it.

    Raises:
        UserInputError: the cache has more than `MAX_VIEWS`.
    """
    if len(store.spec.cameras) > MAX_VIEWS:
        raise UserInputError(
            f"{store.path}: expected at most {MAX_VIEWS} cameras to draw, found {len(store.spec.cameras)}: extract a"
            " cache with fewer (--cameras)"
        )


def require_frame(store: GeometryStore, episode: int, frame: int) -> None:
    """Check that an episode has a frame.

    Raises:
        UserInputError: it does not.
    """
    length = int(store.episode_length[episode])
    if not 0 <= frame < length:
        raise UserInputError(f"frame: expected 0 to {length - 1} in episode {episode}, got {frame}")


def survey(store: GeometryStore, number: int, reader: FrameReader | None) -> Episode:
    """Read an episode's geometry once, for what drawing its frames needs to know of all of them.

    Raises:
        UserInputError: the cache claims more than `MAX_VIEWS` cameras.
        CacheError: a frame is missing or damaged.
    """
    require_few_views(store)
    first, length = int(store.episode_start[number]), int(store.episode_length[number])
    scalars = [name for name in SCALARS if name in store.spec.outputs]
    feature = store.spec.feature
    shown = range(FEATURE_SHOWN.stop)[FEATURE_SHOWN] if feature and feature.dim >= FEATURE_SHOWN.stop else ()
    counts = {name: ValueCounts() for name in (*scalars, *"xyz", *(f"{FEATURE}{part}" for part in shown))}
    origins, confidence = [], []
    size = block_frames(store)
    for start in range(first, first + length, size):
        maps = dict(store.batch(range(start, min(start + size, first + length))).items())
        for name in scalars:
            counts[name].add(maps[name])
        for axis, name in enumerate("xyz"):
            counts[name].add(maps["ray"][..., axis])
        for part in shown:
            counts[f"{FEATURE}{part}"].add(maps[FEATURE][..., part])
        origins.append(mean_origin(maps["ray"], maps.get("ray_conf")))
        if "ray_conf" in maps:
            confidence.append(maps["ray_conf"].mean(axis=(-2, -1), dtype=np.float64))
    limits = {name: counted.limits() for name, counted in counts.items()}
    limits["direction"] = np.stack([limits.pop(axis) for axis in "xyz"], axis=1)
    if shown:
        limits[FEATURE] = np.stack([limits.pop(f"{FEATURE}{part}") for part in shown], axis=1)
    return Episode(
        store=store,
        reader=reader,
        number=number,
        limits=limits,
        origins=np.concatenate(origins),
        confidence=np.concatenate(confidence) if confidence else None,
    )


def block_frames(store: GeometryStore) -> int:
    """Return how many frames `BLOCK_NBYTES` hold, at least one."""
    return max(1, BLOCK_NBYTES // store.spec.frame_nbytes)


def short_key(camera: str) -> str:
    """Return a camera's key without LeRobot's common prefix."""
    return camera.removeprefix("observation.images.")
