"""What a report shows, gathered in one pass over a cache.

Memory does not grow with the cache: values are counted (`ValueCounts`), frames are read a block at a time, and only a
frame's mean confidences are kept. Of a cache with more frames than `ReportOptions.max_frames`, that many are read,
evenly spaced.

Legend of shapes:  V views   h, w grid   n frames read   E episodes
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheIncompleteError, DatasetNotFoundError
from geomcache.frames.of_cache import open_pictures
from geomcache.frames.reader import FrameReader
from geomcache.geometry import OUTPUTS
from geomcache.look.episode import SCALARS, FrameMaps, block_frames, require_few_views
from geomcache.look.info import describe
from geomcache.look.options import ReportOptions
from geomcache.look.value_counts import ValueCounts
from geomcache.ranges import RowSet
from geomcache.sharing.remote_store import open_store

SAMPLES, OUTLIERS = 6, 12  # frames on the page


@dataclass(frozen=True, kw_only=True)
class ShownFrame:
    """A frame on the page."""

    row: int
    episode: int
    frame: int
    maps: FrameMaps
    pictures: tuple[NDArray[np.uint8], ...] | None  # for each camera [H, W, 3]


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """One camera's view of a frame with low confidence."""

    shown: ShownFrame
    view: int
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page."""

    facts: dict[str, Any]
    """What `info.describe` returns."""
    cameras: tuple[str, ...]
    rows: NDArray[np.int64]  # [n] ascending, those that were read
    segments: NDArray[np.int64]  # [n] number of the gapless stretch of the cache that each is in
    episode_start: NDArray[np.int64]  # [E]
    counts: dict[tuple[int, str], ValueCounts]
    """Values by view and channel: ``ray_dx`` to ``ray_oz``, then the scalar outputs by name."""
    confidence_of: str | None
    """The output behind `confidence`: ray_conf, depth_conf in a cache without ray_conf, or None."""
    confidence: NDArray[np.float64]  # [n, V] mean over the grid; [n, 0] in a cache without any
    limits: dict[str, NDArray[np.float64]]
    """The range that colours span, over all frames read: [2] for each scalar output, [2, 3] for ``direction``."""
    samples: tuple[ShownFrame, ...]
    outliers: tuple[Outlier, ...]
    nbytes: dict[tuple[str, str], int]
    """Bytes of the shards' files by camera and output; of the checksums under ("", "frame_crc32c")."""
    no_pictures: str | None
    """Why the page has no pictures; None if it has."""


