"""The images of a LeRobotDataset (v3.0), in the order of its rows: the only place that decodes images in stage one.

`FrameReader.read` returns the images of consecutive rows. A reader is pickled to reach the worker processes: its paths
and the episode table travel, and open files stay behind.

Video is decoded with PyAV as LeRobot does it, even if torchcodec is installed: the FFmpeg libraries come with PyAV's
wheel, so that one lock file gives the same pixels on every machine. Embedded images are decoded as the `datasets`
library does it, which LeRobot trains with.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import FrameDecodeError, one_line
from geomcache.frames.video import VideoFile
from geomcache.geometry import Camera
from geomcache.ranges import locate, name_row

if TYPE_CHECKING:
    import pyarrow as pa

DECODER = "pyav"
TOLERANCE_S = 1e-4  # LeRobotDataset's default
COORDINATES = {"index": np.int64, "episode_index": np.int64, "frame_index": np.int64, "timestamp": np.float64}


@dataclass(frozen=True, kw_only=True)
class FrameBatch:
    """The images of consecutive rows."""

    start: int
    """The first row."""
    images: tuple[NDArray[np.uint8], ...]
    """One array per camera, [n, H, W, 3], RGB."""


@dataclass(frozen=True, kw_only=True)
class VideoColumn:
    """Where one camera's frames of each episode are."""

    paths: tuple[str, ...]
    """The camera's video files, relative to the dataset's folder."""
    file: NDArray[np.int64]  # [E] into `paths`
    from_timestamp: NDArray[np.float64]  # [E] seconds


