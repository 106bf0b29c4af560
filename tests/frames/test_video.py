"""Video that is read by batches from files that stay open, against LeRobot's own decoding of each batch."""

from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from lerobot.datasets.video_utils import decode_video_frames
from numpy.typing import NDArray

from geomcache.frames.source import open_dataset
from geomcache.frames.video import VideoFile
from tests.support.datasets import DEMO, pictures

DEMO_VIDEO = DEMO / "videos" / "observation.images.image" / "chunk-000" / "file-000.mp4"
DEMO_FRAMES, FPS = 380, 10


def by_lerobot(path: Path, seconds: list[float]) -> NDArray[np.uint8]:
    frames = decode_video_frames(path, seconds, 1e-4, backend="pyav", return_uint8=True)
    pixels: NDArray[np.uint8] = frames.permute(0, 2, 3, 1).numpy()
    return pixels


@pytest.fixture(scope="module")
def reordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 with frames that are stored in another order than shown, and few key frames."""
    path = tmp_path_factory.mktemp("video") / "reordered.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "24", "bf": "3", "x264-params": "open-gop=1"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for image in pictures(100, 64, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened by PyAV."""
    counts: Counter[str] = Counter()
    original = av.open

    def count(file: str, *args: Any, **options: Any) -> Any:
        counts[Path(file).parts[-3] if "videos" in Path(file).parts else Path(file).name] += 1
        return original(file, *args, **options)

    monkeypatch.setattr(av, "open", count)
    return counts


# In order; as one of two workers; back and forth; to the end and from the start; frames left out.
ORDERS = {
    "all": [range(start, min(start + 7, 100)) for start in range(0, 100, 7)],
    "every other batch": [range(start, start + 7) for start in range(0, 93, 14)],
    "back and forth": [range(50, 60), range(40, 52), range(59, 61), range(1), range(1, 2), range(99, 100)],
    "end and start": [range(90, 100), range(99, 100), range(5), range(5, 9)],
    "some": [range(3, 40, 3), range(41, 60, 5)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("file", ["demo", "reordered"])
def test_pixels_are_lerobots(file: str, order: str, reordered: Path, opened: Counter[str]) -> None:
    path = DEMO_VIDEO if file == "demo" else reordered
    with VideoFile(path) as video:
        read = [video.read([index / FPS for index in batch], 1e-4) for batch in ORDERS[order]]
    assert opened.total() == 1
    for batch, pixels in zip(ORDERS[order], read, strict=True):
        np.testing.assert_array_equal(pixels, by_lerobot(path, [index / FPS for index in batch]))


def test_a_time_stamp_between_two_frames_is_refused_or_has_the_nearest(reordered: Path) -> None:
    with VideoFile(reordered) as video:
        video.read([0.0, 0.1], 1e-4)
        with pytest.raises(ValueError, match=r"nearest frame to 0\.2400 s is at 0\.2000 s"):
            video.read([0.24, 0.3], 1e-4)
        np.testing.assert_array_equal(video.read([0.24, 0.36], 0.05), by_lerobot(reordered, [0.2, 0.4]))
        np.testing.assert_array_equal(video.read([0.41], 0.05), by_lerobot(reordered, [0.4]))


def test_time_stamps_beyond_the_end_are_refused(reordered: Path) -> None:
    with VideoFile(reordered) as video:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"10\.0000 s"):
                video.read([9.9, 10.0], 1e-4)
        np.testing.assert_array_equal(video.read([9.9], 1e-4), by_lerobot(reordered, [9.9]))


def test_a_reader_opens_each_file_once_for_all_its_batches(opened: Counter[str]) -> None:
    reader = open_dataset("demo", root=DEMO)[0].reader
    for start in range(0, DEMO_FRAMES, 16):
        reader.read(start, min(start + 16, DEMO_FRAMES))
    assert opened == {"observation.images.image": 1, "observation.images.image2": 1}
