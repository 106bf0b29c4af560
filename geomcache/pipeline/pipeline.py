"""The work of stage one, from claims to the seal, for `extract` and `update`.

    decode workers                       main thread                writer thread
    row range -> pictures -> input  ──►  input -> geometry  ──►     geometry -> shard -> disk -> journal
    workers.decode                       encoding.BatchEncoder      writer_thread.ShardWriterThread

The three overlap. The cache's writer hands out shards of consecutive rows; decoding runs ahead of the encoder by a few
batches, and a bounded queue stands between the encoder and the writing, so that memory does not grow with the dataset.
Several processes (accelerate, array jobs, a command run twice) share a cache by claiming its shards; none waits for
another until nothing is left to claim.

Where there are earlier caches, decode workers read the maps of pictures that these have; the encoder gets the others.
"""

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from geomcache.cache.commands import Machine
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.da3.preprocess import DA3Preprocessor
from geomcache.frames.source import FrameDataset
from geomcache.pipeline.carry import Carrier, log_damage
from geomcache.pipeline.decoding import BatchDecoder, NetworkBatch
from geomcache.pipeline.encoding import BatchEncoder, EncodedBatch, EncoderOnDemand
from geomcache.pipeline.process import Process
from geomcache.pipeline.report import ExtractReport
from geomcache.pipeline.run_file import record_machine
from geomcache.pipeline.workers import ForkServer, claimed_ranges, decode
from geomcache.pipeline.writer_thread import ShardWriterThread
from geomcache.progress import Progress
from geomcache.ranges import count_rows, format_ranges

logger = logging.getLogger(__name__)

POLL_S = 0.5  # how often a process with nothing left to claim checks the shards of the others
WAIT_LINE_S = 30.0  # between lines about shards that other processes hold


@dataclass(kw_only=True)
class Machinery:
    """What this process works with."""

    process: Process
    workers: int
    """Decoding processes."""
    server: ForkServer | None
    """Forks them."""
    batch_size: int
    """Frames per forward pass."""
    began: float = field(default_factory=time.perf_counter)
    """When the command was called."""

    @classmethod
    def start(cls, num_workers: int | None, *, workless: bool) -> "Machinery":
        """Begin to start decoding processes, unless there will be no work; the batch size is chosen later."""
        process = Process.current()
        workers = process.default_workers if num_workers is None else num_workers
        server = ForkServer() if workers and not workless else None
        return cls(process=process, workers=workers, server=server, batch_size=1)