@dataclass(kw_only=True)
class FrameReader:
    """Reads the images of consecutive rows. Can be pickled: it opens files in the process that uses it.

    A camera's video file stays open until frames of another are read. Only one thread at a time may use a reader.
    """

    root: Path
    cameras: tuple[Camera, ...]
    episode_start: NDArray[np.int64]  # [E] index of each episode's first row
    episode_length: NDArray[np.int64]  # [E]
    data_paths: tuple[str, ...]
    data_file: NDArray[np.int64]  # [E] into `data_paths`
    videos: dict[str, VideoColumn]
    """By camera key; the other cameras are stored as images in the data files."""
    tolerance_s: float = TOLERANCE_S
    """How far the time stamp of a video's frame may be from the one asked for, in seconds, as LeRobot means it."""
    _table: tuple[tuple[int, int], "pa.Table"] | None = field(default=None, repr=False, compare=False)
    _open_videos: dict[str, VideoFile] = field(default_factory=dict, repr=False, compare=False)
    """By camera key."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None, "_open_videos": {}}

    def locate(self, index: int) -> tuple[int, int]:
        """Return the (episode, frame) of a row."""
        return locate(self.episode_start, index)

    def files(self, episodes: NDArray[np.int64]) -> list[Path]:
        """Return the files that tell what these episodes are: metadata, data and videos."""
        metadata = (file for file in (self.root / "meta").rglob("*") if file.is_file())
        return [*metadata, *self._files_of_frames(episodes)]

    def has_files(self, episode: int) -> bool:
        """Return whether the files with the frames of an episode are on this machine."""
        return all(file.is_file() for file in self._files_of_frames(np.array([episode])))

    def _files_of_frames(self, episodes: NDArray[np.int64]) -> list[Path]:
        names = {self.data_paths[number] for number in np.unique(self.data_file[episodes]).tolist()}
        for column in self.videos.values():
            names |= {column.paths[number] for number in np.unique(column.file[episodes]).tolist()}
        return [self.root / name for name in sorted(names)]

    def read(self, start: int, stop: int) -> FrameBatch:
        """Read the images of the rows `start` to `stop`, half open.

        Raises:
            FrameDecodeError: an image cannot be decoded, its size is not the dataset's, or its time stamp or
                coordinates are not the row's; the message names file, episode and frame.
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
        """Compare the data files with the episode table; return time stamps [n] within the episode, in seconds."""
        stored = {name: self._read_coordinate(tables, name, start) for name in COORDINATES}
        index = np.arange(start, stop)
        episode = np.searchsorted(self.episode_start, index, side="right") - 1
        for name, expected in (
            ("index", index),
            ("episode_index", episode),
            ("frame_index", index - self.episode_start[episode]),
        ):
            wrong = np.flatnonzero(stored[name] != expected)
            if len(wrong):
                first = int(wrong[0])
                raise FrameDecodeError(
                    f"{self._name_row(start + first)}: expected {name} {expected[first]}, found"
                    f" {stored[name][first]} in {self._data_file(start + first)}: the dataset's data and episode table"
                    " disagree"
                )
        return stored["timestamp"]

    def _read_coordinate(self, tables: list["pa.Table"], name: str, start: int) -> NDArray[Any]:
        try:
            values: NDArray[Any] = np.concatenate([table.column(name).to_numpy() for table in tables])
            return values.astype(COORDINATES[name])
        except (ValueError, TypeError) as error:  # text, lists or nulls
            raise FrameDecodeError(
                f"{self._name_row(start)}: expected numbers in the column {name} of {self._data_file(start)}:"
                f" {one_line(error)}"
            ) from error

    def _data_file(self, row: int) -> str:
        return self.data_paths[int(self.data_file[self.locate(row)[0]])]

    def _tables(self, start: int, stop: int) -> Iterator["pa.Table"]:
        """Yield the data files' rows `start` to `stop`, in order, as one table for each row group.

        The last row group stays in memory: LeRobot writes one per episode, and consecutive batches share it.
        """
        while start < stop:
            if self._table is None or not self._table[0][0] <= start < self._table[0][1]:
                self._table = self._load_row_group(start)
            (first, last), table = self._table
            end = min(stop, last)
            yield table.slice(start - first, end - start)
            start = end

    def _load_row_group(self, row: int) -> tuple[tuple[int, int], "pa.Table"]:
        """Read the row group that holds a row; return its range of rows and its table."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        episode = self.locate(row)[0]
        file = int(self.data_file[episode])
        path = self.root / self.data_paths[file]
        first = int(self.episode_start[np.flatnonzero(self.data_file == file)[0]])  # rows of a file are consecutive
        columns = [*COORDINATES, *(camera.key for camera in self.cameras if camera.key not in self.videos)]
        try:
            with pq.ParquetFile(path) as parquet:
                for group in range(parquet.num_row_groups):
                    last = first + parquet.metadata.row_group(group).num_rows
                    if row < last:
                        table = parquet.read_row_group(group, columns=columns)
                        break
                    first = last
                else:
                    raise FrameDecodeError(
                        f"{self._name_row(row)}: expected in {path}, whose rows end at index {first - 1}: the file is"
                        " truncated"
                    )
        except (OSError, pa.ArrowException) as error:
            raise FrameDecodeError(f"{self._name_row(row)}: cannot read {path}: {one_line(error)}") from error
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise FrameDecodeError(
                f"{self._name_row(row)}: expected columns {', '.join(columns)} in {path}, found no"
                f" {', '.join(missing)}: the file is not this dataset's"
            )
        return (first, last), table

    def _read_images(self, camera: Camera, tables: list["pa.Table"], start: int, stop: int) -> NDArray[np.uint8]:
        images = np.empty((stop - start, camera.height, camera.width, 3), np.uint8)
        cells = (cell for table in tables for cell in table.column(camera.key).to_pylist())
        for image, row, cell in zip(images, range(start, stop), cells, strict=True):
            where = f"{self._name_row(row)}, camera {camera.key}"
            if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
                raise FrameDecodeError(f"{where}: expected an embedded image, found none in the data file")
            image[...] = _decode_image(cell["bytes"], camera, where)
        return images

    def _read_video(self, camera: Camera, start: int, timestamps: NDArray[np.float64]) -> NDArray[np.uint8]:
        column = self.videos[camera.key]
        index = np.arange(start, start + len(timestamps))
        episode = np.searchsorted(self.episode_start, index, side="right") - 1
        file, seconds = column.file[episode], column.from_timestamp[episode] + timestamps
        # One call decodes one stretch of one file; an edited dataset may jump within a file.
        breaks = np.flatnonzero((np.diff(file) != 0) | (np.diff(seconds) <= 0) | (np.diff(seconds) > 1.0)) + 1
        images = np.empty((len(index), camera.height, camera.width, 3), np.uint8)
        for part in np.split(np.arange(len(index)), breaks):
            path = self.root / column.paths[file[part[0]]]
            try:
                frames = self._video_file(camera, path).read(seconds[part].tolist(), self.tolerance_s)
            except Exception as error:  # PyAV has many for damaged bytes
                self._close_video(camera)
                raise self._name_bad_frame(camera, path, index[part], seconds[part], error) from error
            if frames.shape[1:] != images.shape[1:]:
                raise FrameDecodeError(
                    f"{self._name_row(int(index[part[0]]))}, camera {camera.key}: expected {list(images.shape[1:])},"
                    f" found {list(frames.shape[1:])} in {path}"
                )
            images[part] = frames
        return images

    def _video_file(self, camera: Camera, path: Path) -> VideoFile:
        """Return a camera's open video file; another one that is open is closed."""
        video = self._open_videos.get(camera.key)
        if video is None or video.path != path:
            self._close_video(camera)
            video = self._open_videos[camera.key] = VideoFile(path)
        return video

    def _close_video(self, camera: Camera) -> None:
        video = self._open_videos.pop(camera.key, None)
        if video is not None:
            video.close()

    def _name_bad_frame(
        self, camera: Camera, path: Path, index: NDArray[np.int64], seconds: NDArray[np.float64], error: Exception
    ) -> FrameDecodeError:
        """Find the frame that failed: try each alone, and name the first that fails."""
        if not path.is_file():
            return FrameDecodeError(
                f"{self._name_row(int(index[0]))}, camera {camera.key}: the video {path} is missing"
            )
        for row, second in zip(index, seconds, strict=True):
            try:
                with VideoFile(path) as video:
                    video.read([float(second)], self.tolerance_s)
            except Exception as single:  # noqa: BLE001 - as above
                return FrameDecodeError(
                    f"{self._name_row(int(row))}, camera {camera.key}: no frame within {self.tolerance_s:g} s of"
                    f" {second:.4f} s in {path} ({one_line(single)}): the video is cut off, damaged or of another"
                    " frame rate; if its time stamps are only inexact, pass --tolerance-s"
                )
        return FrameDecodeError(
            f"{self._name_row(int(index[0]))} to frame {self.locate(int(index[-1]))[1]}, camera {camera.key}:"
            f" {path} cannot be decoded as a whole: {one_line(error)}"
        )

    def _name_row(self, row: int) -> str:
        return name_row(self.episode_start, row)


def _decode_image(content: bytes, camera: Camera, where: str) -> NDArray[np.uint8]:
    """Decode an embedded image, uint8 [H, W, 3], turned as its EXIF orientation says, as `datasets.Image` does.

    The size is compared before the pixels are decoded, so that a small file cannot ask for gigabytes.
    """
    from PIL import Image, ImageOps

    expected = [camera.height, camera.width, 3]
    try:
        with Image.open(io.BytesIO(content)) as image:
            size = [image.height, image.width]
            fits = sorted(size) == sorted(expected[:2])
            pixels = np.asarray(ImageOps.exif_transpose(image)) if fits else None
    except Exception as error:  # Pillow has many for damaged bytes: OSError, SyntaxError, ValueError, its bomb errors
        raise FrameDecodeError(f"{where}: the image cannot be decoded: {one_line(error)}") from error
    if pixels is None:
        raise FrameDecodeError(f"{where}: expected {expected[:2]} pixels, found {size}")
    if pixels.dtype != np.uint8 or list(pixels.shape) != expected:
        raise FrameDecodeError(f"{where}: expected uint8 {expected}, found {pixels.dtype} {list(pixels.shape)}")
    return pixels
