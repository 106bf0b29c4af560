"""Decoding in stage one: worker processes that turn pictures into the network's input, ahead of the forward."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from geomcache.cache.writer import Claim, StoreWriter
from geomcache.da3.encoder import DA3Preprocessor
from geomcache.errors import GeomcacheError, WorkerDiedError, one_line
from geomcache.extraction.sink import ShardSink
from geomcache.frames.reader import FrameReader


@dataclass(frozen=True, kw_only=True)
class Work:
    """One batch on its way from a worker: the network's input for the rows `start` to `stop`."""

    start: int
    stop: int
    inputs: torch.Tensor | list[torch.Tensor]
    decode_s: float
    preprocess_s: float

    def pin_memory(self) -> Self:
        """The same in page-locked memory, which a GPU copies from while it computes. The loader's thread calls it."""
        inputs = self.inputs
        pinned = [view.pin_memory() for view in inputs] if isinstance(inputs, list) else inputs.pin_memory()
        return replace(self, inputs=pinned)


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
    """Row ranges of batches, shard after shard, once; a shard is claimed when decoding gets to it."""

    def __init__(self, writer: StoreWriter, first: Claim, sink: ShardSink, batch_size: int) -> None:
        self._ranges = self._all(writer, first, sink, batch_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self._ranges

    @staticmethod
    def _all(writer: StoreWriter, first: Claim, sink: ShardSink, batch_size: int) -> Iterator[tuple[int, int]]:
        claim: Claim | None = first
        while claim is not None:
            sink.expect(claim)
            for start, stop in claim.rows:
                for row in range(start, stop, batch_size):
                    yield row, min(row + batch_size, stop)
            claim = writer.claim()


class ForkServer:
    """The process that workers are forked from. It imports LeRobot for seconds, once, while this one does other things.

    Not plain fork: this process has threads, and may have used CUDA.
    """

    def __init__(self) -> None:
        self._starting = threading.Thread(target=self._start, name="geomcache-fork-server", daemon=True)
        self._starting.start()

    @property
    def ready(self) -> bool:
        """Whether a worker would start at once."""
        return not self._starting.is_alive()

    @staticmethod
    def _start() -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["geomcache.extraction.decoding", "lerobot.datasets.video_utils"])
        first = context.Process(target=_nothing, daemon=True)  # the server answers when its imports are done
        first.start()
        first.join()


def decode(
    reader: FrameReader,
    preprocessor: DA3Preprocessor,
    batches: Batches,
    workers: int,
    *,
    server: ForkServer | None,
    pin_memory: bool,
) -> Iterator[Work]:
    """Network input, batch after batch, in the order of the claims.

    Args:
        reader: of the dataset.
        preprocessor: of the encoder.
        batches: which rows; taken ahead of what is given, by as many batches as the workers hold.
        workers: processes; 0 decodes in this one.
        server: where they come from; until it is ready, this process decodes by itself.
        pin_memory: whether a GPU reads the input.

    Raises:
        GeomcacheError: a frame cannot be decoded.
    """
    decoder = Decoder(reader, preprocessor)
    rows = iter(batches)
    while server is not None and not server.ready:
        batch = next(rows, None)
        if batch is None:
            return
        yield _raising(decoder[batch])
    loader: DataLoader[Work | GeomcacheError] = DataLoader(
        decoder,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
    )
    for work in loader:
        yield _raising(work)


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


def _raising(work: Work | GeomcacheError) -> Work:
    if isinstance(work, GeomcacheError):
        raise work
    return work


def _as_it_is(work: Any) -> Any:
    return work


def _nothing() -> None:
    pass
