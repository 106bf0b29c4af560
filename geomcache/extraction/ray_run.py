"""Stage one on a Ray cluster: the driver, which owns the plan, the cache and its journal. `ray_actor` does the work.

The driver is one process like any other that writes the cache: it claims shards, gives runs of them to actors, and
commits what they make. So a driver that was killed is resumed by the same command, and may work next to processes of
other engines. What an actor was given and did not deliver when it, its node or one of its tasks was lost is given out
again; a shard is committed by the driver alone, once.
"""

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray

from geomcache.cache.codecs import Codec
from geomcache.cache.create import recover
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.errors import ClusterError, UserInputError, one_line
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.prepare import announce, find_dataset, open_writer, warn_of_missing_quantiles
from geomcache.extraction.ray_actor import MadeShard
from geomcache.extraction.ray_pool import MOST_LOSSES, Actor, LostError, Pool
from geomcache.extraction.update import has_grown
from geomcache.frames.source import FrameDataset
from geomcache.pipeline.process import Process
from geomcache.pipeline.report import ExtractReport
from geomcache.pipeline.run_file import record_machine
from geomcache.progress import Progress
from geomcache.ranges import count_rows, format_ranges
from geomcache.waits import waiting

logger = logging.getLogger(__name__)

RUN_FRAMES = 16_384  # of a decoding task, at most: more would open few video files less, and lose more with a node
WAIT_LINE_S = 30.0  # between lines about what is waited for
COMMITS = 4  # threads that write shards


def extract_on_ray(options: ExtractOptions) -> ExtractReport:
    """Run stage one on a cluster, as `extract` does on one machine.

    Raises:
        GeomcacheError: the run cannot start or continue; shards that were already written are kept.
        ClusterError: there is no cluster, no room in it, or a shard was lost too often.
    """
    began = time.perf_counter()
    dataset, episodes = find_dataset(options, options.episodes)
    warn_of_missing_quantiles(options, dataset)
    options = _for_all_nodes(options, dataset)
    recover(options.output_path.resolve())
    with _connected(options), Pool(options) as pool:
        facts = pool.first_facts()
        codec, path = Codec.of(options.codec), options.output_path
        if not options.overwrite and has_grown(path, dataset, facts.spec, codec):
            raise UserInputError(
                f"{path}: expected a cache of all {dataset.spec.episodes} episodes, found one of fewer: run `geomcache"
                " update` on one machine, which adds the new ones"
            )
        with open_writer(options, dataset, episodes, facts.spec, Process()) as writer:
            pool.expect(facts, dataset.spec)
            return _Run(writer, pool, dataset, began).until_sealed(announce(writer, options, Process()))


def _for_all_nodes(options: ExtractOptions, dataset: FrameDataset) -> ExtractOptions:
    """Name dataset and model so that every node finds the same: the revision that was found here, absolute paths."""
    folder = Path(options.model).expanduser()
    return replace(
        options,
        revision=dataset.spec.revision or options.revision,
        root=options.root and options.root.expanduser().absolute(),
        model=str(folder.absolute()) if folder.is_dir() else options.model,
    )