class Pipeline:
    """Stage one over the shards that this process can claim.

    Args:
        dataset: whose frames are encoded.
        preprocessor: of the encoder.
        encoder: loaded when the first frame needs it.
        writer: of the cache that is made.
        machinery: what this process works with.
        config_of: the cache next to which machines are recorded.
        carrier: finds rows that earlier caches have.
        unseen: take whole shards of earlier caches where their rows are expected, without a look at their pictures.
        share: the shards that this process may make; None for all.
    """

    def __init__(
        self,
        dataset: FrameDataset,
        preprocessor: DA3Preprocessor,
        encoder: EncoderOnDemand,
        writer: StoreWriter,
        machinery: Machinery,
        *,
        config_of: Path,
        carrier: Carrier | None = None,
        unseen: bool = False,
        share: Collection[int] | None = None,
    ) -> None:
        self._dataset, self._writer, self._machinery = dataset, writer, machinery
        self._encoder, self._carrier, self._unseen, self._config_of = encoder, carrier, unseen, config_of
        self._share = share
        self._decoder = BatchDecoder(dataset.reader, preprocessor, carrier)
        self._stage = BatchEncoder(encoder, machinery.batch_size, dataset.reader.locate)
        self._first_batch: float | None = None  # when the first batch was done: the end of the start-up
        self._waiting_logged = time.monotonic()
        self._machines: set[Machine] = set()
        self._report = ExtractReport(path=config_of, address=writer.address, workers=machinery.workers)

    def until_sealed(self, total: int) -> ExtractReport:
        """Work until every requested row is durable, no matter which process wrote it, and the cache is sealed.

        A process with a share works until that is durable; the one that finds all shares durable seals.
        """
        report, began = self._report, time.perf_counter()
        report.frames_total = total
        views = len(self._dataset.cameras)
        with Progress(total, views, self._writer.frames_done, show=self._machinery.process.is_main) as progress:
            while True:
                first = self._claim(progress)
                if first is not None:
                    self._make_shards(first, progress)
                elif pending := self._pending():
                    time.sleep(POLL_S)  # other processes hold the rest; if one dies, its shards can be claimed
                    progress.update(unwritten=0, nbytes=report.nbytes)
                    self._log_wait(pending)
                else:
                    break
            report.sealed = self._writer.seal()
        report.seconds = time.perf_counter() - began
        report.views = report.frames * views
        report.encode_s = self._stage.encode_s
        if self._encoder.loaded is not None:
            report.engine = self._encoder.loaded.engine
        return report

    def _pending(self) -> list[int]:
        """Return the shards that lack rows, of those that this process waits for."""
        pending = self._writer.pending()
        return [shard for shard in pending if self._share is None or shard in self._share]

    def _log_wait(self, pending: Sequence[int]) -> None:
        """Say now and then that shards are waited for, and which."""
        now = time.monotonic()
        if self._machinery.process.is_main and now - self._waiting_logged >= WAIT_LINE_S:
            self._waiting_logged = now
            logger.info("waiting for shards that other processes hold: %s", format_ranges(np.array(pending)))

    def _claim(self, progress: Progress) -> Claim | None:
        """Return the next claim whose frames have to be decoded; those before it are done at once."""
        while (claim := self._writer.claim(self._share)) is not None:
            nbytes = 0
            if self._carrier is not None and self._unseen:
                nbytes = self._carrier.adopt_unseen(self._writer, claim)
            if not nbytes:
                break
            frames = count_rows(claim.rows)
            self._report.frames += frames
            self._report.frames_carried += frames
            self._report.frames_linked += frames
            self._report.shards += 1
            self._report.nbytes += nbytes
            progress.update(unwritten=0, nbytes=self._report.nbytes)
        return claim

    def _make_shards(self, first: Claim, progress: Progress) -> None:
        """Decode, encode and write `first`, and every shard that can be claimed after it."""
        report, frames_done = self._report, 0
        machinery = self._machinery
        with ShardWriterThread(self._writer, self._carrier) as thread:
            ranges = claimed_ranges(lambda: self._claim(progress), first, machinery.batch_size, on_claim=thread.expect)
            with closing(decode(self._decoder, ranges, machinery.workers, server=machinery.server)) as batches:
                for encoded in self._stage.encode(self._timed(batches)):
                    thread.put(encoded.maps, encoded.signatures, encoded.places)
                    self._count(encoded)
                    frames_done += encoded.stop - encoded.start
                    progress.update(
                        unwritten=frames_done - thread.frames_written, nbytes=report.nbytes + thread.nbytes_written
                    )
        if self._first_batch is not None:
            report.steady_s = time.perf_counter() - self._first_batch
        report.frames += thread.frames_written
        report.frames_linked += thread.frames_linked
        report.shards += thread.shards_written
        report.nbytes += thread.nbytes_written
        report.write_s += thread.write_s

    def _timed(self, batches: Iterable[NetworkBatch]) -> Iterator[NetworkBatch]:
        for batch in batches:
            self._report.decode_s += batch.decode_s
            self._report.preprocess_s += batch.preprocess_s
            if batch.carried is not None:
                for problem in batch.carried.damage:
                    log_damage(problem)
            yield batch.pin_memory() if self._encoder.on_gpu else batch

    def _count(self, encoded: EncodedBatch) -> None:
        """Count frames; the first ones end the start-up."""
        frames = encoded.stop - encoded.start
        self._report.frames_carried += frames - encoded.encoded
        if encoded.encoded and self._encoder.loaded is not None:
            machine = Machine(self._encoder.loaded.device_name, self._encoder.loaded.engine)
            if machine not in self._machines:  # the first batch, or one at which compiling failed
                self._machines.add(machine)
                record_machine(self._config_of, machine)
        if self._first_batch is None:
            self._first_batch = time.perf_counter()
            self._report.startup_s = self._first_batch - self._machinery.began
        else:
            self._report.steady_views += frames * len(self._dataset.cameras)
