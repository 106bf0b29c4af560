"""Pictures of a LeRobotDataset (v3.0), in index order: the only place that decodes pictures in stage one.

`FrameReader.read` gives the pictures of consecutive rows. A reader holds paths and the episode table, no open file: it
travels to worker processes by pickling.

Video is decoded through LeRobot's `decode_video_frames` with PyAV, whatever else is installed: the FFmpeg libraries
come with PyAV's wheel, so that one lock file gives the same pixels on every machine.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import FrameDecodeError, one_line
from geomcache.geometry import Camera

if TYPE_CHECKING:
    import pyarrow as pa

DECODER = "pyav"
TOLERANCE_S = 1e-4  # LeRobotDataset's default
COORDINATES = ("index", "episode_index", "frame_index", "timestamp")


@dataclass(frozen=True, kw_only=True)
class FrameBatch:
    """Pictures of consecutive rows."""

    start: int
    """Index of the first row."""
    images: tuple[NDArray[np.uint8], ...]
    """For each camera [n, H, W, 3], RGB."""


@dataclass(frozen=True, kw_only=True)
class VideoColumn:
    """Where each episode's frames of one camera lie."""

    paths: tuple[str, ...]
    """The camera's files, relative to the dataset's folder."""
    file: NDArray[np.int64]  # [E] into `paths`
    from_timestamp: NDArray[np.float64]  # [E] seconds


