"""Encoding in stage one: batches of network input in, batches of geometry out, in the same order."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache.signatures import Signatures
from geomcache.da3.encoder import DA3Encoder, PendingGeometry
from geomcache.da3.engine import is_out_of_memory
from geomcache.errors import NonFiniteGeometryError
from geomcache.extraction.batch_size import memory_error
from geomcache.extraction.decoding import NetworkBatch

logger = logging.getLogger(__name__)

MOST_NAMED = 4  # maps with NaN that a message lists


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """The geometry of the rows `start` to `stop`, on the host."""

    start: int
    stop: int
    maps: dict[str, NDArray[np.float16]]  # output -> [n, V, h, w(, 6)]
    signatures: Signatures  # of the pictures that the maps were made from


class _PendingBatch(NamedTuple):
    """Rows whose geometry the device is computing."""

    start: int
    stop: int
    geometry: PendingGeometry
    signatures: Signatures


class BatchEncoder:
    """The encoder over a sequence of batches: keeps a GPU busy, and shrinks the batch when memory runs out.

    Args:
        encoder: on its device.
        batch_size: frames per forward pass, at most.
        locate: names a row's episode and frame, for messages.
    """

    def __init__(self, encoder: DA3Encoder, batch_size: int, locate: Callable[[int], tuple[int, int]]) -> None:
        self._encoder, self._batch_size, self._locate = encoder, batch_size, locate
        # A GPU is given the next batch before the results of the one before it are awaited.
        self._ahead = 1 if encoder.device.type == "cuda" else 0
        self.encode_s = 0.0

    def encode(self, batches: Iterable[NetworkBatch]) -> Iterator[EncodedBatch]:
        """Yield the geometry of each batch, in one part, or in several if memory does not suffice.

        Raises:
            EncoderMemoryError: there is no memory even for one frame.
            NonFiniteGeometryError: the network gave NaN; the message names episode, frame and camera.
        """
        pending: deque[_PendingBatch] = deque()
        for batch in batches:
            for started in self._start(batch):
                pending.append(started)
                while len(pending) > self._ahead:
                    yield self._finish(pending.popleft())
        while pending:
            yield self._finish(pending.popleft())

    def _start(self, batch: NetworkBatch) -> Iterator[_PendingBatch]:
        start = batch.start
        while start < batch.stop:
            stop = min(start + self._batch_size, batch.stop)
            began = time.perf_counter()
            geometry = self._launch(batch, start, stop)
            self.encode_s += time.perf_counter() - began
            if geometry is None:
                self._halve(stop - start)
            else:
                signatures = batch.signatures[start - batch.start : stop - batch.start]
                yield _PendingBatch(start, stop, geometry, signatures)
                start = stop

    def _launch(self, batch: NetworkBatch, start: int, stop: int) -> PendingGeometry | None:
        """Start the forward pass of these rows; None if memory does not suffice."""
        part = slice(start - batch.start, stop - batch.start)
        inputs = [view[part] for view in batch.inputs] if isinstance(batch.inputs, list) else batch.inputs[part]
        try:
            return self._encoder.launch(inputs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None  # outside the handler, whose traceback would keep the device's memory alive

    def _halve(self, frames: int) -> None:
        if frames == 1:
            raise memory_error(self._encoder)
        self._batch_size = frames // 2
        if self._encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.info(
            "%s: out of memory with a batch of %d frames; continuing with %d",
            self._encoder.device,
            frames,
            self._batch_size,
        )

    def _finish(self, pending: _PendingBatch) -> EncodedBatch:
        began = time.perf_counter()
        try:
            geometry = pending.geometry.result()
        except NonFiniteGeometryError as error:
            names = [self._name_map(pending.start + b, view, name) for b, view, name in error.places[:MOST_NAMED]]
            raise NonFiniteGeometryError(
                f"{'; '.join(names)}: the encoder gave NaN: check the weights, or try --dtype fp32", error.places
            ) from error
        maps = {name: values.numpy() for name, values in geometry.items()}
        self.encode_s += time.perf_counter() - began
        return EncodedBatch(start=pending.start, stop=pending.stop, maps=maps, signatures=pending.signatures)

    def _name_map(self, row: int, view: int, output: str) -> str:
        episode, frame = self._locate(row)
        return f"episode {episode} frame {frame} camera {self._encoder.spec.camera_keys[view]} {output}"
