"""What a decoding worker does: read the images of a range of rows and turn them into the network's input."""

import time
from dataclasses import dataclass, replace
from typing import Self

import torch

from geomcache.cache.signatures import Signatures
from geomcache.da3.encoder import DA3Preprocessor
from geomcache.frames.reader import FrameReader
from geomcache.frames.signature import sign_pictures


@dataclass(frozen=True, kw_only=True)
class NetworkBatch:
    """The network's input for the rows `start` to `stop`."""

    start: int
    stop: int
    inputs: torch.Tensor | list[torch.Tensor]  # uint8 [n, V, H, W, 3]; a list of V [n, H_v, W_v, 3] if sizes differ
    decode_s: float
    preprocess_s: float
    signatures: Signatures  # of the pictures, as they were decoded

    def pin_memory(self) -> Self:
        """Copy into page-locked memory, which a GPU reads while it computes."""
        inputs = self.inputs
        pinned = [view.pin_memory() for view in inputs] if isinstance(inputs, list) else inputs.pin_memory()
        return replace(self, inputs=pinned)


class BatchDecoder:
    """Makes the network's input from a range of rows. Can be pickled, as its reader can."""

    def __init__(self, reader: FrameReader, preprocessor: DA3Preprocessor) -> None:
        self.reader, self.preprocessor = reader, preprocessor

    def decode(self, start: int, stop: int) -> NetworkBatch:
        """Read and preprocess the rows `start` to `stop`.

        Raises:
            GeomcacheError: a frame cannot be decoded.
        """
        began = time.perf_counter()
        frames = self.reader.read(start, stop)
        signatures = sign_pictures(frames.images)
        decoded = time.perf_counter()
        inputs = self.preprocessor(frames.images)
        done = time.perf_counter()
        return NetworkBatch(
            start=start,
            stop=stop,
            inputs=inputs,
            decode_s=decoded - began,
            preprocess_s=done - decoded,
            signatures=signatures,
        )
