"""What a decoding worker does: read the images of a range of rows and turn them into the network's input.

Where earlier caches have the geometry of these images, it is read instead.
"""

import time
from dataclasses import dataclass, replace
from typing import Self

import torch

from geomcache.cache.signatures import Signatures
from geomcache.da3.preprocess import DA3Preprocessor
from geomcache.frames.reader import FrameReader
from geomcache.frames.signature import sign_pictures
from geomcache.pipeline.carry import Carried, Carrier


@dataclass(frozen=True, kw_only=True)
class NetworkBatch:
    """The network's input for those of the rows `start` to `stop` that have to be encoded."""

    start: int
    stop: int
    inputs: torch.Tensor | list[torch.Tensor] | None
    """uint8 [n, V, H, W, 3]; a list of [n, H_v, W_v, 3] if sizes differ; None where no row has to be encoded."""
    decode_s: float
    preprocess_s: float
    signatures: Signatures  # of the pictures of all rows, as they were decoded
    carried: Carried | None = None
    """The other rows; None if there are no earlier caches."""

    def pin_memory(self) -> Self:
        """Copy into page-locked memory, which a GPU reads while it computes."""
        inputs = self.inputs
        if inputs is None:
            return self
        pinned = [view.pin_memory() for view in inputs] if isinstance(inputs, list) else inputs.pin_memory()
        return replace(self, inputs=pinned)


class BatchDecoder:
    """Makes the network's input from a range of rows. Can be pickled, as its reader can.

    Args:
        reader: of the dataset.
        preprocessor: of the encoder; None to sign the pictures alone.
        carrier: finds rows that earlier caches have.
    """

    def __init__(
        self, reader: FrameReader, preprocessor: DA3Preprocessor | None, carrier: Carrier | None = None
    ) -> None:
        self.reader, self.preprocessor, self.carrier = reader, preprocessor, carrier

    def decode(self, start: int, stop: int) -> NetworkBatch:
        """Read and preprocess the rows `start` to `stop`.

        Raises:
            GeomcacheError: a frame cannot be decoded.
        """
        began = time.perf_counter()
        images = self.reader.read(start, stop).images
        signatures = sign_pictures(images)
        carried = None
        if self.carrier is not None:
            carried = self.carrier.carry(start, signatures)
            images = tuple(view[~carried.is_carried] for view in images)
        decoded = time.perf_counter()
        inputs = None
        if self.preprocessor is not None and len(images[0]):
            inputs = self.preprocessor(images)
        done = time.perf_counter()
        return NetworkBatch(
            start=start,
            stop=stop,
            inputs=inputs,
            decode_s=decoded - began,
            preprocess_s=done - decoded,
            signatures=signatures,
            carried=carried,
        )
