"""Pictures in index order, against recorded arrays, PyAV's plain decoding and LeRobot's items."""

import io
import pickle
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from geomcache.errors import FrameDecodeError
from geomcache.frames.reader import _decode_image
from geomcache.frames.source import open_dataset
from geomcache.geometry import Camera
from tests.support.datasets import DEMO, make_dataset, pictures

CAMERAS = {"observation.images.front": (48, 64), "observation.images.wrist": (64, 64)}


Recorded = tuple[Path, dict[str, NDArray[np.uint8]]]
"""A dataset's folder, and each camera's pictures as they were recorded, [N, H, W, 3]."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    root = tmp_path_factory.mktemp("images") / "dataset"
    return root, make_dataset(root, (5, 1, 4), CAMERAS)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the shipped episodes, to damage."""
    return Path(shutil.copytree(DEMO, tmp_path / "demo"))


def plain_decode(path: Path) -> NDArray[np.uint8]:
    container = av.open(str(path))
    with container:
        frames: NDArray[np.uint8] = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    return frames


def encode(path: Path, frames: NDArray[np.uint8], rate: int) -> None:
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libsvtav1", rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        target.mux(stream.encode(None))


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 8), (9, 10), (4, 6)])
def test_image_features_are_read_losslessly_across_episodes(images: Recorded, start: int, stop: int) -> None:
    root, recorded = images
    dataset, _ = open_dataset("test", root=root)
    batch = dataset.reader.read(start, stop)
    assert batch.start == start
    for camera, pixels in zip(dataset.cameras, batch.images, strict=True):
        np.testing.assert_array_equal(pixels, recorded[camera.key][start:stop])


def test_cameras_come_in_the_order_asked_for(images: Recorded) -> None:
    root, recorded = images
    keys = list(reversed(CAMERAS))
    dataset, _ = open_dataset("test", root=root, cameras=keys)
    assert [camera.key for camera in dataset.cameras] == keys
    np.testing.assert_array_equal(dataset.reader.read(2, 3).images[0], recorded[keys[0]][2:3])


def test_video_equals_plain_decoding_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = open_dataset("demo", root=DEMO)
    start, stop = 100, 260  # over two ends of episodes
    batch = dataset.reader.read(start, stop)
    for camera, pixels in zip(dataset.cameras, batch.images, strict=True):
        expected = plain_decode(DEMO / "videos" / camera.key / "chunk-000" / "file-000.mp4")
        assert len(expected) == dataset.spec.frames
        np.testing.assert_array_equal(pixels, expected[start:stop])


def test_video_equals_lerobots_items() -> None:
    from lerobot.datasets import LeRobotDataset

    dataset, _ = open_dataset("demo", root=DEMO)
    items = LeRobotDataset("demo", root=DEMO, video_backend="pyav")
    for index in (0, 124, 125, 379):
        batch = dataset.reader.read(index, index + 1)
        for camera, pixels in zip(dataset.cameras, batch.images, strict=True):
            expected = (items[index][camera.key] * 255).round().byte().permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(pixels[0], expected)


def test_a_dataset_of_many_files_reads_like_one_of_few(tmp_path: Path) -> None:
    """Every episode in files of its own, as LeRobot makes them when they grow large."""
    from lerobot.datasets.aggregate import aggregate_datasets

    recorded = [make_dataset(tmp_path / str(seed), (3, 2), CAMERAS, video=True, seed=seed) for seed in range(2)]
    aggregate_datasets(
        ["part0", "part1"],
        "merged",
        roots=[tmp_path / "0", tmp_path / "1"],
        aggr_root=tmp_path / "merged",
        data_files_size_in_mb=1e-6,
        video_files_size_in_mb=1e-6,
    )
    dataset, _ = open_dataset("merged", root=tmp_path / "merged")
    assert len(dataset.reader.data_paths) == 2
    batch = dataset.reader.read(0, 10)
    for camera, pixels in zip(dataset.cameras, batch.images, strict=True):
        assert len(dataset.reader.videos[camera.key].paths) == 2
        for seed, part in enumerate(recorded):  # video is lossy: nearest to its own frame
            distance = np.abs(pixels[None, 5 * seed : 5 * seed + 5].astype(int) - part[camera.key][:, None]).mean(
                (2, 3, 4)
            )
            assert (distance.argmin(axis=0) == np.arange(5)).all()


