"""Decoding in stage one: worker processes that turn pictures into the network's input, ahead of the forward."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from geomcache.encoder import DA3Preprocessor
from geomcache.errors import GeomcacheError, WorkerDiedError, one_line
from geomcache.frames import FrameReader
from geomcache.sink import ShardSink
from geomcache.writer import Claim, StoreWriter


@dataclass(frozen=True, kw_only=True)
class Work:
    """One batch on its way from a worker: the network's input for the rows `start` to `stop`."""

    start: int
    stop: int
    inputs: torch.Tensor | list[torch.Tensor]
    decode_s: float
    preprocess_s: float


class Decoder(Dataset[Work | GeomcacheError]):
    """Row range -> network input. Runs in the workers.

    An error travels as a value: raised there, the loader would wrap its line in a traceback.
    """

    def __init__(self, reader: FrameReader, preprocessor: DA3Preprocessor) -> None:
        self.reader, self.preprocessor = reader, preprocessor

    def __getitem__(self, rows: tuple[int, int]) -> Work | GeomcacheError:
        start, stop = rows
        began = time.perf_counter()
        try:
            batch = self.reader.read(start, stop)
            decoded = time.perf_counter()
            inputs = self.preprocessor(batch.images)
        except GeomcacheError as error:
            return error
        done = time.perf_counter()
        return Work(start=start, stop=stop, inputs=inputs, decode_s=decoded - began, preprocess_s=done - decoded)


class Batches(Sampler[tuple[int, int]]):
    """Row ranges of batches, shard after shard; a shard is claimed when decoding gets to it."""

    def __init__(self, writer: StoreWriter, first: Claim, sink: ShardSink, batch_size: int) -> None:
        self.writer, self.first, self.sink, self.batch_size = writer, first, sink, batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        claim: Claim | None = self.first
        while claim is not None:
            self.sink.expect(claim)
            for start, stop in claim.rows:
                for row in range(start, stop, self.batch_size):
                    yield row, min(row + self.batch_size, stop)
            claim = self.writer.claim()


def decode(reader: FrameReader, preprocessor: DA3Preprocessor, batches: Batches, workers: int) -> Iterator[Work]:
    """Network input, batch after batch, in the order of the claims.

    Args:
        reader: of the dataset.
        preprocessor: of the encoder.
        batches: which rows; taken ahead of what is given, by as many batches as the workers hold.
        workers: processes; 0 decodes in this one.

    Raises:
        GeomcacheError: a frame cannot be decoded.
    """
    loader: DataLoader[Work | GeomcacheError] = DataLoader(
        Decoder(reader, preprocessor),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        # Not fork: this process has threads, and may have used CUDA.
        multiprocessing_context="forkserver" if workers else None,
        collate_fn=_as_it_is,
    )
    for work in loader:
        if isinstance(work, GeomcacheError):
            raise work
        yield work


@contextmanager
def naming_worker_death() -> Iterator[None]:
    """One line instead of torch's error for a dead worker, which its signal handler raises at any place."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise WorkerDiedError(
            f"a decoding process died ({one_line(error)}): often for lack of memory; give the same command again, it"
            " goes on, with fewer --num-workers or a smaller --batch-size"
        ) from error


def _as_it_is(work: Any) -> Any:
    return work


def start_fork_server() -> None:
    """Import what decoding needs in the process that workers are forked from, while this one loads the model."""
    multiprocessing.set_forkserver_preload(["geomcache.decoding", "lerobot.datasets.video_utils"])
    forkserver.ensure_running()
