"""Stage one on a Ray cluster: the driver, which owns the plan, the cache and its journal. `ray_actor` does the work.

The driver is one process like any other that writes the cache: it claims shards, gives runs of them to actors, and
commits what they make. So a driver that was killed is resumed by the same command, and may work next to processes of
other engines. What an actor was given and did not deliver when it, its node or one of its tasks was lost is given out
again; a shard is committed by the driver alone, once.
"""

import contextlib
import importlib.metadata
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from geomcache.cache.codecs import Codec
from geomcache.cache.create import recover
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.errors import ClusterError, GeomcacheError, UserInputError, one_line
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.prepare import announce, find_dataset, open_writer, warn_of_missing_quantiles
from geomcache.extraction.ray_actor import QUEUED_SHARDS, ActorFacts, LogLine, MadeShard, ShardMaker
from geomcache.extraction.update import has_grown
from geomcache.frames.source import FrameDataset
from geomcache.geometry import DatasetSpec, GeometrySpec, differences
from geomcache.pipeline.process import Process
from geomcache.pipeline.report import ExtractReport
from geomcache.pipeline.run_file import record_machine
from geomcache.progress import Progress
from geomcache.ranges import count_rows, format_ranges
from geomcache.waits import waiting

logger = logging.getLogger(__name__)

POLL_S = 0.5  # the longest wait for an actor, between looks at the cluster
LOOK_EVERY_S = 2.0  # between looks at the cluster's nodes
MOST_DECODERS = 4  # of an actor, where nothing else is asked for: an H200 keeps two busy (benchmarks/RESULTS.md)
RUN_FRAMES = 16_384  # of a decoding task, at most: more would open few video files less, and lose more with a node
WAIT_LINE_S = 30.0  # between lines about what is waited for
COMMITS = 4  # threads that write shards
MOST_LOSSES = 5  # of one shard, after which it is not given out again: what it needs is what kills

