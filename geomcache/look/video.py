"""An episode as a video: H.264 in yuv420p, which every ordinary player plays, at the dataset's frame rate."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import av.codec
import numpy as np
from numpy.typing import NDArray

from geomcache.errors import UserInputError

ENCODER, FALLBACK = "libx264", "mpeg4"  # MPEG-4 part 2 where PyAV was built without x264
MAX_FPS = 1000  # a cache's header may claim any rate, and a video's clock is a 32-bit integer
QUALITY = {ENCODER: {"crf": "18"}, FALLBACK: {"qscale": "3"}}


def write_video(path: Path, pictures: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Write pictures of one size, uint8 [H, W, 3].

    An odd side loses its last pixel: yuv420p stores colour for two by two pixels.

    Raises:
        UserInputError: more than `MAX_FPS` pictures a second.
    """
    if fps > MAX_FPS:
        raise UserInputError(f"dataset.fps: expected at most {MAX_FPS} for a video, found {fps}: write a .png or .rrd")
    encoder = ENCODER if ENCODER in av.codec.codecs_available else FALLBACK
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001), options=QUALITY[encoder])
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            height, width = (side // 2 * 2 for side in picture.shape[:2])
            stream.height, stream.width = height, width
            pixels = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
