"""What runs on the nodes of a Ray cluster: actors that hold the model, and the tasks that decode for them.

    decoding tasks (CPU)                 actor (GPU)                          driver (ray_run)
    row ranges -> NetworkBatch  ──►      encode, put together a shard   ──►   the cache's writer: disk, journal

Both arrows are Ray generators, whose backpressure bounds what is in flight: a decoding task stops when two of its
batches wait, an actor when two of its shards wait. Nothing here touches the cache: no lock and no shared file system is
needed, other than for a dataset that is given with --root.

Decoding tasks run on the node of their actor, and on the processors that it reserved for them: they start at once or
not at all, and batches stay on the node. They end with their actor.
"""

import importlib.metadata
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from geomcache.cache.commands import Machine
from geomcache.cache.signatures import Signatures
from geomcache.cache.writer import Claim, ShardMaps
from geomcache.da3.encoder import DA3Encoder
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.prepare import choose_batch_size, find_dataset, load_encoder
from geomcache.frames.source import FrameDataset
from geomcache.geometry import DatasetSpec, GeometrySpec
from geomcache.pipeline.assembly import ShardAssembly
from geomcache.pipeline.decoding import BatchDecoder, NetworkBatch
from geomcache.pipeline.encoding import BatchEncoder, EncoderOnDemand
from geomcache.pipeline.engine_choice import choose_engine
from geomcache.pipeline.process import Process
from geomcache.pipeline.workers import RowRange, batch_ranges

QUEUED_BATCHES = 2  # of a decoding task: one to take, one to make meanwhile
QUEUED_SHARDS = 2  # of an actor

LogLine = tuple[int, str]
"""Level and text of a line for the user: the driver logs it."""


@dataclass(frozen=True, kw_only=True)
class ActorFacts:
    """What an actor is, once it has its model: the driver compares it with the cache and the other actors."""

    node: str
    """The address of its node."""
    version: str
    """Of geomcache there."""
    spec: GeometrySpec
    dataset: DatasetSpec
    batch_size: int
    """Frames per forward pass."""
    lines: tuple[LogLine, ...]


@dataclass(frozen=True, kw_only=True)
class MadeShard:
    """A shard's content, and what it took."""

    shard: int
    maps: ShardMaps
    signatures: Signatures
    machine: Machine
    decode_s: float
    preprocess_s: float
    encode_s: float
    lines: tuple[LogLine, ...]


