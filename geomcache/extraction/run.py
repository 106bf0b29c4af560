"""Stage one: every frame of a dataset through the encoder, once, into a cache. `pipeline` does the work."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from geomcache.cache.codecs import Codec
from geomcache.cache.create import is_cache, recover
from geomcache.cache.header import Header
from geomcache.cache.layout import SCHEMA_VERSION
from geomcache.cache.writer import StoreWriter
from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import DatasetError
from geomcache.extraction.missing_shards import drop_missing_shards
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.plan import describe_plan, describe_shards, require_space
from geomcache.extraction.run_config import resolve, write_run_config
from geomcache.extraction.update import grow, has_grown
from geomcache.frames.of_cache import check_cached_pictures, compare_with_cache
from geomcache.frames.source import FrameDataset, describe_statistics_command, open_dataset
from geomcache.pipeline.batch_size import default_batch_size, find_batch_size
from geomcache.pipeline.encoding import EncoderOnDemand
from geomcache.pipeline.engine_choice import choose_engine
from geomcache.pipeline.pipeline import Machinery, Pipeline
from geomcache.pipeline.process import Process
from geomcache.pipeline.report import ExtractReport
from geomcache.ranges import count_rows

__all__ = ["ExtractReport", "extract", "follow"]

logger = logging.getLogger(__name__)

FOLLOW_POLL_S = 2.0  # how often a dataset that is followed is looked at

sleep = time.sleep


def extract(options: ExtractOptions) -> ExtractReport:
    """Run stage one; what the user should know on the way is logged.

    Raises:
        GeomcacheError: the run cannot start or continue; shards that were already written are kept.
    """
    return _Extraction(options).run()


def follow(options: ExtractOptions) -> Iterator[ExtractReport]:
    """Run stage one, and again each time that the dataset's folder has changed; yield a report when frames were made.

    A recording closes its files now and then, and at its end: what it has not closed cannot be read yet. The encoder is
    loaded once.

    Raises:
        GeomcacheError: as `extract`. A dataset that cannot be read is waited for, with a line.
    """
    assert options.root is not None
    encoder: DA3Encoder | None = None
    problem, seen = "", None
    while True:
        state = _state_of(options.root)
        if state != seen:
            extraction = _Extraction(options, encoder)
            try:
                report = extraction.run()
            except DatasetError as error:
                if str(error) != problem:
                    problem = str(error)
                    logger.info("waiting for the dataset, which cannot be read now: %s", problem)
            else:
                seen, problem = state, ""
                if report.frames:
                    yield report
                    logger.info("%s: follows %s; stop it with Ctrl-C", options.output_path, options.root)
            encoder = extraction.encoder
        sleep(FOLLOW_POLL_S)


def _state_of(root: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what tells whether somebody has written metadata of a dataset: names, sizes and times of the files."""
    states = []
    for file in sorted((root / "meta").rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # it was replaced just now
            status = file.stat()
            states.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(states)


class _Extraction:
    """One run of `extract`.

    Attributes:
        encoder: None until it is loaded.
    """

    def __init__(self, options: ExtractOptions, encoder: DA3Encoder | None = None) -> None:
        self._options, self.encoder = options, encoder
        self._machinery = Machinery.start(options.num_workers, workless=options.dry_run)

    def run(self) -> ExtractReport:
        """Do it."""
        options, machinery, path = self._options, self._machinery, self._options.output_path
        dataset, episodes = self._open_dataset(options.episodes)
        rows = dataset.rows(episodes)
        if dataset.without_quantiles and machinery.process.is_main:
            logger.warning(
                "dataset %s: its statistics lack quantiles of %s, by which Pi0.5 normalises: the cache does not need"
                " them, training does; compute them with %s",
                dataset.spec.repo_id,
                ", ".join(dataset.without_quantiles),
                describe_statistics_command(dataset.spec.repo_id, options.root),
            )
        if self.encoder is None:
            self.encoder = _load_encoder(options, dataset, machinery.process)
        encoder, codec = self.encoder, Codec.of(options.codec)
        machinery.batch_size = _choose_batch_size(options, encoder, machinery.process)
        if options.dry_run:
            for line in describe_plan(path, dataset, encoder, rows, machinery.batch_size, codec):
                logger.info(line)
            return ExtractReport(path=path)
        recover(path.resolve())
        if not options.overwrite and has_grown(path, dataset, encoder.spec, codec):
            report = self._grow(dataset, rows)
            if machinery.process.is_main:
                write_run_config(path, resolve(options, encoder.spec, dataset.spec))
            return report
        with _open_writer(options, dataset, episodes, encoder, machinery.process) as writer:
            total = _announce(writer, options, machinery.process)
            frames = (total - writer.frames_done()) // machinery.process.count
            choose_engine(options.engine, encoder, frames, machinery.batch_size)
            on_demand = EncoderOnDemand(lambda: encoder)
            pipeline = Pipeline(dataset, encoder.preprocessor, on_demand, writer, machinery, config_of=writer.path)
            return pipeline.until_sealed(total)

    def _open_dataset(self, episodes: str | None) -> tuple[FrameDataset, list[tuple[int, int]]]:
        """Return the dataset, with the files of these episodes, and ranges of them."""
        options = self._options
        return open_dataset(
            options.dataset,
            root=options.root,
            revision=options.revision,
            cameras=options.cameras,
            episodes=episodes,
            tolerance_s=options.tolerance_s,
        )

    def _grow(self, dataset: FrameDataset, rows: Sequence[tuple[int, int]]) -> ExtractReport:
        """Add rows to a cache of the first episodes of the dataset."""
        options, machinery, encoder = self._options, self._machinery, self.encoder
        assert encoder is not None
        if options.episodes is not None:  # frames of old episodes may have to be read, too
            dataset, _ = self._open_dataset(None)
        logger.info("%s: dataset %s has grown; continuing", options.output_path, options.dataset)
        choose_engine(options.engine, encoder, count_rows(rows) // machinery.process.count, machinery.batch_size)
        return grow(options.output_path, dataset, rows, encoder, machinery)


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
        return options.batch_size or default_batch_size(encoder.device)
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
