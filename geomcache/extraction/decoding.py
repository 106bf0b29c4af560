"""Decoding in stage one: worker processes that turn images into the network's input, ahead of the encoder."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from geomcache.cache.writer import Claim, StoreWriter
from geomcache.da3.encoder import DA3Preprocessor
from geomcache.errors import GeomcacheError, WorkerDiedError, one_line
from geomcache.frames.reader import FrameReader


@dataclass(frozen=True, kw_only=True)
class NetworkBatch:
    """The network's input for the rows `start` to `stop`."""

    start: int
    stop: int
    inputs: torch.Tensor | list[torch.Tensor]  # float32 [n, V, 3, H, W]; a list of [n, 3, H_v, W_v] if sizes differ
    decode_s: float
    preprocess_s: float

    def pin_memory(self) -> Self:
        """Copy into page-locked memory, which a GPU reads while it computes. Called by the loader's own thread."""
        inputs = self.inputs
        pinned = [view.pin_memory() for view in inputs] if isinstance(inputs, list) else inputs.pin_memory()
        return replace(self, inputs=pinned)


class BatchDecoder(Dataset[NetworkBatch | GeomcacheError]):
    """Maps a range of rows to the network's input. Runs in the workers.

    An error is returned, not raised: the loader would wrap its one line in a traceback.
    """

    def __init__(self, reader: FrameReader, preprocessor: DA3Preprocessor) -> None:
        self.reader, self.preprocessor = reader, preprocessor

    def __getitem__(self, rows: tuple[int, int]) -> NetworkBatch | GeomcacheError:
        start, stop = rows
        began = time.perf_counter()
        try:
            frames = self.reader.read(start, stop)
            decoded = time.perf_counter()
            inputs = self.preprocessor(frames.images)
        except GeomcacheError as error:
            return error
        done = time.perf_counter()
        return NetworkBatch(
            start=start, stop=stop, inputs=inputs, decode_s=decoded - began, preprocess_s=done - decoded
        )


class ClaimedRanges(Sampler[tuple[int, int]]):
    """The row ranges of batches, shard after shard, once; a shard is claimed when decoding reaches it.

    Args:
        writer: hands out the claims.
        first: the claim to begin with.
        batch_size: rows of a batch, at most; a batch never spans two claims.
        on_claim: is called with each claim before its first range is given out.
    """

    def __init__(
        self, writer: StoreWriter, first: Claim, batch_size: int, *, on_claim: Callable[[Claim], None]
    ) -> None:
        self._ranges = self._generate(writer, first, batch_size, on_claim)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self._ranges

    @staticmethod
    def _generate(
        writer: StoreWriter, first: Claim, batch_size: int, on_claim: Callable[[Claim], None]
    ) -> Iterator[tuple[int, int]]:
        claim: Claim | None = first
        while claim is not None:
            on_claim(claim)
            for start, stop in claim.rows:
                for row in range(start, stop, batch_size):
                    yield row, min(row + batch_size, stop)
            claim = writer.claim()


class ForkServer:
    """The process that workers are forked from; it imports LeRobot once, for seconds, while this one does other things.

    Workers are not plain forks of this process, which has threads and may have used CUDA.
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
        first = context.Process(target=_do_nothing, daemon=True)  # the server answers once its imports are done
        first.start()
        first.join()


def decode(
    reader: FrameReader,
    preprocessor: DA3Preprocessor,
    ranges: ClaimedRanges,
    workers: int,
    *,
    server: ForkServer | None,
    pin_memory: bool,
) -> Iterator[NetworkBatch]:
    """Yield the network's input, batch after batch, in the order of the ranges.

    Args:
        reader: of the dataset.
        preprocessor: of the encoder.
        ranges: which rows; consumed ahead of what is yielded, by as many batches as the workers hold.
        workers: processes; 0 decodes in this one.
        server: forks the workers; until it is ready, this process decodes.
        pin_memory: whether a GPU reads the input.

    Raises:
        GeomcacheError: a frame cannot be decoded.
    """
    decoder = BatchDecoder(reader, preprocessor)
    pending_ranges = iter(ranges)
    while server is not None and not server.ready:
        rows = next(pending_ranges, None)
        if rows is None:
            return
        yield _raise_error(decoder[rows])
    loader: DataLoader[NetworkBatch | GeomcacheError] = DataLoader(
        decoder,
        batch_size=None,
        sampler=ranges,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
    )
    for batch in loader:
        yield _raise_error(batch)


@contextmanager
def naming_worker_death() -> Iterator[None]:
    """Turn torch's error for a dead worker, which its signal handler raises anywhere, into one line."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise WorkerDiedError(
            f"a decoding process died ({one_line(error)}): often for lack of memory; run the same command again to"
            " resume, with fewer --num-workers or a smaller --batch-size"
        ) from error


def _raise_error(batch: NetworkBatch | GeomcacheError) -> NetworkBatch:
    if isinstance(batch, GeomcacheError):
        raise batch
    return batch


def _unchanged(batch: Any) -> Any:
    return batch


def _do_nothing() -> None:
    pass