def test_a_reader_travels_by_pickle_without_its_table(images: Recorded) -> None:
    root, recorded = images
    dataset, _ = open_dataset("test", root=root)
    dataset.reader.read(0, 2)
    copy = pickle.loads(pickle.dumps(dataset.reader))
    assert copy._table is None
    np.testing.assert_array_equal(copy.read(7, 8).images[1], recorded["observation.images.wrist"][7:8])


def test_a_video_that_is_cut_off_is_named_with_episode_and_frame(demo: Path) -> None:
    key = "observation.images.image2"
    path = demo / "videos" / key / "chunk-000" / "file-000.mp4"
    encode(path, plain_decode(path)[:200], rate=10)
    dataset, _ = open_dataset("demo", root=demo)
    dataset.reader.read(150, 190)
    with pytest.raises(FrameDecodeError) as caught:
        dataset.reader.read(180, 230)
    first_bad = len(plain_decode(path))
    episode, frame = dataset.reader.locate(first_bad)
    assert f"episode {episode} frame {frame}, camera {key}" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_video_of_garbage_is_named(demo: Path) -> None:
    path = demo / "videos" / "observation.images.image" / "chunk-000" / "file-000.mp4"
    path.write_bytes(b"\0" * 5000)
    dataset, _ = open_dataset("demo", root=demo)
    with pytest.raises(FrameDecodeError, match=r"episode 0 frame 3, camera observation\.images\.image: "):
        dataset.reader.read(3, 6)


def test_a_video_of_another_frame_rate_is_refused_not_resampled(demo: Path) -> None:
    path = demo / "videos" / "observation.images.image" / "chunk-000" / "file-000.mp4"
    frames = plain_decode(path)[:100]
    encode(path, frames, rate=7)
    dataset, _ = open_dataset("demo", root=demo)
    with pytest.raises(FrameDecodeError, match="episode 0 frame 1, camera"):
        dataset.reader.read(0, 10)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def test_rows_that_are_not_where_the_episode_table_says_are_refused(demo: Path) -> None:
    path = demo / "data" / "chunk-000" / "file-000.parquet"

    def swap(table: pa.Table) -> pa.Table:
        order = np.arange(len(table))
        order[[10, 11]] = order[[11, 10]]
        return table.take(order)

    rewrite(path, swap)
    dataset, _ = open_dataset("demo", root=demo)
    dataset.reader.read(0, 5)
    with pytest.raises(FrameDecodeError, match="episode 0 frame 10: expected index 10, found 11"):
        dataset.reader.read(5, 20)


def test_a_data_file_that_is_cut_off_is_named(demo: Path) -> None:
    path = demo / "data" / "chunk-000" / "file-000.parquet"
    rewrite(path, lambda table: table.slice(0, 200))
    dataset, _ = open_dataset("demo", root=demo)
    with pytest.raises(FrameDecodeError, match=r"file-000\.parquet.* 199"):
        dataset.reader.read(198, 203)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FrameDecodeError, match=r"episode 0 frame 0: cannot read .*file-000\.parquet"):
        open_dataset("demo", root=demo)[0].reader.read(0, 1)


