"""What a decoding worker does: read the images of a range of rows and turn them into the network's input."""

import pickle
import time
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch.utils.data import Dataset, get_worker_info

from geomcache.cache.signatures import Signatures
from geomcache.da3.encoder import DA3Preprocessor
from geomcache.errors import GeomcacheError
from geomcache.frames.reader import FrameReader
from geomcache.frames.signature import sign_pictures


@dataclass(frozen=True, kw_only=True)
class NetworkBatch:
    """The network's input for the rows `start` to `stop`."""

    start: int
    stop: int
    inputs: torch.Tensor | list[torch.Tensor]  # float32 [n, V, 3, H, W]; a list of [n, 3, H_v, W_v] if sizes differ
    decode_s: float
    preprocess_s: float
    signatures: Signatures  # of the pictures, as they were decoded

    def pin_memory(self) -> Self:
        """Copy into page-locked memory, which a GPU reads while it computes. Called by the loader's own thread."""
        inputs = self.inputs
        pinned = [view.pin_memory() for view in inputs] if isinstance(inputs, list) else inputs.pin_memory()
        return replace(self, inputs=pinned)


Handed = NetworkBatch | GeomcacheError | bytes
"""What a worker hands over: a batch, pickled if shared memory has no room for it, or the error of a frame."""


class BatchDecoder(Dataset[Handed]):
    """Maps a range of rows to the network's input. Runs in the workers.

    An error is returned, not raised: the loader would wrap its one line in a traceback.
    """

    def __init__(self, reader: FrameReader, preprocessor: DA3Preprocessor) -> None:
        self.reader, self.preprocessor = reader, preprocessor

    def __getitem__(self, rows: tuple[int, int]) -> Handed:
        batch = self.decode(*rows)
        is_worker = get_worker_info() is not None
        return hand_over(batch) if is_worker and isinstance(batch, NetworkBatch) else batch

    def decode(self, start: int, stop: int) -> NetworkBatch | GeomcacheError:
        """Read and preprocess the rows `start` to `stop`."""
        began = time.perf_counter()
        try:
            frames = self.reader.read(start, stop)
            signatures = sign_pictures(frames.images)
            decoded = time.perf_counter()
            inputs = self.preprocessor(frames.images)
        except GeomcacheError as error:
            return error
        done = time.perf_counter()
        return NetworkBatch(
            start=start,
            stop=stop,
            inputs=inputs,
            decode_s=decoded - began,
            preprocess_s=done - decoded,
            signatures=signatures,
        )


def hand_over(batch: NetworkBatch) -> NetworkBatch | bytes:
    """Move a batch to shared memory, or pickle it whole if there is no room.

    Left to itself, torch moves it later, in the thread that feeds the worker's queue: an error there is printed, the
    batch is dropped, and the loader waits for it forever.
    """
    try:
        for tensor in batch.inputs if isinstance(batch.inputs, list) else [batch.inputs]:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError):
        return pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)
    return batch


def open_batch(item: Handed, *, pin_memory: bool) -> NetworkBatch:
    """Return the batch that was handed over, or raise the error."""
    if isinstance(item, GeomcacheError):
        raise item
    if isinstance(item, bytes):
        batch: NetworkBatch = pickle.loads(item)  # noqa: S301 - a worker of this process pickled it
        return batch.pin_memory() if pin_memory else batch
    return item
