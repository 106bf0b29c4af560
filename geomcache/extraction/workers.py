"""Decoding ahead of the encoder, in worker processes that are watched, or in this process if they cannot work."""

import logging
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Sampler

from geomcache.cache.writer import Claim, StoreWriter
from geomcache.errors import WorkerDiedError, one_line
from geomcache.extraction.decoding import BatchDecoder, Handed, NetworkBatch, open_batch
from geomcache.progress import human_bytes

logger = logging.getLogger(__name__)

WATCH_S = 30  # after so long without a batch, the workers are examined
IDLE_S = 1.0  # processor seconds of all workers in that time below which they are not working
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where torch puts the tensors that processes share

RowRange = tuple[int, int]


def claimed_ranges(
    writer: StoreWriter, first: Claim, batch_size: int, *, on_claim: Callable[[Claim], None]
) -> Iterator[RowRange]:
    """Yield the row ranges of batches, shard after shard; a shard is claimed when decoding reaches it.

    Args:
        writer: hands out the claims.
        first: the claim to begin with.
        batch_size: rows of a batch, at most; a batch never spans two claims.
        on_claim: called with each claim before its first range is yielded.
    """
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
    decoder: BatchDecoder, ranges: Iterator[RowRange], workers: int, *, server: ForkServer | None, pin_memory: bool
) -> Iterator[NetworkBatch]:
    """Yield the network's input, batch after batch, in the order of the ranges.

    Args:
        decoder: of the dataset and the encoder.
        ranges: which rows; consumed ahead of what is yielded, by as many batches as the workers hold.
        workers: processes; 0 decodes in this one.
        server: forks the workers; until it is ready, this process decodes.
        pin_memory: whether a GPU reads the input.

    Raises:
        GeomcacheError: a frame cannot be decoded.
    """
    if workers and server is not None:
        while not server.ready:
            rows = next(ranges, None)
            if rows is None:
                return
            yield open_batch(decoder[rows], pin_memory=False)
    if workers:
        outstanding = _Outstanding(ranges)
        for item in _decode_in_workers(decoder, outstanding, workers, pin_memory):
            yield open_batch(item, pin_memory=pin_memory)
        ranges = outstanding.rest()
    for rows in ranges:
        yield open_batch(decoder[rows], pin_memory=False)


class _Outstanding(Sampler[RowRange]):
    """Passes ranges on to the workers, and remembers those whose batches have not come back."""

    def __init__(self, ranges: Iterator[RowRange]) -> None:
        self._ranges = ranges
        self._outstanding: deque[RowRange] = deque()

    def __iter__(self) -> Iterator[RowRange]:
        for rows in self._ranges:
            self._outstanding.append(rows)
            yield rows

    def arrived(self) -> None:
        """Note that the batch of the oldest range has come back."""
        self._outstanding.popleft()

    def rest(self) -> Iterator[RowRange]:
        """Yield the ranges that have not come back, then those that were never passed on."""
        yield from self._outstanding
        yield from self._ranges


def _decode_in_workers(decoder: BatchDecoder, ranges: _Outstanding, workers: int, pin_memory: bool) -> Iterator[Handed]:
    """Yield what the workers hand over, in order; end early, with a warning, if nothing comes any more."""
    loader: DataLoader[Handed] = DataLoader(
        decoder,
        batch_size=None,
        sampler=ranges,
        num_workers=workers,
        multiprocessing_context="forkserver",
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        timeout=WATCH_S,
    )
    others = set(multiprocessing.active_children())
    try:
        items = iter(loader)
    except OSError as error:  # such as no room in shared memory for the semaphores of the queues
        logger.warning("cannot start decoding processes (%s): decoding in this process, slower", one_line(error))
        return
    watch = _Watch(set(multiprocessing.active_children()) - others)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if str(error).startswith(("DataLoader worker", "Caught ")):  # a worker died, or raised
                raise
            if not watch.can_go_on(error):
                return
            continue
        watch.note(item)
        ranges.arrived()
        yield item


class _Watch:
    """Looks at the workers when no batch comes: a loader alone would wait forever."""

    def __init__(self, workers: set[BaseProcess]) -> None:
        self._workers, self._pickled = workers, False
        self._used_s = self._cpu_seconds()

    def can_go_on(self, error: Exception) -> bool:
        """Say what is waited for; False, with the workers killed, if they are idle or their queue has failed."""
        used_s, self._used_s = self._used_s, self._cpu_seconds()
        if str(error).startswith("DataLoader timed out") and self._used_s - used_s > IDLE_S:
            logger.warning("no batch from the decoding processes for %d s; they are at work, waiting on", WATCH_S)
            return True
        logger.warning(
            "no batch from the decoding processes, which are idle (%s; %s of shared memory is free): decoding in this"
            " process instead, slower",
            one_line(error),
            _free_shared_memory(),
        )
        for worker in self._workers:
            worker.kill()  # even one that was stopped, for which the loader would wait
        return False

    def note(self, item: Handed) -> None:
        """Say once that batches do not fit into shared memory."""
        if isinstance(item, bytes) and not self._pickled:
            self._pickled = True
            logger.warning(
                "%s: no room for a batch of %s (%s is free): batches go through pipes, which is slower; give a"
                " container more with --shm-size",
                SHARED_MEMORY,
                human_bytes(len(item)),
                _free_shared_memory(),
            )

    def _cpu_seconds(self) -> float:
        """Return the processor time that the workers have used so far."""
        ticks = 0
        for worker in self._workers:
            with suppress(OSError):  # it is gone
                fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])  # user and system time, proc(5)
        return ticks / os.sysconf("SC_CLK_TCK")


def _free_shared_memory() -> str:
    try:
        return human_bytes(shutil.disk_usage(SHARED_MEMORY).free)
    except OSError as error:
        return f"nothing ({error.strerror})"


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


def _unchanged(item: Any) -> Any:
    return item


def _do_nothing() -> None:
    pass