def png(width: int, height: int) -> bytes:
    """A PNG file of that size by its header; its pixels are those of one pixel."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


DAMAGED_CELLS: dict[str, Any] = {
    "garbage": {"bytes": b"x" * 90, "path": None},
    "no cell": None,
    "a path only": {"bytes": None, "path": "/etc/hostname"},
    "too large": {"bytes": png(640, 480), "path": None},
    "a decompression bomb": {"bytes": png(60_000, 60_000), "path": None},
    "fewer pixels than its header says": {"bytes": png(64, 48), "path": None},
}


@pytest.mark.parametrize("cell", DAMAGED_CELLS.values(), ids=DAMAGED_CELLS.keys())
def test_an_image_that_is_damaged_is_named(images: Recorded, tmp_path: Path, cell: object) -> None:
    root = Path(shutil.copytree(images[0], tmp_path / "dataset"))
    key = "observation.images.front"

    def change(table: pa.Table) -> pa.Table:
        cells = table.column(key).to_pylist()
        cells[7] = cell
        return table.set_column(table.column_names.index(key), key, pa.array(cells, table.schema.field(key).type))

    rewrite(root / "data" / "chunk-000" / "file-000.parquet", change)
    dataset, _ = open_dataset("test", root=root)
    with pytest.raises(FrameDecodeError, match=f"^episode 2 frame 1, camera {key}: ") as caught:
        dataset.reader.read(0, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged files
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_bytes_of_an_image_end_in_pixels_or_one_error(form: str) -> None:
    camera = Camera(key="front", height=32, width=32)
    file = io.BytesIO()
    Image.fromarray(pictures(1, 32, 32)[0]).save(file, form)
    generator, errors = random.Random(0), 0
    for number in range(300):
        content = bytearray(file.getvalue())
        for _ in range(generator.choice((1, 1, 2, 4))):
            content[generator.randrange(len(content) if number % 2 else 80)] = generator.randrange(256)
        if number % 5 == 0:
            del content[generator.randrange(len(content)) :]
        try:
            assert _decode_image(bytes(content), camera, "here").shape == (32, 32, 3)
        except FrameDecodeError as error:
            assert str(error).startswith("here: ")
            errors += 1
    assert errors > 50


def test_an_image_is_turned_as_lerobot_turns_it(tmp_path: Path) -> None:
    """By its EXIF orientation: an image that is not turned would not be the one that training sees."""
    from lerobot.datasets import LeRobotDataset

    key = "observation.images.image"
    make_dataset(tmp_path / "dataset", (3,))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture = Image.fromarray(pictures(1, 64, 64, seed=9)[0])
    picture.save(file, "PNG", exif=exif)

    def change(table: pa.Table) -> pa.Table:
        cells = table.column(key).to_pylist()
        cells[1]["bytes"] = file.getvalue()
        return table.set_column(table.column_names.index(key), key, pa.array(cells, table.schema.field(key).type))

    rewrite(tmp_path / "dataset" / "data" / "chunk-000" / "file-000.parquet", change)
    read = open_dataset("test", root=tmp_path / "dataset")[0].reader.read(1, 2).images[0][0]
    item = LeRobotDataset("test", root=tmp_path / "dataset")[1][key]
    np.testing.assert_array_equal(read, (item * 255).round().byte().permute(1, 2, 0).numpy())
    assert not np.array_equal(read, np.asarray(picture))


def test_columns_that_are_missing_or_of_another_type_are_named(images: Recorded, tmp_path: Path) -> None:
    root = Path(shutil.copytree(images[0], tmp_path / "dataset"))
    path = root / "data" / "chunk-000" / "file-000.parquet"
    original = pq.read_table(path)
    for name in ("observation.images.front", "timestamp", "index"):
        pq.write_table(original.drop_columns([name]), path)
        with pytest.raises(FrameDecodeError, match=rf"^episode 0 frame 3: .*file-000\.parquet, .*{name}"):
            open_dataset("test", root=root)[0].reader.read(3, 4)
    for name in ("timestamp", "index"):
        place = original.column_names.index(name)
        texts = pa.array(["x"] * len(original))
        pq.write_table(original.set_column(place, name, texts), path)
        with pytest.raises(FrameDecodeError, match=rf"^episode 0 frame 3: .*{name} .*file-000\.parquet"):
            open_dataset("test", root=root)[0].reader.read(3, 4)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("stack expects each tensor to be equal size"), av.error.PatchWelcomeError(1, "x"), KeyError("\n")],
)
def test_whatever_a_decoder_raises_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("geomcache.frames.video.VideoFile.read", fail)
    dataset, _ = open_dataset("demo", root=DEMO)
    with pytest.raises(FrameDecodeError, match="^episode 1 frame 1, camera ") as caught:
        dataset.reader.read(126, 130)
    assert "\n" not in str(caught.value)


def test_inexact_time_stamps_are_read_within_the_tolerance(demo: Path) -> None:
    """As `--tolerance_s` of lerobot-train: `from_timestamp` drifts where episodes were joined by summing floats."""
    expected = open_dataset("demo", root=DEMO)[0].reader.read(120, 130)
    path = demo / "meta" / "episodes" / "chunk-000" / "file-000.parquet"

    def shift(table: pa.Table) -> pa.Table:
        for name in [name for name in table.column_names if name.endswith("from_timestamp")]:
            shifted = table[name].to_numpy() + 4e-4
            table = table.set_column(table.column_names.index(name), name, [shifted])
        return table

    rewrite(path, shift)
    with pytest.raises(FrameDecodeError, match="episode 0 frame 120, .*--tolerance-s"):
        open_dataset("demo", root=demo)[0].reader.read(120, 130)
    reader = pickle.loads(pickle.dumps(open_dataset("demo", root=demo, tolerance_s=0.01)[0].reader))
    for pixels, others in zip(reader.read(120, 130).images, expected.images, strict=True):
        np.testing.assert_array_equal(pixels, others)