@dataclass(kw_only=True)
class FrameReader:
    """Reads pictures of consecutive rows. Picklable; files are opened where it is used."""

    root: Path
    cameras: tuple[Camera, ...]
    episode_start: NDArray[np.int64]  # [E] index of each episode's first row
    episode_length: NDArray[np.int64]  # [E]
    data_paths: tuple[str, ...]
    data_file: NDArray[np.int64]  # [E] into `data_paths`
    videos: dict[str, VideoColumn]
    """By camera key; cameras that are not here are stored as images in the data files."""
    _table: tuple[tuple[int, int], "pa.Table"] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def locate(self, index: int) -> tuple[int, int]:
        """(episode, frame) of a row."""
        episode = int(np.searchsorted(self.episode_start, index, side="right")) - 1
        return episode, index - int(self.episode_start[episode])

    def read(self, start: int, stop: int) -> FrameBatch:
        """Pictures of the rows `start` to `stop`, half open.

        Raises:
            FrameDecodeError: a picture cannot be decoded, has another size than the dataset says, or its time stamp or
                coordinates are not those of the row; the message names file, episode and frame.
        """
        tables = list(self._tables(start, stop))
        timestamps = self._check_coordinates(tables, start, stop)
        images = tuple(
            self._read_video(camera, start, timestamps)
            if camera.key in self.videos
            else self._read_images(camera, tables, start, stop)
            for camera in self.cameras
        )
        return FrameBatch(start=start, images=images)

    def _check_coordinates(self, tables: list["pa.Table"], start: int, stop: int) -> NDArray[np.float64]:
        """Compare the data files with the episode table; time stamps [n] within the episode, in seconds."""
        found = {name: np.concatenate([table.column(name).to_numpy() for table in tables]) for name in COORDINATES}
        index = np.arange(start, stop)
        episode = np.searchsorted(self.episode_start, index, side="right") - 1
        for name, expected in (
            ("index", index),
            ("episode_index", episode),
            ("frame_index", index - self.episode_start[episode]),
        ):
            wrong = np.flatnonzero(found[name] != expected)
            if len(wrong):
                at = int(wrong[0])
                raise FrameDecodeError(
                    f"{self._where(start + at)}: expected {name} {expected[at]}, found {found[name][at]} in"
                    f" {self.data_paths[self.data_file[episode[at]]]}: the dataset's data and episode table disagree"
                )
        timestamps: NDArray[np.float64] = found["timestamp"].astype(np.float64)
        return timestamps

    def _tables(self, start: int, stop: int) -> Iterator["pa.Table"]:
        """The data files' rows `start` to `stop`, in order, in as many tables as row groups are touched.

        The last row group stays in memory: LeRobot writes one an episode, and consecutive batches share it.
        """
        while start < stop:
            if self._table is None or not self._table[0][0] <= start < self._table[0][1]:
                self._table = self._load_row_group(start)
            (first, last), table = self._table
            end = min(stop, last)
            yield table.slice(start - first, end - start)
            start = end

    def _load_row_group(self, index: int) -> tuple[tuple[int, int], "pa.Table"]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        episode = self.locate(index)[0]
        file = int(self.data_file[episode])
        path = self.root / self.data_paths[file]
        first = int(self.episode_start[np.flatnonzero(self.data_file == file)[0]])  # rows of a file are consecutive
        image_keys = [camera.key for camera in self.cameras if camera.key not in self.videos]
        try:
            with pq.ParquetFile(path) as parquet:
                for group in range(parquet.num_row_groups):
                    last = first + parquet.metadata.row_group(group).num_rows
                    if index < last:
                        table = parquet.read_row_group(group, columns=[*COORDINATES, *image_keys])
                        return (first, last), table
                    first = last
        except (OSError, pa.ArrowInvalid) as error:
            raise FrameDecodeError(f"{self._where(index)}: cannot read {path}: {one_line(error)}") from error
        raise FrameDecodeError(
            f"{self._where(index)}: expected in {path}, whose rows end at index {first - 1}: the file is cut off"
        )

    def _read_images(self, camera: Camera, tables: list["pa.Table"], start: int, stop: int) -> NDArray[np.uint8]:
        from PIL import Image

        images = np.empty((stop - start, camera.height, camera.width, 3), np.uint8)
        at = 0
        for table in tables:
            for cell in table.column(camera.key).to_pylist():
                where = f"{self._where(start + at)}, camera {camera.key}"
                if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
                    raise FrameDecodeError(f"{where}: expected an embedded image, found none in the data file")
                try:
                    with Image.open(io.BytesIO(cell["bytes"])) as image:
                        pixels = np.asarray(image)
                except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNG files
                    raise FrameDecodeError(f"{where}: the image cannot be decoded: {one_line(error)}") from error
                if pixels.dtype != np.uint8 or pixels.shape != images.shape[1:]:
                    raise FrameDecodeError(
                        f"{where}: expected uint8 {list(images.shape[1:])}, found {pixels.dtype} {list(pixels.shape)}"
                    )
                images[at] = pixels
                at += 1
        return images

    def _read_video(self, camera: Camera, start: int, timestamps: NDArray[np.float64]) -> NDArray[np.uint8]:
        column = self.videos[camera.key]
        index = np.arange(start, start + len(timestamps))
        episode = np.searchsorted(self.episode_start, index, side="right") - 1
        file, seconds = column.file[episode], column.from_timestamp[episode] + timestamps
        # One call decodes one stretch of one file; an edited dataset may jump within a file.
        breaks = np.flatnonzero((np.diff(file) != 0) | (np.diff(seconds) <= 0) | (np.diff(seconds) > 1.0)) + 1
        images = np.empty((len(index), camera.height, camera.width, 3), np.uint8)
        for rows in np.split(np.arange(len(index)), breaks):
            path = self.root / column.paths[file[rows[0]]]
            try:
                frames = _decode(path, seconds[rows].tolist())
            except (OSError, ValueError, IndexError) as error:
                raise self._name_bad_frame(camera, path, index[rows], seconds[rows], error) from error
            if frames.shape[1:] != images.shape[1:]:
                raise FrameDecodeError(
                    f"{self._where(start + int(rows[0]))}, camera {camera.key}: expected {list(images.shape[1:])},"
                    f" found {list(frames.shape[1:])} in {path}"
                )
            images[rows] = frames
        return images

    def _name_bad_frame(
        self, camera: Camera, path: Path, index: NDArray[np.int64], seconds: NDArray[np.float64], error: Exception
    ) -> FrameDecodeError:
        """Which frame of a stretch it was that failed: each is tried alone, the first that fails is named."""
        if not path.is_file():
            return FrameDecodeError(f"{self._where(int(index[0]))}, camera {camera.key}: the video {path} is not there")
        for row, second in zip(index, seconds, strict=True):
            try:
                _decode(path, [float(second)])
            except (OSError, ValueError, IndexError) as single:
                return FrameDecodeError(
                    f"{self._where(int(row))}, camera {camera.key}: no frame at {second:.3f} s in {path}"
                    f" ({one_line(single)}): the video is cut off, damaged or of another frame rate"
                )
        return FrameDecodeError(
            f"{self._where(int(index[0]))} to frame {self.locate(int(index[-1]))[1]}, camera {camera.key}:"
            f" {path} cannot be decoded in one go: {one_line(error)}"
        )

    def _where(self, index: int) -> str:
        episode, frame = self.locate(index)
        return f"episode {episode} frame {frame}"


def _decode(path: Path, seconds: list[float]) -> NDArray[np.uint8]:
    """Frames at these time stamps, uint8 [n, H, W, 3]; every time stamp is checked by LeRobot."""
    from lerobot.datasets.video_utils import decode_video_frames

    frames = decode_video_frames(path, seconds, TOLERANCE_S, backend=DECODER, return_uint8=True)
    images: NDArray[np.uint8] = frames.permute(0, 2, 3, 1).numpy()
    return images