RayError = ray.exceptions.RayError


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
    with _connected(options), _Pool(options) as pool:
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
    try:
        ray.init(options.cluster_address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"cluster {options.cluster_address}: expected a Ray cluster, found none ({one_line(error)}): start one with"
            " `ray start --head`, or give --cluster-address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(eq=False)
class _Actor:
    """An actor, and what it has been given."""

    handle: Any
    started: Any
    """The reference of its facts."""
    facts: ActorFacts | None = None
    """None until it has started."""
    stream: Any = None
    """The generator of its shards; None while it is idle."""
    claims: dict[int, Claim] = field(default_factory=dict)
    """Given to it and not delivered, by shard."""
    is_alone: bool = False
    """Whether it was given a single shard."""


class _Pool:
    """The actors: as many as were asked for, or as the cluster has room for; those that were lost are replaced."""

    def __init__(self, options: ExtractOptions) -> None:
        self._options = options
        self.gpus = 0.0 if options.device == "cpu" else options.gpus_per_actor or 1.0
        self.decoders = options.num_workers or self._choose_decoders()
        self.actors: list[_Actor] = []
        self.started = 0  # actors, in all
        self._failed_starts = 0  # since one started
        self._said: set[str] = set()  # lines of actors
        self._looked = 0.0
        self._expected: tuple[GeometrySpec, DatasetSpec] | None = None
        if not self._room() and options.actors is None:
            raise ClusterError(
                f"cluster {options.cluster_address}: expected a node with {self._needs()}, found"
                f" {_describe_nodes() or 'none'}: take fewer --num-workers, --device cpu, or --actors N to wait for"
                " such a node"
            )

    def describe_wait(self) -> str:
        """Say what an actor is waited for with."""
        return f"waiting for an actor: it needs {self._needs()}; the nodes: {_describe_nodes()}"

    def _needs(self) -> str:
        gpus = f"{self.gpus:g} GPU and " if self.gpus else ""
        return f"{gpus}{1 + self.decoders} CPUs for an actor and its decoding tasks"

    def _choose_decoders(self) -> int:
        """Return how many decoding tasks an actor has on the node with the fewest processors for each."""
        spare = [
            int(node["CPU"] // (node.get("GPU", 0) // self.gpus)) - 1 if self.gpus else 1
            for node in _nodes()
            if not self.gpus or node.get("GPU", 0) >= self.gpus
        ]
        return max(1, min([MOST_DECODERS, *spare]))

    def _room(self) -> int:
        """Return how many actors the nodes that are alive have room for."""
        return sum(
            int(min(node.get("CPU", 0) // (1 + self.decoders), node["GPU"] // self.gpus if self.gpus else 1 << 20))
            for node in _nodes()
            if not self.gpus or "GPU" in node
        )

    def fill(self) -> None:
        """Ask for the actors that are missing, now and then."""
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        wanted = self._options.actors or self._room()
        if self._options.batch_size == "auto":  # the first one finds it for all
            wanted = min(wanted, 1)
        maker = ray.remote(ShardMaker).options(num_cpus=1 + self.decoders, num_gpus=self.gpus)
        while len(self.actors) < wanted:
            handle = maker.remote(self._options, self.decoders)
            self.actors.append(_Actor(handle, handle.start.remote()))

    def first_facts(self) -> ActorFacts:
        """Wait for the first actor that has its model.

        Raises:
            GeomcacheError: it cannot have it.
        """
        with waiting(self.describe_wait):
            while True:
                self.fill()
                for actor in self.wait():
                    try:
                        return self.greet(actor)
                    except _LostError as error:
                        logger.warning("lost an actor that was starting (%s)", error)

    def wait(self) -> list[_Actor]:
        """Return the actors that have started or made a shard, after a while at most."""
        waited = {actor.stream or actor.started: actor for actor in self.actors if actor.stream or not actor.facts}
        if not waited:
            time.sleep(POLL_S)
            return []
        ready, _ = ray.wait([*waited], num_returns=1, timeout=POLL_S)
        return [waited[each] for each in ready]

    def expect(self, facts: ActorFacts, dataset: DatasetSpec) -> None:
        """Require from now on that every actor has the same model, dataset, settings and batch size."""
        self._options = replace(self._options, batch_size=facts.batch_size, model_revision=facts.spec.model_revision)
        self._expected = facts.spec, dataset
        for actor in self.actors:
            if actor.facts is not None:
                self._check(actor.facts)

    def greet(self, actor: _Actor) -> ActorFacts:
        """Take an actor that has started.

        Raises:
            _LostError: it was lost meanwhile.
            GeomcacheError: it cannot have the model, or has another one.
        """
        self._failed_starts += 1
        with self._losses(actor):
            facts: ActorFacts = ray.get(actor.started)
        self._failed_starts = 0
        self._log(facts.node, facts.lines)
        self._check(facts)
        actor.facts = facts
        self.started += 1
        return facts

    def _check(self, facts: ActorFacts) -> None:
        here = importlib.metadata.version("geomcache")
        if facts.version != here:
            raise ClusterError(
                f"node {facts.node}: expected geomcache {here}, as here, found {facts.version}: install the same"
            )
        if self._expected is None:
            return
        expected, found = (
            {"spec": spec.to_dict(), "dataset": dataset.to_dict()}
            for spec, dataset in (self._expected, (facts.spec, facts.dataset))
        )
        for name, value, other in differences(expected, found):
            raise ClusterError(
                f"node {facts.node}: {name}: expected {value}, as on the first node, found {other}: give all nodes the"
                " same model, dataset and kind of device"
            )

    def give(self, actor: _Actor, claims: Sequence[Claim], frames: int) -> None:
        """Let an idle actor make shards."""
        method = actor.handle.make.options(num_returns="streaming", _generator_backpressure_num_objects=QUEUED_SHARDS)
        actor.claims, actor.is_alone = {claim.shard: claim for claim in claims}, len(claims) == 1
        actor.stream = method.remote(tuple(claims), frames)

    def next_shard(self, actor: _Actor) -> MadeShard | None:
        """Return what an actor has made; None at the end of its run.

        Raises:
            _LostError: it, its node or one of its tasks was lost.
            GeomcacheError: a frame cannot be decoded or encoded.
        """
        with self._losses(actor):
            try:
                made: MadeShard = ray.get(next(actor.stream))
            except StopIteration:
                actor.stream = None
                return None
        assert actor.facts is not None
        self._log(actor.facts.node, made.lines)
        return made

    def _log(self, node: str, lines: Sequence[LogLine]) -> None:
        """Log what an actor said, unless another has said the same."""
        for level, text in lines:
            if text not in self._said:
                self._said.add(text)
                logger.log(level, "%s: %s", node, text)

    @contextlib.contextmanager
    def _losses(self, actor: _Actor) -> Iterator[None]:
        """Turn Ray's errors into what they mean: a loss, or an error of ours that was raised elsewhere."""
        try:
            yield
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, GeomcacheError):
                raise error.cause from error
            if not isinstance(error.cause, RayError):
                raise
            actor.stream = None  # a decoding task was lost, the actor was not
            raise _LostError(one_line(error.cause)) from error
        except RayError as error:
            self.remove(actor)
            if self._failed_starts >= MOST_LOSSES:
                raise ClusterError(
                    f"cluster {self._options.cluster_address}: expected actors to start, lost {MOST_LOSSES} in a row:"
                    f" often for lack of memory ({one_line(error)})"
                ) from error
            raise _LostError(one_line(error)) from error

    def remove(self, actor: _Actor) -> None:
        """End an actor that is lost, or cannot be reached at the moment; `fill` asks for another."""
        self.actors.remove(actor)
        ray.kill(actor.handle)
        self._looked = 0.0

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in tuple(self.actors):
            self.remove(actor)


class _LostError(Exception):
    """An actor, a node or a task that is gone."""


class _Run:
    """Shards to actors, what they make to the cache."""

    def __init__(self, writer: StoreWriter, pool: _Pool, dataset: FrameDataset, began: float) -> None:
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

    def _give(self, actor: _Actor) -> None:
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

    def _advance(self, actor: _Actor, threads: ThreadPoolExecutor) -> None:
        """Take what an actor has to say: that it has started, a shard, the end of its run, or its loss."""
        try:
            if actor.facts is None:
                self._pool.greet(actor)
                return
            made = self._pool.next_shard(actor)
        except _LostError as error:
            self._give_back(actor, error)
            return
        if made is None:
            assert not actor.claims, "a run ended without all of its shards"
            return
        claim = actor.claims.pop(made.shard)
        self._count(claim, made)
        self._commits.append(threads.submit(self._writer.commit, claim, made.maps, made.signatures))

    def _give_back(self, actor: _Actor, error: _LostError) -> None:
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


def _nodes() -> list[dict[str, float]]:
    """Return the resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _describe_nodes() -> str:
    found = Counter(f"{node.get('GPU', 0):g} GPU and {node.get('CPU', 0):g} CPUs" for node in _nodes())
    return ", ".join(f"{count} with {what}" for what, count in found.items())
