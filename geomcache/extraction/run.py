"""Stage one: every frame of a dataset through the encoder, once, into a cache. `pipeline` does the work."""

import contextlib
import logging
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from geomcache.cache.codecs import Codec
from geomcache.cache.create import recover
from geomcache.cache.writer import StoreWriter
from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import DatasetError, UserInputError
from geomcache.extraction.at_address import check_processes
from geomcache.extraction.feature_pass import FeatureEncoder
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.plan import describe_plan
from geomcache.extraction.prepare import (
    announce,
    choose_batch_size,
    find_dataset,
    load_encoder,
    open_writer,
    warn_of_missing_quantiles,
)
from geomcache.extraction.run_config import resolve, write_run_config
from geomcache.extraction.update import grow, has_grown
from geomcache.frames.source import FrameDataset
from geomcache.pipeline.encoding import EncoderOnDemand
from geomcache.pipeline.engine_choice import choose_engine
from geomcache.pipeline.pipeline import Machinery, Pipeline
from geomcache.pipeline.report import ExtractReport
from geomcache.ranges import count_rows, merge_ranges

__all__ = ["ExtractReport", "extract", "follow"]

logger = logging.getLogger(__name__)

FOLLOW_POLL_S = 2.0  # how often a dataset that is followed is looked at

sleep = time.sleep


@dataclass(frozen=True)
class Share:
    """One of several equal parts of the shards, each in one piece; whatever was made already, the parts are the same.

    Attributes:
        rank: which part, from 0.
        count: of the parts.
    """

    rank: int
    count: int

    def shards(self, writer: StoreWriter, rows: Sequence[tuple[int, int]]) -> frozenset[int]:
        """Return its shards, where these rows were asked for.

        A shard beyond them, which was dropped and has to be made again, goes with the one before it.
        """
        asked = writer.shards_of(merge_ranges(rows))
        starts = [asked[part * len(asked) // self.count] for part in range(self.count)]
        return frozenset(
            shard for shard in writer.shards_of(writer.wanted) if max(0, bisect_right(starts, shard) - 1) == self.rank
        )


def extract(options: ExtractOptions, share: Share | None = None) -> ExtractReport:
    """Run stage one; what the user should know on the way is logged.

    Args:
        options: what to do, and where.
        share: the part of the shards that this process makes; None for all that no other process claims.

    Raises:
        GeomcacheError: the run cannot start or continue; shards that were already written are kept.
    """
    if options.cluster == "ray":
        from geomcache.extraction.ray_run import extract_on_ray

        return extract_on_ray(options)
    return _Extraction(options, share=share).run()


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

    def __init__(self, options: ExtractOptions, encoder: DA3Encoder | None = None, share: Share | None = None) -> None:
        self._options, self.encoder, self._share = options, encoder, share
        self._machinery = Machinery.start(options.num_workers, workless=options.dry_run)

    def run(self) -> ExtractReport:
        """Do it."""
        options, machinery, path = self._options, self._machinery, self._options.output_path
        check_processes(options, machinery.process.count if self._share is None else self._share.count)
        dataset, episodes = find_dataset(options, options.episodes)
        rows = dataset.rows(episodes)
        if machinery.process.is_main:
            warn_of_missing_quantiles(options, dataset)
        if self.encoder is None:
            self.encoder = load_encoder(options, dataset.cameras, options.device or machinery.process.device)
        if not options.dry_run:
            recover(path.resolve())
        features, codec = FeatureEncoder(options, self.encoder), Codec.of(options.codec)
        encoder = features.encoder
        machinery.batch_size = choose_batch_size(options, encoder, machinery.process)
        if options.dry_run:
            for line in describe_plan(options.place, dataset, encoder, rows, machinery.batch_size, codec):
                logger.info(line)
            return ExtractReport(path=path)
        if not options.overwrite and has_grown(path, dataset, encoder.spec, codec):
            if self._share is not None:
                raise UserInputError(
                    f"{path}: expected a cache of all {dataset.spec.episodes} episodes, found one of fewer: run"
                    " `geomcache update`, which adds the new ones"
                )
            report = self._grow(dataset, rows, encoder)
            if machinery.process.is_main:
                write_run_config(path, resolve(options, encoder.spec, dataset.spec))
            return report
        with open_writer(options, dataset, episodes, encoder.spec, machinery.process, features) as writer:
            encoder = features.encoder
            total = announce(writer, options, machinery.process)
            processes = machinery.process.count if self._share is None else self._share.count
            frames = (total - writer.frames_done()) // processes
            choose_engine(options.engine, encoder, frames, machinery.batch_size)
            on_demand = EncoderOnDemand(lambda: encoder)
            shards = None if self._share is None else self._share.shards(writer, rows)
            pipeline = Pipeline(
                dataset, encoder.preprocessor, on_demand, writer, machinery, config_of=writer.path, share=shards
            )
            return pipeline.until_sealed(total)

    def _grow(self, dataset: FrameDataset, rows: Sequence[tuple[int, int]], encoder: DA3Encoder) -> ExtractReport:
        """Add rows to a cache of the first episodes of the dataset."""
        options, machinery = self._options, self._machinery
        if options.episodes is not None:  # frames of old episodes may have to be read, too
            dataset, _ = find_dataset(options, None)
        logger.info("%s: dataset %s has grown; continuing", options.output_path, options.dataset)
        choose_engine(options.engine, encoder, count_rows(rows) // machinery.process.count, machinery.batch_size)
        return grow(options.output_path, dataset, rows, encoder, machinery)
