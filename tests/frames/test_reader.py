"""Pictures in index order, against recorded arrays, PyAV's plain decoding and LeRobot's items."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from geomcache.errors import FrameDecodeError
from geomcache.frames.source import open_dataset
from tests.support.datasets import DEMO, make_dataset

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
    with pytest.raises(FrameDecodeError, match=r"episode 0 frame 3, camera observation\.images\.image: no frame at"):
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
    with pytest.raises(FrameDecodeError, match=r"file-000\.parquet, whose rows end at index 199"):
        dataset.reader.read(198, 203)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FrameDecodeError, match=r"episode 0 frame 0: cannot read .*file-000\.parquet"):
        open_dataset("demo", root=demo)[0].reader.read(0, 1)


@pytest.mark.parametrize("damage", ["garbage", "missing", "small"])
def test_an_image_that_is_damaged_is_named(images: Recorded, tmp_path: Path, damage: str) -> None:
    root = Path(shutil.copytree(images[0], tmp_path / "dataset"))
    key = "observation.images.front"

    def change(table: pa.Table) -> pa.Table:
        cells = table.column(key).to_pylist()
        other = table.column("observation.images.wrist").to_pylist()
        cells[7] = {"garbage": {"bytes": b"x" * 90, "path": None}, "missing": None, "small": other[7]}[damage]
        return table.set_column(table.column_names.index(key), key, pa.array(cells, table.schema.field(key).type))

    rewrite(root / "data" / "chunk-000" / "file-000.parquet", change)
    dataset, _ = open_dataset("test", root=root)
    with pytest.raises(FrameDecodeError, match=f"episode 2 frame 1, camera {key}: "):
        dataset.reader.read(0, 10)
