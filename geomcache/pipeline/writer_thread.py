"""Writing in stage one: a thread that collects geometry into shards and commits them."""

import logging
import queue
import threading
import time
from collections import deque
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.signatures import Signatures
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.pipeline.assembly import BatchMaps, ShardAssembly
from geomcache.pipeline.carry import Carrier
from geomcache.ranges import count_rows

logger = logging.getLogger(__name__)

QUEUED_BATCHES = 4  # between encoder and writing: enough to ride out an fsync, few enough to bound memory

POLL_S = 0.1
WAIT_LINE_S = 30.0  # between lines about a disk that is waited for


class _Batch(NamedTuple):
    """Consecutive rows."""

    maps: BatchMaps
    signatures: Signatures
    places: NDArray[np.int64] | None
    """Where the rows were carried over from, as in `EncodedBatch`."""


class ShardWriterThread:
    """Takes the geometry of claimed rows, in the order of the claims, and commits each claim once it is complete.

    An error in the thread is raised by the next `put` or by `close`, in the caller's thread.

    Args:
        writer: of the cache.
        carrier: has the files of shards that were carried over as a whole, which then are linked instead of written.
    """

    def __init__(self, writer: StoreWriter, carrier: Carrier | None = None) -> None:
        self._writer, self._carrier = writer, carrier
        self._queue: queue.Queue[_Batch | None] = queue.Queue(maxsize=QUEUED_BATCHES)
        self._claims: deque[Claim] = deque()
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self.frames_written = self.shards_written = self.nbytes_written = 0
        self.frames_linked = 0
        """Of the frames written, those of shards that are files of an earlier cache."""
        self.write_s = 0.0
        self._waiting_logged = 0.0
        self._thread = threading.Thread(target=self._run, name="geomcache-writer", daemon=True)
        self._thread.start()

    def expect(self, claim: Claim) -> None:
        """Announce a claim: its rows follow those of the claims before it."""
        self._claims.append(claim)

    def put(self, maps: BatchMaps, signatures: Signatures, places: NDArray[np.int64] | None = None) -> None:
        """Hand over the next rows, all of one claim, as in `EncodedBatch`. Blocks while the queue is full."""
        self._put(_Batch(maps, signatures, places))
        self._raise_error()

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._put(None)
        self._join()
        self._raise_error()

    def abort(self) -> None:
        """Stop after the shard that is being written, and drop the incomplete one."""
        self._stop.set()
        self._join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _put(self, batch: _Batch | None) -> None:
        began = time.monotonic()
        while self._thread.is_alive():
            try:
                self._queue.put(batch, timeout=POLL_S)
            except queue.Full:
                self._log_wait(began)
            else:
                return

    def _join(self) -> None:
        began = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            self._log_wait(began)

    def _log_wait(self, began: float) -> None:
        """Say now and then that the disk, or another process that holds the cache's lock, is waited for."""
        now, claims = time.monotonic(), tuple(self._claims)
        if claims and now - max(began, self._waiting_logged) >= WAIT_LINE_S:
            self._waiting_logged = now
            logger.warning(
                "%s: waiting for %.0f s to write shard %d: the disk is slow, or another process holds the cache's lock",
                self._writer.path,
                now - began,
                claims[0].shard,
            )

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._write_claim():
                pass
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            self._error = error

    def _write_claim(self) -> bool:
        """Collect the rows of the next claim and commit them; False at the end of the queue."""
        shard: ShardAssembly | None = None
        while (batch := self._next_batch()) is not None:
            began = time.perf_counter()
            if shard is None:
                shard = ShardAssembly(self._claims[0], batch.signatures.hashes.shape[1])
            is_complete = shard.add(batch.maps, batch.signatures, batch.places)
            if is_complete:
                self._commit(shard)
            self.write_s += time.perf_counter() - began
            if is_complete:
                return True
        return False

    def _commit(self, shard: ShardAssembly) -> None:
        claim, signatures = shard.claim, shard.signatures
        frames = count_rows(claim.rows)
        nbytes = 0 if self._carrier is None else self._carrier.adopt(self._writer, claim, shard.places, signatures)
        if nbytes:
            self.frames_linked += frames
        else:
            nbytes = self._writer.commit(claim, shard.by_camera(self._writer.spec.camera_keys), signatures)
        self.nbytes_written += nbytes
        self._claims.popleft()
        self.frames_written += frames
        self.shards_written += 1

    def _next_batch(self) -> _Batch | None:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=POLL_S)
            except queue.Empty:
                continue
        return None
