"""The actors of a run on a Ray cluster, as the driver sees them: how many there is room for, and which were lost."""

import contextlib
import importlib.metadata
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from geomcache.cache.writer import Claim
from geomcache.errors import ClusterError, GeomcacheError, one_line
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.ray_actor import QUEUED_SHARDS, ActorFacts, LogLine, MadeShard, ShardMaker
from geomcache.geometry import DatasetSpec, GeometrySpec, differences
from geomcache.waits import waiting

logger = logging.getLogger(__name__)

POLL_S = 0.5  # the longest wait for an actor, between looks at the cluster
LOOK_EVERY_S = 2.0  # between looks at the cluster's nodes
MOST_DECODERS = 4  # of an actor, where nothing else is asked for: an H200 keeps two busy (benchmarks/RESULTS.md)
MOST_LOSSES = 5  # of one shard, or of actors in a row: what it needs is what kills

RayError = ray.exceptions.RayError


@dataclass(eq=False)
class Actor:
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


class Pool:
    """The actors: as many as were asked for, or as the cluster has room for; those that were lost are replaced."""

    def __init__(self, options: ExtractOptions) -> None:
        self._options = options
        self.gpus = 0.0 if options.device == "cpu" else options.gpus_per_actor or 1.0
        self.decoders = options.num_workers or self._choose_decoders()
        self.actors: list[Actor] = []
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
            self.actors.append(Actor(handle, handle.start.remote()))

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
                    except LostError as error:
                        logger.warning("lost an actor that was starting (%s)", error)

    def wait(self) -> list[Actor]:
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

    def greet(self, actor: Actor) -> ActorFacts:
        """Take an actor that has started.

        Raises:
            LostError: it was lost meanwhile.
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

    def give(self, actor: Actor, claims: Sequence[Claim], frames: int) -> None:
        """Let an idle actor make shards."""
        method = actor.handle.make.options(num_returns="streaming", _generator_backpressure_num_objects=QUEUED_SHARDS)
        actor.claims, actor.is_alone = {claim.shard: claim for claim in claims}, len(claims) == 1
        actor.stream = method.remote(tuple(claims), frames)

    def next_shard(self, actor: Actor) -> MadeShard | None:
        """Return what an actor has made; None at the end of its run.

        Raises:
            LostError: it, its node or one of its tasks was lost.
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
    def _losses(self, actor: Actor) -> Iterator[None]:
        """Turn Ray's errors into what they mean: a loss, or an error of ours that was raised elsewhere."""
        try:
            yield
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, GeomcacheError):
                raise error.cause from error
            if not isinstance(error.cause, RayError):
                raise
            actor.stream = None  # a decoding task was lost, the actor was not
            raise LostError(one_line(error.cause)) from error
        except RayError as error:
            self.remove(actor)
            if self._failed_starts >= MOST_LOSSES:
                raise ClusterError(
                    f"cluster {self._options.cluster_address}: expected actors to start, lost {MOST_LOSSES} in a row:"
                    f" often for lack of memory ({one_line(error)})"
                ) from error
            raise LostError(one_line(error)) from error

    def remove(self, actor: Actor) -> None:
        """End an actor that is lost, or cannot be reached at the moment; `fill` asks for another."""
        self.actors.remove(actor)
        ray.kill(actor.handle)
        self._looked = 0.0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in tuple(self.actors):
            self.remove(actor)


class LostError(Exception):
    """An actor, a node or a task that is gone."""


def _nodes() -> list[dict[str, float]]:
    """Return the resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _describe_nodes() -> str:
    found = Counter(f"{node.get('GPU', 0):g} GPU and {node.get('CPU', 0):g} CPUs" for node in _nodes())
    return ", ".join(f"{count} with {what}" for what, count in found.items())
