"""What a report shows, gathered in one pass over a cache."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.info import describe
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheIncompleteError, DatasetNotFoundError, UserInputError
from geomcache.frames.of_cache import open_pictures
from geomcache.frames.reader import FrameReader
from geomcache.geometry import OUTPUTS
from geomcache.look.drawing import CLIP
from geomcache.look.episode import SCALARS, block_frames
from geomcache.look.output import check_output
from geomcache.look.value_counts import ValueCounts
from geomcache.ranges import RowSet

SAMPLES, OUTLIERS = 6, 12


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What the page is of, and where it goes."""

    path: Path
    """The cache."""
    output: Path
    """An .html file."""
    dataset: str | None = None
    """The dataset's name; the cache's where None."""
    root: Path | None = None
    """The dataset's folder, where it is local."""
    revision: str | None = None
    """The dataset's branch, tag or commit on the Hub; the cache's where None."""
    rgb: bool = True
    """Whether to show the dataset's pictures, where it is at hand."""
    max_frames: int = 20_000
    """Of a cache that has more, so many are looked at."""

    def __post_init__(self) -> None:
        check_output(self.output, (".html",))
        if self.max_frames < 1:
            raise UserInputError(f"max-frames: expected at least 1, got {self.max_frames}")
        if not self.rgb:
            for name in ("dataset", "root", "revision"):
                if getattr(self, name) is not None:
                    raise UserInputError(f"--{name}: expected none with --no-rgb, got one: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class ShownFrame:
    """A frame on the page."""

    row: int
    episode: int
    frame: int
    maps: dict[str, NDArray[np.float16]]  # by output, [V, h, w(, 6)]
    pictures: tuple[NDArray[np.uint8], ...] | None  # for each camera [H, W, 3]


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """One camera's view of a frame, whose confidence is low."""

    shown: ShownFrame
    view: int
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is on the page."""

    facts: dict[str, Any]
    """As `info.describe` gives them."""
    cameras: tuple[str, ...]
    rows: NDArray[np.int64]  # [n] ascending, those that were looked at
    segments: NDArray[np.int64]  # [n] which gapless stretch of the cache each is of
    episode_start: NDArray[np.int64]  # [E]
    counts: dict[tuple[int, str], ValueCounts]
    """By view and channel: ``ray_dx`` to ``ray_oz``, then the scalar outputs by name."""
    confidence_of: str | None
    """The output that `confidence` is of: ray_conf, depth_conf where that alone is cached, or None."""
    confidence: NDArray[np.float64]  # [n, V] mean over the grid; [n, 0] where none is cached
    limits: dict[str, NDArray[np.float64]]
    """What colours span, over all frames looked at: [2] of each scalar output, [2, 3] of ``direction``."""
    samples: tuple[ShownFrame, ...]
    outliers: tuple[Outlier, ...]
    nbytes: dict[tuple[str, str], int]
    """Of the shards' files, by camera and output; the checksums' under ("", "frame_crc32c")."""
    no_pictures: str | None
    """Why there are none."""


def gather(options: ReportOptions) -> Report:
    """Go through the cache once. Raises as `report` does."""
    facts = describe(options.path)
    with GeometryStore.open(options.path) as store:
        if store.frames_present == 0:
            raise CacheIncompleteError(f"cache {store.path}: expected frames to report on, found none: extract some")
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
    """Rows that are there, all or so many evenly spaced ones, ascending."""
    number = min(most, store.frames_present)
    return RowSet(store.rows).rows_at(np.arange(number) * store.frames_present // number)


def _count(
    store: GeometryStore, rows: NDArray[np.int64]
) -> tuple[dict[tuple[int, str], ValueCounts], str | None, NDArray[np.float64]]:
    """Values of each view and channel, which output is the confidence, and its means [n, V]."""
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
        pooled[channel] = np.array([together.percentile(percent) for percent in CLIP])
    pooled["direction"] = np.stack([pooled[channel] for channel in OUTPUTS["ray"].channels[:3]], axis=1)
    return pooled


def lowest_confidence(
    rows: NDArray[np.int64], confidence: NDArray[np.float64], apart: int
) -> list[tuple[int, int, float]]:
    """(row, view, mean confidence) of the lowest, ascending; of one camera, rows at least `apart` from each other.

    One bad second would otherwise fill the list.
    """
    found: list[tuple[int, int, float]] = []
    order = np.argsort(confidence, axis=None, kind="stable")
    for place in order.tolist():
        if len(found) == OUTLIERS:
            break
        at, view = divmod(place, confidence.shape[1])
        row = int(rows[at])
        if all(other != view or abs(near - row) >= apart for near, other, _ in found):
            found.append((row, view, float(confidence[at, view])))
    return found


def disk_use(store: GeometryStore) -> dict[tuple[str, str], int]:
    """Bytes of the shards' files by camera and output, and of their checksums."""
    used = ((key.rpartition("/"), nbytes) for key, nbytes in store.array_nbytes.items())
    return {(camera, output): nbytes for (camera, _, output), nbytes in used}


def _open_pictures(
    store: GeometryStore, options: ReportOptions, rows: list[int]
) -> tuple[FrameReader | None, str | None]:
    """A reader, or why there is none. A dataset that was named has to be there."""
    if not options.rgb:
        return None, "left out with --no-rgb"
    episodes = np.unique([store.locate(row)[0] for row in rows])
    try:
        found = open_pictures(store, episodes, dataset=options.dataset, root=options.root, revision=options.revision)
    except DatasetNotFoundError as error:
        if options.root is not None or options.dataset is not None:
            raise
        return None, str(error)
    return found, None


def _show(store: GeometryStore, reader: FrameReader | None, row: int) -> ShownFrame:
    episode, frame = store.locate(row)
    return ShownFrame(
        row=row,
        episode=episode,
        frame=frame,
        maps={name: values[0] for name, values in store.batch([row]).items()},
        pictures=None if reader is None else tuple(view[0] for view in reader.read(row, row + 1).images),
    )
