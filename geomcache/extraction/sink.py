"""The writing end of stage one: a thread that gathers geometry into shards and commits them."""

import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.writer import Claim, StoreWriter
from geomcache.geometry import GeometrySpec

QUEUED_BATCHES = 4  # between forward and writing: enough to ride out an fsync, little enough to bound memory

Maps = Mapping[str, NDArray[np.float16]]
"""Output name -> [n, V, h, w(, 6)], of consecutive rows."""


class ShardSink:
    """Takes geometry row after row, in the order of the claims, and commits each claim when it is full.

    An error of the thread is raised by the next `put` or by `close`, in the caller's thread.
    """

    def __init__(self, writer: StoreWriter, spec: GeometrySpec) -> None:
        self._writer, self._spec = writer, spec
        self._queue: queue.Queue[Maps | None] = queue.Queue(maxsize=QUEUED_BATCHES)
        self._claims: deque[Claim] = deque()
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self.frames_written = self.shards_written = self.nbytes_written = 0
        self.write_s = 0.0
        self._thread = threading.Thread(target=self._run, name="geomcache-writer", daemon=True)
        self._thread.start()

    def expect(self, claim: Claim) -> None:
        """The rows of this claim come after those of the claims before it."""
        self._claims.append(claim)

    def put(self, maps: Maps) -> None:
        """Hand over the next rows, all of one claim. Blocks while the queue is full."""
        while True:
            self._raise_error()
            try:
                self._queue.put(maps, timeout=0.1)
            except queue.Full:
                continue
            return

    def close(self) -> None:
        """Wait until everything is on disk."""
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join()
        self._raise_error()

    def abort(self) -> None:
        """Stop after the shard that is being written; drop what is not full."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (claim := self._gather()) is not None:
                self._claims.popleft()
                self.frames_written += sum(stop - start for start, stop in claim.rows)
                self.shards_written += 1
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            self._error = error

    def _gather(self) -> Claim | None:
        """Fill and commit the next claim; None at the end."""
        buffers: dict[str, NDArray[np.float16]] = {}
        filled = 0
        while (maps := self._next()) is not None:
            began = time.perf_counter()
            claim = self._claims[0]
            size = sum(stop - start for start, stop in claim.rows)
            for name, values in maps.items():
                if name not in buffers:  # one block a view: the shard of a camera is contiguous
                    views, *cell = values.shape[1:]
                    buffers[name] = np.empty((views, size, *cell), np.float16)
                buffers[name][:, filled : filled + len(values)] = np.moveaxis(values, 1, 0)
            filled += len(next(iter(maps.values())))
            if filled == size:
                self.nbytes_written += self._writer.commit(
                    claim,
                    {
                        key: {name: block[view] for name, block in buffers.items()}
                        for view, key in enumerate(self._spec.camera_keys)
                    },
                )
                self.write_s += time.perf_counter() - began
                return claim
            self.write_s += time.perf_counter() - began
        return None

    def _next(self) -> Maps | None:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
        return None