@contextlib.contextmanager
def _connected(options: ExtractOptions) -> Iterator[None]:
    """Connect to the cluster; what actors log comes with their shards, so that there is one progress line."""
    address = options.cluster_address
    try:
        with waiting(f"waiting for the Ray cluster at {address}: see whether it is up, and its port open"):
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"cluster {options.cluster_address}: expected a Ray cluster, found none ({one_line(error)}): start one with"
            " `ray start --head`, or give --cluster-address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class _Run:
    """Shards to actors, what they make to the cache."""

    def __init__(self, writer: StoreWriter, pool: Pool, dataset: FrameDataset, began: float) -> None:
        self._writer, self._pool, self._views, self._began = writer, pool, len(dataset.cameras), began
        self._returned = deque[Claim]()  # of losses, to be given out again before others
        self._losses = Counter[int]()  # by shard
        self._commits: list[Future[int]] = []
        self._first_shard: float | None = None
        self._worked = time.monotonic()  # when an actor worked last, or that was said
        self._report = ExtractReport(path=writer.path, address=writer.address, workers=pool.decoders)

    def until_sealed(self, total: int) -> ExtractReport:
        """Work until every requested row is durable and the cache is sealed."""
        report, pool, began = self._report, self._pool, time.perf_counter()
        report.frames_total = total
        progress = Progress(total, self._views, self._writer.frames_done, show=True)
        with progress, ThreadPoolExecutor(COMMITS, "geomcache-commit") as threads:
            while self._is_unfinished():
                pool.fill()
                for actor in pool.actors:
                    if actor.facts is not None and actor.stream is None:
                        self._give(actor)
                for actor in pool.wait():
                    self._advance(actor, threads)
                self._finish_commits()
                if report.shards:  # its clock starts with the first
                    progress.update(unwritten=0, nbytes=report.nbytes)
                self._log_wait()
        report.sealed = self._writer.seal()
        report.seconds, report.actors = time.perf_counter() - began, pool.started
        report.views = report.frames * self._views
        if self._first_shard is not None:
            report.steady_s = time.perf_counter() - self._first_shard
        return report

    def _log_wait(self) -> None:
        """Say now and then that no actor works, and what is waited for."""
        now = time.monotonic()
        if any(actor.claims for actor in self._pool.actors) or self._commits:
            self._worked = now
        elif now - self._worked >= WAIT_LINE_S:
            self._worked = now
            if any(actor.facts for actor in self._pool.actors):
                held = format_ranges(np.array(self._writer.pending()))
                logger.info("waiting for shards that other processes hold: %s", held)
            else:
                logger.warning("%s", self._pool.describe_wait())

    def _is_unfinished(self) -> bool:
        """Return whether there is something to wait for: shards of this driver, or of other processes."""
        busy = any(actor.claims for actor in self._pool.actors)
        return busy or bool(self._commits) or bool(self._returned) or bool(self._writer.pending())

    def _give(self, actor: Actor) -> None:
        """Give an idle actor a run of shards: long while there is much to do, so that all end at the same time."""
        pending = self._writer.pending()
        given = sum(len(each.claims) for each in self._pool.actors) + len(self._commits)
        each_decoder = max(1, RUN_FRAMES // self._writer.shard_frames)
        fair = (len(pending) - given) // (2 * len(self._pool.actors))
        count = max(1, min(fair, each_decoder * self._pool.decoders))
        claims = list[Claim]()
        if self._returned:  # alone: if it kills this actor, too, it is known which shard does
            claims.append(self._returned.popleft())
        else:
            while len(claims) < count and (claim := self._writer.claim()) is not None:
                claims.append(claim)
        if claims:
            frames = len(pending) * self._writer.shard_frames // len(self._pool.actors)
            self._pool.give(actor, sorted(claims, key=lambda claim: claim.shard), frames)

    def _advance(self, actor: Actor, threads: ThreadPoolExecutor) -> None:
        """Take what an actor has to say: that it has started, a shard, the end of its run, or its loss."""
        try:
            if actor.facts is None:
                self._pool.greet(actor)
                return
            made = self._pool.next_shard(actor)
        except LostError as error:
            self._give_back(actor, error)
            return
        if made is None:
            assert not actor.claims, "a run ended without all of its shards"
            return
        claim = actor.claims.pop(made.shard)
        self._count(claim, made)
        self._commits.append(threads.submit(self._writer.commit, claim, made.maps, made.signatures))

    def _give_back(self, actor: Actor, error: LostError) -> None:
        """Put the shards of a loss back.

        Raises:
            ClusterError: one of them was lost too often.
        """
        shards = sorted(actor.claims)
        node = "an actor that was starting" if actor.facts is None else f"an actor on {actor.facts.node}"
        again = format_ranges(np.array(shards)) if shards else "none"
        logger.warning("lost %s (%s); shards that are made again: %s", node, error, again)
        if actor.is_alone:
            self._losses.update(shards)
        self._report.shards_again += len(shards)
        self._returned.extend(actor.claims[shard] for shard in shards)
        actor.claims = {}
        for shard in shards:
            if self._losses[shard] >= MOST_LOSSES:
                raise ClusterError(
                    f"shard {shard}: expected an actor to make it, lost {MOST_LOSSES} that tried: often for lack of"
                    f" memory ({error}); shards that were already written are kept"
                )

    def _count(self, claim: Claim, made: MadeShard) -> None:
        report, frames = self._report, count_rows(claim.rows)
        report.frames += frames
        report.shards += 1
        report.decode_s += made.decode_s
        report.preprocess_s += made.preprocess_s
        report.encode_s += made.encode_s
        report.engine = made.machine.engine
        record_machine(self._writer.path, made.machine)
        if self._first_shard is None:
            self._first_shard = time.perf_counter()
            report.startup_s = self._first_shard - self._began
        else:
            report.steady_views += frames * self._views

    def _finish_commits(self) -> None:
        """Count commits that are done; wait for the oldest while too many are not."""
        while self._commits and (self._commits[0].done() or len(self._commits) > COMMITS):
            self._report.nbytes += self._commits.pop(0).result()
