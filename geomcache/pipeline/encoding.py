"""Encoding in stage one: batches of network input in, batches of geometry out, in the same order.

Rows that are carried over from an earlier cache take their place among those that are encoded. The encoder is loaded
when the first row needs it.
"""

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
from geomcache.pipeline.batch_size import memory_error
from geomcache.pipeline.carry import Carried
from geomcache.pipeline.decoding import NetworkBatch

logger = logging.getLogger(__name__)

MOST_NAMED = 4  # maps with NaN that a message lists


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """The geometry of the rows `start` to `stop`, on the host."""

    start: int
    stop: int
    maps: dict[str, NDArray[np.float16]]  # output -> [n, V, h, w(, 6)]
    signatures: Signatures  # of the pictures that the maps belong to
    places: NDArray[np.int64] | None
    """Where rows were carried over from, [n], -1 for those that were encoded; None if there are no earlier caches."""

    @property
    def encoded(self) -> int:
        """Return how many of the rows were encoded."""
        return self.stop - self.start if self.places is None else int((self.places < 0).sum())


class _PendingBatch(NamedTuple):
    """Rows whose geometry the device is computing."""

    batch: NetworkBatch
    start: int
    stop: int
    geometry: PendingGeometry | None
    """Of those among the rows that have to be encoded; None if there are none."""


class EncoderOnDemand:
    """An encoder that is loaded when it is first asked for, and is kept.

    Args:
        load: loads it.
    """

    def __init__(self, load: Callable[[], DA3Encoder]) -> None:
        self._load = load
        self.loaded: DA3Encoder | None = None
        """The encoder, if it was needed."""

    def get(self) -> DA3Encoder:
        """Return the encoder. Raises what loading it raises."""
        if self.loaded is None:
            self.loaded = self._load()
        return self.loaded

    @property
    def on_gpu(self) -> bool:
        """Return whether it is loaded, and on a GPU."""
        return self.loaded is not None and self.loaded.device.type == "cuda"


class BatchEncoder:
    """The encoder over a sequence of batches: keeps a GPU busy, and shrinks the batch when memory runs out.

    Args:
        encoder: loaded when a row needs it.
        batch_size: frames per forward pass, at most.
        locate: names a row's episode and frame, for messages.
    """

    def __init__(self, encoder: EncoderOnDemand, batch_size: int, locate: Callable[[int], tuple[int, int]]) -> None:
        self._encoder, self._batch_size, self._locate = encoder, batch_size, locate
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
                # A GPU is given the next batch before the results of the one before it are awaited.
                while len(pending) > (1 if self._encoder.on_gpu else 0):
                    yield self._finish(pending.popleft())
        while pending:
            yield self._finish(pending.popleft())

    def _start(self, batch: NetworkBatch) -> Iterator[_PendingBatch]:
        needed = np.ones(batch.stop - batch.start, bool) if batch.carried is None else ~batch.carried.is_carried
        before = np.concatenate([[0], np.cumsum(needed)])  # how many rows before each one have to be encoded
        start = 0
        while start < len(needed):
            stop = int(before.searchsorted(before[start] + self._batch_size, "right")) - 1
            first, last = int(before[start]), int(before[stop])
            geometry = None
            if last > first:
                began = time.perf_counter()
                geometry = self._launch(batch, first, last)
                self.encode_s += time.perf_counter() - began
                if geometry is None:
                    self._halve(last - first)
                    continue
            yield _PendingBatch(batch, start, stop, geometry)
            start = stop

    def _launch(self, batch: NetworkBatch, first: int, last: int) -> PendingGeometry | None:
        """Start the forward pass of these of the rows to encode; None if memory does not suffice."""
        assert batch.inputs is not None
        part = slice(first, last)
        inputs = [view[part] for view in batch.inputs] if isinstance(batch.inputs, list) else batch.inputs[part]
        try:
            return self._encoder.get().launch(inputs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None  # outside the handler, whose traceback would keep the device's memory alive

    def _halve(self, frames: int) -> None:
        encoder = self._encoder.get()
        if frames == 1:
            raise memory_error(encoder)
        self._batch_size = frames // 2
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.info(
            "%s: out of memory with a batch of %d frames; continuing with %d",
            encoder.device,
            frames,
            self._batch_size,
        )

    def _finish(self, pending: _PendingBatch) -> EncodedBatch:
        batch, part = pending.batch, slice(pending.start, pending.stop)
        encoded: dict[str, NDArray[np.float16]] = {}
        if pending.geometry is not None:
            began = time.perf_counter()
            encoded = self._wait(pending, pending.geometry)
            self.encode_s += time.perf_counter() - began
        carried = batch.carried
        return EncodedBatch(
            start=batch.start + pending.start,
            stop=batch.start + pending.stop,
            maps=encoded if carried is None else _merge(encoded, carried, part),
            signatures=batch.signatures[part],
            places=None if carried is None else carried.places[part],
        )

    def _wait(self, pending: _PendingBatch, geometry: PendingGeometry) -> dict[str, NDArray[np.float16]]:
        try:
            return {name: values.numpy() for name, values in geometry.result().items()}
        except NonFiniteGeometryError as error:
            part, carried = slice(pending.start, pending.stop), pending.batch.carried
            needed = np.ones(pending.stop - pending.start, bool) if carried is None else ~carried.is_carried[part]
            rows = (pending.batch.start + pending.start + np.flatnonzero(needed)).tolist()
            names = [self._name_map(rows[b], view, name) for b, view, name in error.places[:MOST_NAMED]]
            raise NonFiniteGeometryError(
                f"{'; '.join(names)}: the encoder gave NaN: check the weights, or try --dtype fp32", error.places
            ) from error

    def _name_map(self, row: int, view: int, output: str) -> str:
        episode, frame = self._locate(row)
        return f"episode {episode} frame {frame} camera {self._encoder.get().spec.camera_keys[view]} {output}"


def _merge(encoded: dict[str, NDArray[np.float16]], carried: Carried, part: slice) -> dict[str, NDArray[np.float16]]:
    """Put the maps of the encoded rows of a part, and of those that were carried over, into the order of the rows."""
    is_carried = carried.is_carried
    first = int(is_carried[: part.start].sum())
    here = is_carried[part]
    taken = {name: values[first : first + int(here.sum())] for name, values in carried.maps.items()}
    if here.all():
        return taken
    if not here.any():
        return encoded
    merged = {}
    for name, values in encoded.items():
        merged[name] = np.empty((len(here), *values.shape[1:]), np.float16)
        merged[name][here], merged[name][~here] = taken[name], values
    return merged
