"""Stage one: every frame of a dataset through the encoder, once, into a cache.

    decode workers                       main thread                writer thread
    row range -> pictures -> input  ──►  input -> geometry  ──►     geometry -> shard -> disk -> journal
    workers.decode                       encoding.BatchEncoder      writer_thread.ShardWriterThread

The three overlap. The cache's writer hands out shards of consecutive rows; decoding runs ahead of the encoder by a few
batches, and a bounded queue stands between the encoder and the writing, so that memory does not grow with the dataset.
Several processes (accelerate, array jobs, a command run twice) share a cache by claiming its shards; none waits for
another until nothing is left to claim.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np

from geomcache.cache.codecs import Codec
from geomcache.cache.commands import Machine
from geomcache.cache.create import is_cache
from geomcache.cache.header import Header
from geomcache.cache.layout import SCHEMA_VERSION
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.da3.encoder import DA3Encoder
from geomcache.extraction.batch_size import find_batch_size
from geomcache.extraction.decoding import BatchDecoder, NetworkBatch
from geomcache.extraction.encoding import BatchEncoder
from geomcache.extraction.engine_choice import choose_engine
from geomcache.extraction.missing_shards import drop_missing_shards
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.plan import describe_plan, describe_shards, require_space
from geomcache.extraction.process import Process
from geomcache.extraction.report import ExtractReport
from geomcache.extraction.run_config import record_machine, resolve, write_run_config
from geomcache.extraction.workers import ForkServer, claimed_ranges, decode
from geomcache.extraction.writer_thread import ShardWriterThread
from geomcache.frames.of_cache import check_cached_pictures, compare_with_cache
from geomcache.frames.source import FrameDataset, describe_statistics_command, open_dataset
from geomcache.progress import Progress
from geomcache.ranges import count_rows, format_ranges

__all__ = ["ExtractReport", "extract"]

logger = logging.getLogger(__name__)

POLL_S = 0.5  # how often a process with nothing left to claim checks the shards of the others
WAIT_LINE_S = 30.0  # between lines about shards that other processes hold
GPU_BATCH, CPU_BATCH = 16, 4  # frames per forward pass


def extract(options: ExtractOptions) -> ExtractReport:
    """Run stage one; what the user should know on the way is logged.

    Raises:
        GeomcacheError: the run cannot start or continue; shards that were already written are kept.
    """
    began = time.perf_counter()
    process = Process.current()
    workers = process.default_workers if options.num_workers is None else options.num_workers
    server = ForkServer() if workers and not options.dry_run else None
    dataset, episodes = open_dataset(
        options.dataset,
        root=options.root,
        revision=options.revision,
        cameras=options.cameras,
        episodes=options.episodes,
        tolerance_s=options.tolerance_s,
    )
    if dataset.without_quantiles and process.is_main:
        logger.warning(
            "dataset %s: its statistics lack quantiles of %s, by which Pi0.5 normalises: the cache does not need them,"
            " training does; compute them with %s",
            dataset.spec.repo_id,
            ", ".join(dataset.without_quantiles),
            describe_statistics_command(dataset.spec.repo_id, options.root),
        )
    encoder = _load_encoder(options, dataset, process)
    batch_size = _choose_batch_size(options, encoder, process)
    rows = dataset.rows(episodes)
    if options.dry_run:
        for line in describe_plan(options.output_path, dataset, encoder, rows, batch_size, Codec.of(options.codec)):
            logger.info(line)
        return ExtractReport(path=options.output_path)
    with _open_writer(options, dataset, episodes, encoder, process) as writer:
        total = _announce(writer, options, process)
        choose_engine(options.engine, encoder, (total - writer.frames_done()) // process.count, batch_size)
        run = _Run(dataset, encoder, writer, batch_size, workers, server, process, began)
        return run.until_sealed(total)


def _load_encoder(options: ExtractOptions, dataset: FrameDataset, process: Process) -> DA3Encoder:
    return DA3Encoder.from_pretrained(
        options.model,
        cameras=dataset.cameras,
        revision=options.model_revision,
        views=options.views,
        process_res=options.process_res,
        grid=options.grid,
        outputs=options.outputs,
        device=options.device or process.device,
        dtype=options.dtype,
    )


def _choose_batch_size(options: ExtractOptions, encoder: DA3Encoder, process: Process) -> int:
    if options.batch_size != "auto":
        return options.batch_size or (CPU_BATCH if encoder.device.type == "cpu" else GPU_BATCH)
    batch_size, reason = find_batch_size(encoder)
    if process.is_main:
        logger.info("batch size %d: %s", batch_size, reason)
    return batch_size


def _open_writer(
    options: ExtractOptions,
    dataset: FrameDataset,
    episodes: Sequence[tuple[int, int]],
    encoder: DA3Encoder,
    process: Process,
) -> StoreWriter:
    """Create the cache, or open the one that exists; shards that lack a file count as missing."""
    codec, rows = Codec.of(options.codec), dataset.rows(episodes)
    if not options.output_path.exists():
        require_space(options.output_path, encoder.spec, count_rows(rows), codec)
        if process.is_main:
            for line in describe_shards(encoder.spec, dataset.spec.frames):
                logger.warning(line)

    def open_writer(*, overwrite: bool) -> StoreWriter:
        path = options.output_path
        version = SCHEMA_VERSION
        if is_cache(path) and not overwrite:
            version = Header.read(path).schema_version
            compare_with_cache(path, dataset)
        return StoreWriter.create_or_open(
            path,
            encoder.spec,
            dataset.describe(version),  # a cache of an earlier version is continued as it was begun
            dataset.reader.episode_length,
            rows,
            identities=dataset.identities,
            codec=codec,
            overwrite=overwrite,
        )

    with process.main_first():  # the others open what the main process has created or replaced
        writer = open_writer(overwrite=options.overwrite and process.is_main)
        if process.is_main and drop_missing_shards(writer):
            writer.close()
            writer = open_writer(overwrite=False)  # now it wants the rows of those shards, too
        if process.is_main:
            try:
                check_cached_pictures(writer.path, dataset, episodes)
            except BaseException:
                writer.close()
                raise
        return writer


def _announce(writer: StoreWriter, options: ExtractOptions, process: Process) -> int:
    """Record the options, log what exists already, and require space for the rest; return the rows in total."""
    done, total = writer.frames_done(), count_rows(writer.wanted)
    if process.is_main:
        write_run_config(writer.path, resolve(options, writer.spec, writer.dataset), is_new=done == 0)
        if writer.removed_stale_files:
            logger.info("%s: removed %d stale files of an interrupted run", writer.path, writer.removed_stale_files)
        if 0 < done < total:
            logger.info("%s: %d of %d frames exist; resuming with the rest", writer.path, done, total)
    require_space(writer.path, writer.spec, total - done, Codec.of(options.codec))
    return total


class _Run:
    """Stage one over the shards that this process can claim."""

    def __init__(
        self,
        dataset: FrameDataset,
        encoder: DA3Encoder,
        writer: StoreWriter,
        batch_size: int,
        workers: int,
        server: ForkServer | None,
        process: Process,
        began: float,
    ) -> None:
        self._dataset, self._encoder, self._writer = dataset, encoder, writer
        self._batch_size, self._server, self._process, self._began = batch_size, server, process, began
        self._stage = BatchEncoder(encoder, batch_size, dataset.reader.locate)
        self._first_encoded: float | None = None  # when the first batch was encoded: the end of the start-up
        self._waiting_logged = time.monotonic()
        self._machines: set[Machine] = set()
        self._report = ExtractReport(path=writer.path, workers=workers)

    def until_sealed(self, total: int) -> ExtractReport:
        """Work until every requested row is durable, no matter which process wrote it, and the cache is sealed."""
        report, began = self._report, time.perf_counter()
        report.frames_total = total
        views = len(self._dataset.cameras)
        with Progress(total, views, self._writer.frames_done, show=self._process.is_main) as progress:
            while True:
                first = self._writer.claim()
                if first is not None:
                    self._make_shards(first, progress)
                elif pending := self._writer.pending():
                    time.sleep(POLL_S)  # other processes hold the rest; if one dies, its shards can be claimed
                    progress.update(unwritten=0, nbytes=report.nbytes)
                    self._log_wait(pending)
                else:
                    break
            self._writer.seal()
        report.seconds = time.perf_counter() - began
        report.views = report.frames * views
        report.encode_s = self._stage.encode_s
        report.engine = self._encoder.engine
        return report

    def _log_wait(self, pending: Sequence[int]) -> None:
        """Say now and then that shards are waited for, and which."""
        now = time.monotonic()
        if self._process.is_main and now - self._waiting_logged >= WAIT_LINE_S:
            self._waiting_logged = now
            logger.info("waiting for shards that other processes hold: %s", format_ranges(np.array(pending)))

    def _make_shards(self, first: Claim, progress: Progress) -> None:
        """Decode, encode and write `first`, and every shard that can be claimed after it."""
        report, frames_encoded = self._report, 0
        decoder = BatchDecoder(self._dataset.reader, self._encoder.preprocessor)
        with ShardWriterThread(self._writer) as thread:
            ranges = claimed_ranges(self._writer, first, self._batch_size, on_claim=thread.expect)
            with closing(decode(decoder, ranges, report.workers, server=self._server)) as batches:
                for encoded in self._stage.encode(self._timed(batches)):
                    thread.put(encoded.maps, encoded.signatures)
                    self._count(encoded.stop - encoded.start)
                    frames_encoded += encoded.stop - encoded.start
                    progress.update(
                        unwritten=frames_encoded - thread.frames_written, nbytes=report.nbytes + thread.nbytes_written
                    )
        if self._first_encoded is not None:
            report.steady_s = time.perf_counter() - self._first_encoded
        report.frames += thread.frames_written
        report.shards += thread.shards_written
        report.nbytes += thread.nbytes_written
        report.write_s += thread.write_s

    def _timed(self, batches: Iterable[NetworkBatch]) -> Iterator[NetworkBatch]:
        on_gpu = self._encoder.device.type == "cuda"
        for batch in batches:
            self._report.decode_s += batch.decode_s
            self._report.preprocess_s += batch.preprocess_s
            yield batch.pin_memory() if on_gpu else batch

    def _count(self, frames: int) -> None:
        """Count encoded frames; the first ones end the start-up."""
        machine = Machine(self._encoder.device_name, self._encoder.engine)
        if machine not in self._machines:  # the first batch, or one at which compiling failed
            self._machines.add(machine)
            record_machine(self._writer.path, machine)
        if self._first_encoded is None:
            self._first_encoded = time.perf_counter()
            self._report.startup_s = self._first_encoded - self._began
        else:
            self._report.steady_views += frames * len(self._dataset.cameras)
