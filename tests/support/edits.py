"""Datasets that are edited, and an encoder that is a pure function of pictures: small, for thousands of updates."""

import contextlib
import functools
import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from geomcache.cache import durable
from geomcache.cache.create import successor_of
from geomcache.cache.store import GeometryStore
from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.preprocess import DA3Preprocessor
from geomcache.extraction import run as run_module
from geomcache.extraction import update as update_module
from geomcache.extraction.options import ExtractOptions, UpdateOptions
from geomcache.geometry import Camera, GeometrySpec
from geomcache.pipeline.report import ExtractReport
from geomcache.ranges import clip_ranges, count_rows
from tests.support.logs import logged_lines

REPO_ID = "geomcache/test"
SIDE, PATCH = 28, 14  # pixels
CAMERAS = {"observation.images.image": (SIDE, SIDE), "observation.images.image2": (SIDE, SIDE)}


class TinyEncoder(DA3Encoder):
    """Block means instead of a network; every view also has a share of the first one, as joint views do.

    Sums are integers, so that a frame's numbers do not depend on its batch.
    """

    def __init__(self, spec: GeometrySpec) -> None:
        self.spec, self.device, self.calls, self.frames = spec, torch.device("cpu"), 0, 0
        self.preprocessor = DA3Preprocessor(spec.cameras, spec.process_res, spec.resize_method)

    @property
    def engine(self) -> Any:
        return "eager"

    def _maps(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, views, height, width, _ = pictures.shape
        self.frames += batch
        blocks = pictures.long().reshape(batch, views, height // PATCH, PATCH, width // PATCH, PATCH, 3)
        means = blocks.sum(dim=(3, 5)).double() / (255 * PATCH * PATCH)  # [B, V, h, w, 3]
        scene = means[:, :1] * 0.5 + means * torch.arange(1, views + 1).reshape(1, -1, 1, 1, 1)
        return {"ray": torch.cat([means, scene], dim=-1).float(), "ray_conf": (1 + means.sum(-1)).float()}


def tiny_spec(cameras: Sequence[Camera]) -> GeometrySpec:
    return GeometrySpec(
        model_id="tiny",
        model_revision=None,
        model_name="da3-small",
        weights_sha256="11" * 32,
        da3_version="0.1.1",
        views="joint",
        cameras=tuple(cameras),
        process_res=SIDE,
        grid="patch",
        grid_hw=(SIDE // PATCH, SIDE // PATCH),
        outputs=("ray", "ray_conf"),
        compute_dtype="fp32",
    )


class Workshop:
    """`extract` and `update` with the tiny encoder, which is counted.

    Attributes:
        loads: how often the encoder was asked for by an update.
        lines: what the last call logged.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.loads = 0
        self.lines: list[str] = []
        self._encoder: TinyEncoder | None = None
        patch.setattr(durable, "fsync", lambda _descriptor: None)  # no test cuts the power
        patch.setattr(run_module, "load_encoder", lambda _options, cameras, _device: self._load(cameras))
        patch.setattr(update_module, "_load_encoder", lambda _options, change, _machinery: self._count_load(change))

    def _load(self, cameras: Sequence[Camera]) -> TinyEncoder:
        self._encoder = TinyEncoder(tiny_spec(cameras))
        return self._encoder

    def _count_load(self, change: Any) -> TinyEncoder:
        self.loads += 1
        return self._load(change.store.spec.cameras)

    def extract(self, cache: Path, root: Path, **options: Any) -> ExtractReport:
        self._encoder = None
        values = {"model": "tiny", "dataset": REPO_ID, "num_workers": 0, "device": "cpu", "batch_size": 8}
        with logged_lines() as self.lines:
            return run_module.extract(ExtractOptions(**{**values, "root": root, "output": cache, **options}))

    def update(self, cache: Path, root: Path, **options: Any) -> ExtractReport:
        self._encoder, self.loads = None, 0
        values = {"dataset": REPO_ID, "num_workers": 0, "device": "cpu", "batch_size": 8}
        with logged_lines() as self.lines:
            return update_module.update(UpdateOptions(**{**values, "cache": cache, "root": root, **options}))

    @property
    def frames_encoded(self) -> int:
        """By the encoder itself, in the last call."""
        return 0 if self._encoder is None else self._encoder.frames


def frames_of(root: Path, cameras: Sequence[str] = tuple(CAMERAS)) -> list[tuple[NDArray[np.uint8], ...]]:
    """The pictures of every row, as LeRobot's own dataset gives them: [H, W, 3] of each camera."""
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset(REPO_ID, root=root, video_backend="pyav", return_uint8=True)
    items = (dataset[row] for row in range(len(dataset)))
    return [tuple(_as_picture(item[key]) for key in cameras) for item in items]


def _as_picture(image: torch.Tensor) -> NDArray[np.uint8]:
    whole = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    return np.ascontiguousarray(whole.permute(1, 2, 0).numpy())


def content(frame: Sequence[NDArray[np.uint8]]) -> bytes:
    """What tells a frame from others: the bytes of its pictures, in the order of the views."""
    return b"".join(picture.tobytes() for picture in frame)


def largest_difference(cache: Path, frames: Sequence[tuple[NDArray[np.uint8], ...]]) -> float:
    """Between the rows that a cache has and what the tiny encoder computes of these frames."""
    with GeometryStore.open(cache) as store:
        rows = [row for start, stop in store.rows for row in range(start, stop)]
        images = [np.stack(views) for views in zip(*(frames[row] for row in rows), strict=True)]
        computed = TinyEncoder(store.spec).encode(images)
        largest = 0.0
        for name, values in store.batch(rows).items():
            difference = np.abs(values.astype(np.float64) - getattr(computed, name).numpy().astype(np.float64))
            largest = max(largest, float(difference.max()))
        return largest


class StoppedError(Exception):
    """An extraction or update that was made to fail."""


def interrupt(patch: pytest.MonkeyPatch, cache: Path, *, encoded: int, committed: tuple[int, int]) -> None:
    """Let the encoder fail once it has encoded so many frames and a row of this range is committed in the successor."""
    maps = TinyEncoder._maps

    def failing(self: TinyEncoder, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.frames >= encoded:
            end = time.monotonic() + 60
            while time.monotonic() < end and not committed_rows(cache, committed):
                time.sleep(0.01)
            raise StoppedError
        return maps(self, pictures)

    patch.setattr(TinyEncoder, "_maps", failing)


def committed_rows(cache: Path, rows: tuple[int, int]) -> int:
    """How many rows of a range the successor of a cache has."""
    with GeometryStore.open(successor_of(cache)) as store:
        return count_rows(clip_ranges(store.rows, *rows))


class Episode(NamedTuple):
    """An episode of made-up pictures."""

    frames: tuple[tuple[int, ...], ...]
    """The number of each picture: [n][V]."""
    statistics: int | None
    """What the episode table says of its pictures; None for nothing. Two episodes may say the same, and lie."""


@functools.lru_cache(maxsize=10_000)
def picture_of(number: int, side: int = SIDE) -> NDArray[np.uint8]:
    """A picture that is told from others by its number, uint8 [H, W, 3]."""
    return np.random.default_rng(number).integers(0, 256, size=(side, side, 3), dtype=np.uint8)


@functools.lru_cache(maxsize=10_000)
def _png_of(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture_of(number)).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def write_dataset(root: Path, episodes: Sequence[Episode]) -> None:
    """Write a LeRobotDataset of images as LeRobot does, but in milliseconds; a test compares the two."""
    lengths = [len(episode.frames) for episode in episodes]
    stops = np.cumsum(lengths)
    features: dict[str, dict[str, Any]] = {
        key: {"dtype": "image", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]} for key in CAMERAS
    }
    columns: dict[str, Any] = {
        key: [
            {"bytes": _png_of(frame[view]), "path": f"{view}.png"} for episode in episodes for frame in episode.frames
        ]
        for view, key in enumerate(CAMERAS)
    }
    numbers = {
        "timestamp": np.concatenate([np.arange(length) / 10 for length in lengths]).astype(np.float32),
        "frame_index": np.concatenate([np.arange(length) for length in lengths]),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "index": np.arange(sum(lengths)),
        "task_index": np.zeros(sum(lengths), np.int64),
    }
    features |= {key: {"dtype": str(column.dtype), "shape": [1], "names": None} for key, column in numbers.items()}
    table: dict[str, Any] = {
        "episode_index": range(len(lengths)),
        "tasks": [["move"]] * len(lengths),
        "length": lengths,
        "dataset_from_index": stops - lengths,
        "dataset_to_index": stops,
    }
    for prefix in ("data", "meta/episodes"):
        table |= {f"{prefix}/{name}": [0] * len(lengths) for name in ("chunk_index", "file_index")}
    if all(episode.statistics is not None for episode in episodes):
        for key in CAMERAS:
            table[f"stats/{key}/count"] = [[length] for length in lengths]
            for name in ("max", "mean", "min", "std"):
                table[f"stats/{key}/{name}"] = [[[[float(each.statistics or 0)]]] * 3 for each in episodes]
    info = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 10,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": features,
    }
    for name, content_of in (("data/chunk-000", columns | numbers), ("meta/episodes/chunk-000", table)):
        (root / name).mkdir(parents=True)
        pq.write_table(pa.table(content_of), root / name / "file-000.parquet")
    pq.write_table(pa.table({"task_index": [0], "task": ["move"]}), root / "meta" / "tasks.parquet")
    (root / "meta" / "info.json").write_text(json.dumps(info))


@contextlib.contextmanager
def workshop() -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(patch)
