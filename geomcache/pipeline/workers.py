"""Decoding ahead of the encoder, in worker processes that are watched, or in this process if they cannot work."""

import logging
import multiprocessing
import signal
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, cycle

import torch

from geomcache.cache.writer import Claim
from geomcache.errors import WorkerDiedError, one_line
from geomcache.pipeline.decoding import BatchDecoder, NetworkBatch
from geomcache.pipeline.handover import open_channel, receive, send
from geomcache.waits import activity, waiting

logger = logging.getLogger(__name__)

WATCH_S = 30.0  # after so long without a batch, the worker is examined
IDLE_S = 1.0  # processor seconds in that time below which it is not working
AHEAD = 2  # batches that a worker is asked for at a time

RowRange = tuple[int, int]


def claimed_ranges(
    claim_next: Callable[[], Claim | None], first: Claim, batch_size: int, *, on_claim: Callable[[Claim], None]
) -> Iterator[RowRange]:
    """Yield the row ranges of batches, shard after shard; a shard is claimed when decoding reaches it.

    Args:
        claim_next: returns the next claim; None if there is none.
        first: the claim to begin with.
        batch_size: rows of a batch, at most; a batch never spans two claims.
        on_claim: called with each claim before its first range is yielded.
    """
    claim: Claim | None = first
    while claim is not None:
        on_claim(claim)
        yield from batch_ranges(claim, batch_size)
        claim = claim_next()


def batch_ranges(claim: Claim, batch_size: int) -> Iterator[RowRange]:
    """Yield the row ranges of a claim's batches: the same ones whoever makes the shard, and so the same numbers."""
    for start, stop in claim.rows:
        for row in range(start, stop, batch_size):
            yield row, min(row + batch_size, stop)


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
        context.set_forkserver_preload([__name__, "lerobot.datasets.video_utils"])
        first = context.Process(target=_do_nothing, daemon=True)  # the server answers once its imports are done
        first.start()
        first.join()


def decode(
    decoder: BatchDecoder, ranges: Iterator[RowRange], workers: int, *, server: ForkServer | None
) -> Generator[NetworkBatch, None, None]:
    """Yield the network's input, batch after batch, in the order of the ranges.

    Args:
        decoder: of the dataset and the encoder.
        ranges: which rows; consumed ahead of what is yielded, by two batches for each worker.
        workers: processes; 0 decodes in this one.
        server: forks the workers; until it is ready, a thread of this process decodes.

    Raises:
        GeomcacheError: a frame cannot be decoded.
        WorkerDiedError: a worker was killed, or crashed.
    """
    if workers and server is not None:
        with waiting("waiting for decoding processes to start; this process decodes meanwhile"):
            yield from _decode_in_thread(decoder, ranges, server)
    if workers:
        ranges = yield from _decode_in_workers(decoder, ranges, workers)
    for rows in ranges:
        yield decoder.decode(*rows)


def _decode_in_thread(
    decoder: BatchDecoder, ranges: Iterator[RowRange], server: ForkServer
) -> Generator[NetworkBatch, None, None]:
    """Yield batches in order until the server is ready, decoded while the encoder works.

    One thread, because the reader keeps the row group that it read last.
    """
    pending = deque[Future[NetworkBatch]]()
    with ThreadPoolExecutor(1, "geomcache-decode") as pool:
        while True:
            while not server.ready and len(pending) < AHEAD and (rows := next(ranges, None)) is not None:
                pending.append(pool.submit(decoder.decode, *rows))
            if not pending:
                return
            yield pending.popleft().result()


def _decode_in_workers(
    decoder: BatchDecoder, ranges: Iterator[RowRange], count: int
) -> Generator[NetworkBatch, None, Iterator[RowRange]]:
    """Yield batches in order; return the ranges that are left, if the workers have to be given up."""
    workers = list[_Worker]()
    pending = deque[tuple[_Worker, RowRange]]()
    try:
        for _ in range(count):
            workers.append(_Worker(decoder))
        for worker, rows in zip(cycle(workers), ranges, strict=False):
            pending.append((worker, rows))
            worker.request(rows)
            if len(pending) > AHEAD * count:
                batch = pending[0][0].next_batch()
                pending.popleft()
                yield batch
        while pending:
            batch = pending[0][0].next_batch()
            pending.popleft()
            yield batch
    except _HandoverError as error:
        logger.warning("%s: decoding in this process instead, which is slower", error)
    finally:
        for worker in workers:
            worker.kill()
    return chain([rows for _, rows in pending], ranges)


class _HandoverError(Exception):
    """The workers cannot hand over what they decode."""


class _Worker:
    """A process that decodes the ranges that it is asked for, in their order."""

    def __init__(self, decoder: BatchDecoder) -> None:
        self._channel, far_end = open_channel()
        self._channel.settimeout(WATCH_S)
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_work, args=(decoder, far_end), daemon=True)
        with far_end:
            try:
                self._process.start()
            except OSError as error:
                self._channel.close()
                raise _HandoverError(f"cannot start a decoding process ({one_line(error)})") from error

    def request(self, rows: RowRange) -> None:
        """Ask for a batch."""
        try:
            send(self._channel, rows)
        except OSError as error:  # nobody is at the other end
            raise self._death() from error

    def next_batch(self) -> NetworkBatch:
        """Return the batch of the oldest request; say every 30 s that it is waited for.

        Raises:
            GeomcacheError: a frame cannot be decoded.
            WorkerDiedError: the process was killed, or crashed.
            _HandoverError: the process is not working, or what it decoded cannot be handed over.
        """
        while True:
            used_s = activity(self._process.pid).cpu_s
            try:
                item = receive(self._channel)
            except TimeoutError as error:
                if activity(self._process.pid).cpu_s - used_s < IDLE_S:
                    raise _HandoverError(
                        f"no batch from a decoding process for {WATCH_S:g} s, in which it did nothing"
                    ) from error
                logger.warning("no batch from a decoding process for %g s; it is at work, waiting on", WATCH_S)
            except (EOFError, ConnectionError) as error:
                raise self._death() from error
            except OSError as error:
                raise _HandoverError(f"cannot take over a batch ({one_line(error)})") from error
            else:
                if isinstance(item, Exception):
                    raise item
                batch: NetworkBatch = item
                return batch

    def kill(self) -> None:
        """End the process, even one that was stopped."""
        self._process.kill()
        with waiting("waiting for a decoding process that was killed: its disk does not answer"):
            self._process.join()
        self._channel.close()

    def _death(self) -> WorkerDiedError:
        self._process.join(10)
        code = self._process.exitcode
        if code is None:
            reason = "it closed its connection"
        else:
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return WorkerDiedError(
            f"a decoding process died ({reason}): often for lack of memory; run the same command again to resume, with"
            " fewer --num-workers or a smaller --batch-size"
        )


def _work(decoder: BatchDecoder, channel: socket.socket) -> None:
    """Decode what is asked for until the other end is closed: what a worker runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends its workers
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        while True:
            rows = receive(channel)
            item: NetworkBatch | Exception
            try:
                item = decoder.decode(*rows)
            except Exception as error:  # noqa: BLE001 - raised by the main process
                error.add_note(traceback.format_exc())
                item = error
            try:
                send(channel, item)
            except ConnectionError:
                return
            except Exception as error:  # noqa: BLE001 - as above
                send(channel, _HandoverError(f"a batch cannot be handed over ({one_line(error)})"))


def _do_nothing() -> None:
    pass