def gather(options: ReportOptions) -> Report:
    """Read the cache once. Raises what `report` raises."""
    facts = describe(options.path)
    with open_store(options.path) as store:
        if store.frames_present == 0:
            raise CacheIncompleteError(f"cache {store.path}: expected frames to report on, found none: extract some")
        require_few_views(store)
        rows = choose_rows(store, options.max_frames)
        counts, name, confidence = _count(store, rows)
        chosen = rows[(np.arange(min(SAMPLES, len(rows))) * 2 + 1) * len(rows) // (2 * min(SAMPLES, len(rows)))]
        lowest = lowest_confidence(rows, confidence, math.ceil(store.dataset.fps))
        shown_rows = sorted({*chosen.tolist(), *(row for row, _, _ in lowest)})
        reader, no_pictures = _open_pictures(store, options, shown_rows)
        shown = {row: _show(store, reader, row) for row in shown_rows}
        return Report(
            facts=facts,
            cameras=store.spec.camera_keys,
            rows=rows,
            segments=np.searchsorted(np.array([start for start, _ in store.rows]), rows, side="right"),
            episode_start=store.episode_start,
            counts=counts,
            confidence_of=name,
            confidence=confidence,
            limits=_limits(counts, len(store.spec.cameras)),
            samples=tuple(shown[row] for row in chosen.tolist()),
            outliers=tuple(Outlier(shown=shown[row], view=view, confidence=value) for row, view, value in lowest),
            nbytes=disk_use(store),
            no_pictures=no_pictures,
        )


def choose_rows(store: GeometryStore, most: int) -> NDArray[np.int64]:
    """Return at most so many of the cached rows, evenly spaced, ascending."""
    count = min(most, store.frames_present)
    return RowSet(store.rows).rows_at(np.arange(count) * store.frames_present // count)


def _count(
    store: GeometryStore, rows: NDArray[np.int64]
) -> tuple[dict[tuple[int, str], ValueCounts], str | None, NDArray[np.float64]]:
    """Return the values of each view and channel, the output taken as the confidence, and its means [n, V]."""
    outputs, views = store.spec.outputs, range(len(store.spec.cameras))
    name = next((name for name in ("ray_conf", "depth_conf") if name in outputs), None)
    counts = {(view, channel): ValueCounts() for view in views for channel in _channels(outputs)}
    means = []
    size = block_frames(store)
    for start in range(0, len(rows), size):
        maps = dict(store.batch(rows[start : start + size]).items())
        for view in views:
            for axis, channel in enumerate(OUTPUTS["ray"].channels):
                counts[view, channel].add(maps["ray"][:, view, ..., axis])
            for scalar in SCALARS:
                if scalar in maps:
                    counts[view, scalar].add(maps[scalar][:, view])
        if name is not None:
            means.append(maps[name].mean(axis=(-2, -1), dtype=np.float64))
    return counts, name, np.concatenate(means) if means else np.empty((len(rows), 0))


def _channels(outputs: tuple[str, ...]) -> tuple[str, ...]:
    return (*OUTPUTS["ray"].channels, *(name for name in SCALARS if name in outputs))


def _limits(counts: dict[tuple[int, str], ValueCounts], views: int) -> dict[str, NDArray[np.float64]]:
    pooled: dict[str, NDArray[np.float64]] = {}
    for channel in dict.fromkeys(channel for _, channel in counts):
        together = ValueCounts.merged(counts[view, channel] for view in range(views))
        pooled[channel] = together.limits()
    pooled["direction"] = np.stack([pooled[channel] for channel in OUTPUTS["ray"].channels[:3]], axis=1)
    return pooled


def lowest_confidence(
    rows: NDArray[np.int64], confidence: NDArray[np.float64], apart: int
) -> list[tuple[int, int, float]]:
    """Return (row, view, mean confidence) of the lowest, ascending.

    Rows of one camera are at least `apart` from each other: otherwise one bad second would fill the list.
    """
    lowest: list[tuple[int, int, float]] = []
    order = np.argsort(confidence, axis=None, kind="stable")
    for flat_index in order.tolist():
        if len(lowest) == OUTLIERS:
            break
        position, view = divmod(flat_index, confidence.shape[1])
        row = int(rows[position])
        if all(other != view or abs(near - row) >= apart for near, other, _ in lowest):
            lowest.append((row, view, float(confidence[position, view])))
    return lowest


def disk_use(store: GeometryStore) -> dict[tuple[str, str], int]:
    """Return the bytes of the shards' files by camera and output, and of their checksums."""
    used = ((key.rpartition("/"), nbytes) for key, nbytes in store.array_nbytes.items())
    return {(camera, output): nbytes for (camera, _, output), nbytes in used}


def _open_pictures(
    store: GeometryStore, options: ReportOptions, rows: list[int]
) -> tuple[FrameReader | None, str | None]:
    """Return a reader, or why there is none. A dataset that the user named must be available."""
    if not options.rgb:
        return None, "left out with --no-rgb"
    episodes = np.unique([store.locate(row)[0] for row in rows])
    try:
        reader = open_pictures(store, episodes, dataset=options.dataset, root=options.root, revision=options.revision)
    except DatasetNotFoundError as error:
        if options.root is not None or options.dataset is not None:
            raise
        return None, str(error)
    return reader, None


def _show(store: GeometryStore, reader: FrameReader | None, row: int) -> ShownFrame:
    episode, frame = store.locate(row)
    return ShownFrame(
        row=row,
        episode=episode,
        frame=frame,
        maps={name: values[0] for name, values in store.batch([row]).items()},
        pictures=None if reader is None else tuple(view[0] for view in reader.read(row, row + 1).images),
    )