class ShardMaker:
    """An actor: holds the model, and makes the shards that it is given.

    Args:
        options: of the run, with the batch size that all actors have, once that is known.
        decoders: tasks that decode at the same time.
    """

    def __init__(self, options: ExtractOptions, decoders: int) -> None:
        self._options, self._decoders = options, decoders
        self._log = _LogLines()
        self._encoder: DA3Encoder | None = None
        self._dataset: FrameDataset | None = None
        self._decoder: Any = None  # the reference of a BatchDecoder
        self._batch_size = 0

    def start(self) -> ActorFacts:
        """Load the model and find the dataset; apart from the constructor, whose errors reach nobody.

        Raises:
            GeomcacheError: as `extract`.
        """
        options = self._options
        _share_tensors()
        self._dataset, _ = find_dataset(options, options.episodes)
        self._encoder = load_encoder(options, self._dataset.cameras, options.device or "cuda")
        self._batch_size = choose_batch_size(options, self._encoder, Process())
        # Once for all tasks: the episode table of a large dataset is large.
        self._decoder = ray.put(BatchDecoder(self._dataset.reader, self._encoder.preprocessor))
        return ActorFacts(
            node=ray.util.get_node_ip_address(),
            version=importlib.metadata.version("geomcache"),
            spec=self._encoder.spec,
            dataset=self._dataset.spec,
            batch_size=self._batch_size,
            lines=self._log.take(),
        )

    def make(self, claims: Sequence[Claim], frames: int) -> Iterator[MadeShard]:
        """Yield these shards, in the order in which they are done.

        Args:
            claims: ascending. A decoding task gets a run of consecutive ones, and opens each video file once for it.
            frames: that this actor may have to encode in all, which decides whether compiling is worth it.

        Raises:
            GeomcacheError: a frame cannot be decoded or encoded.
            ray.exceptions.RayError: a decoding task was lost.
        """
        assert self._encoder is not None
        assert self._dataset is not None
        encoder, spec = self._encoder, self._encoder.spec
        if encoder.calls == 0:
            choose_engine(self._options.engine, encoder, frames, self._batch_size)
        on_demand = EncoderOnDemand(lambda: encoder)
        on_demand.get()
        stage = BatchEncoder(on_demand, self._batch_size, self._dataset.reader.locate)
        first_rows = [claim.rows[0][0] for claim in claims]
        shards: dict[int, ShardAssembly] = {}  # those that have begun, by their place among the claims
        busy = _Busy()
        for encoded in stage.encode(busy.timed(self._decode(claims), pin=on_demand.on_gpu)):
            place = bisect_right(first_rows, encoded.start) - 1
            if place not in shards:
                shards[place] = ShardAssembly(claims[place], len(spec.cameras))
            if shards[place].add(encoded.maps, encoded.signatures):
                shard = shards.pop(place)
                yield MadeShard(
                    shard=shard.claim.shard,
                    maps=shard.by_camera(spec.camera_keys),
                    signatures=shard.signatures,
                    machine=Machine(encoder.device_name, encoder.engine),
                    encode_s=stage.encode_s,
                    lines=self._log.take(),
                    **busy.take(),
                )
                stage.encode_s = 0.0

    def _decode(self, claims: Sequence[Claim]) -> Iterator[NetworkBatch]:
        """Yield the batches of all decoding tasks as they arrive, in turn; those of a shard are in order."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        count = min(self._decoders, len(claims))
        bounds = [number * len(claims) // count for number in range(count + 1)]
        streams = deque[Any]()
        for start, stop in pairwise(bounds):
            ranges = [rows for claim in claims[start:stop] for rows in batch_ranges(claim, self._batch_size)]
            task = DECODING_TASK.options(scheduling_strategy=here)
            streams.append(task.remote(self._decoder, ranges))
        try:
            while streams:
                (stream, *_), _ = ray.wait([*streams], num_returns=1)
                try:
                    batch = next(stream)
                except StopIteration:
                    streams.remove(stream)
                    continue
                streams.rotate(-1 - streams.index(stream))  # the others first
                yield ray.get(batch)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        finally:
            for stream in streams:
                ray.cancel(stream)


def decode_ranges(decoder: BatchDecoder, ranges: Sequence[RowRange]) -> Iterator[NetworkBatch]:
    """Yield the network's input of each range of rows: a decoding task.

    Raises:
        GeomcacheError: a frame cannot be decoded.
    """
    _share_tensors()
    torch.set_num_threads(1)
    for start, stop in ranges:
        yield decoder.decode(start, stop)


DECODING_TASK = ray.remote(
    num_cpus=0,  # its actor has reserved the processor
    num_returns="streaming",
    max_retries=0,  # the driver gives the shards out again
    _generator_backpressure_num_objects=QUEUED_BATCHES,
)(decode_ranges)


def _share_tensors() -> None:
    """Let tensors travel as arrays, whose bytes Ray keeps in shared memory; they are copied where they arrive.

    PyTorch knows no tensor that cannot be written to, and what Ray shares is read-only.
    """
    ray.util.register_serializer(
        torch.Tensor,
        serializer=lambda tensor: tensor.numpy(),
        deserializer=lambda array: torch.from_numpy(array.copy()),
    )


class _Busy:
    """What decoding the batches of shards took."""

    def __init__(self) -> None:
        self._decode_s = self._preprocess_s = 0.0

    def timed(self, batches: Iterator[NetworkBatch], *, pin: bool) -> Iterator[NetworkBatch]:
        """Pass batches on, in page-locked memory if a GPU reads them."""
        for batch in batches:
            self._decode_s += batch.decode_s
            self._preprocess_s += batch.preprocess_s
            yield batch.pin_memory() if pin else batch

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call, by the names of `MadeShard`."""
        taken = {"decode_s": self._decode_s, "preprocess_s": self._preprocess_s}
        self._decode_s = self._preprocess_s = 0.0
        return taken


class _LogLines(logging.Handler):
    """Keeps what geomcache logs in this process, for the driver."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[LogLine] = []
        package = logging.getLogger("geomcache")
        package.addHandler(self)
        package.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.levelno, record.getMessage()))

    def take(self) -> tuple[LogLine, ...]:
        """Return the lines since the last call."""
        lines, self._lines = tuple(self._lines), []
        return lines
