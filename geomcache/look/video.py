"""An episode as a video: H.264 in yuv420p, which every ordinary player takes, at the dataset's frame rate."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import av.codec
import numpy as np
from PIL import Image

ENCODER, FALLBACK = "libx264", "mpeg4"  # MPEG-4 part 2 where PyAV was built without x264
QUALITY = {ENCODER: {"crf": "18"}, FALLBACK: {"qscale": "3"}}


def write_video(path: Path, pictures: Iterable[Image.Image], fps: float) -> None:
    """Write pictures of one size. An odd side loses its last pixel: yuv420p stores colour for two by two pixels."""
    encoder = ENCODER if ENCODER in av.codec.codecs_available else FALLBACK
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001), options=QUALITY[encoder])
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            pixels = np.asarray(picture)[: picture.height // 2 * 2, : picture.width // 2 * 2]
            stream.height, stream.width = pixels.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
