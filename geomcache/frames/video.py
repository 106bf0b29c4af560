"""Video files that stay open while their frames are read: the only place that decodes video in stage one.

The pixels are those of LeRobot's `decode_video_frames` with PyAV, to the bit. LeRobot opens the file for every call and
decodes from the key frame before the first frame that is asked for. Stage one asks for all frames in order: a file that
stays open is opened once for as many batches as follow each other, and each frame is decoded once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import av

FORWARD_S = 1.0  # how far ahead of the last frame decoding just continues; beyond, it seeks the key frame before


class VideoFile:
    """A video file, open at the frame that was read last."""

    def __init__(self, path: Path) -> None:
        import av

        self.path = path
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        self._decoded: Iterator[tuple[float, av.VideoFrame]] = iter(())
        self._recent: list[tuple[float, av.VideoFrame]] = []  # the two frames that were decoded last

    def read(self, seconds: Sequence[float], tolerance_s: float) -> NDArray[np.uint8]:
        """Read the frames at these ascending time stamps, uint8 [n, H, W, 3], RGB.

        Raises:
            ValueError: a frame is not within the tolerance of its time stamp.
            Exception: whatever PyAV raises for damaged bytes.
        """
        first, last = seconds[0], seconds[-1]
        near = list(self._recent) if self._can_continue(first) else self._seek(first)
        if not near or near[-1][0] < last:
            for time, frame in self._decoded:
                if time < first:
                    del near[:-1]
                near.append((time, frame))
                if time >= last:
                    break
        self._recent = near[-2:]
        if not near:
            raise ValueError(f"no frame from {first:.4f} s on")
        distances = np.abs(np.array([time for time, _ in near]) - np.array(seconds)[:, None])  # [n, decoded]
        nearest = distances.argmin(axis=1)
        wrong = np.flatnonzero(~(distances.min(axis=1) < tolerance_s))
        if len(wrong):
            found = near[int(nearest[wrong[0]])][0]
            raise ValueError(f"the nearest frame to {seconds[wrong[0]]:.4f} s is at {found:.4f} s")
        return np.stack([near[index][1].to_ndarray(format="rgb24") for index in nearest.tolist()])

    def _can_continue(self, first: float) -> bool:
        """Return whether the frames that were decoded last, and those that follow, have the one nearest to `first`."""
        return bool(self._recent) and self._recent[0][0] <= first <= self._recent[-1][0] + FORWARD_S

    def _seek(self, first: float) -> list[tuple[float, "av.VideoFrame"]]:
        """Go to the key frame at or before a time stamp, with a margin of one frame, as LeRobot does."""
        time_base = self._stream.time_base
        assert time_base is not None, "a video stream without a time base"
        offset = round(first / time_base) - 1
        self._container.seek(offset, backward=True, any_frame=False, stream=self._stream)
        frames = (frame for frame in self._container.decode(self._stream) if frame.pts is not None)
        self._decoded = ((float(frame.pts * time_base), frame) for frame in frames)
        return []

    def close(self) -> None:
        """Close the file."""
        self._decoded, self._recent = iter(()), []
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
