"""Stage one: every frame of a dataset through the encoder, once, into a cache.

    decode workers            main thread           writer thread
    pictures -> input  ───►   DA3 forward   ───►    shard in memory -> disk -> journal

The three overlap. The writer hands out shards of consecutive rows; decoding runs ahead of the forward by a few batches,
and a bounded queue stands between the forward and the writing, so that memory does not grow with the dataset. Several
processes (accelerate, array jobs, a command given twice) share a cache by claiming its shards; none waits for another
until nothing is left to claim.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from geomcache.cache.codecs import Codec
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.da3.encoder import DA3Encoder, PendingGeometry
from geomcache.errors import (
    NonFiniteGeometryError,
)
from geomcache.extraction.batch_size import find_batch_size, is_out_of_memory, memory_error
from geomcache.extraction.decoding import Batches, ForkServer, Work, decode, naming_worker_death
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.plan import describe_plan, require_space
from geomcache.extraction.run_config import resolve, write_run_config
from geomcache.extraction.sink import ShardSink
from geomcache.frames.source import FrameDataset, open_dataset
from geomcache.progress import Progress, Say, human_bytes, human_time, silent
from geomcache.ranges import count_rows

POLL_S = 0.5  # how often a process that has nothing left to do looks after the others' shards


@dataclass(kw_only=True)
class ExtractReport:
    """What this process did; `frames_total` is of all processes and runs together."""

    path: Path
    frames_total: int = 0
    """Frames that were asked for, and those of shards that had to be made again; all in the cache now."""
    frames: int = 0
    shards: int = 0
    views: int = 0
    nbytes: int = 0
    workers: int = 0
    """Decoding processes."""
    seconds: float = 0.0
    decode_s: float = 0.0
    """Of all decoding processes together; so is `preprocess_s`."""
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0

    def lines(self) -> list[str]:
        """For the user."""
        if not self.frames:
            return [f"{self.path}: complete, {self.frames_total} frames; nothing to do"]
        processes = max(1, self.workers)
        shares = (
            f"encode {self.encode_s / self.seconds:.0%}, write {self.write_s / self.seconds:.0%},"
            f" decode {self.decode_s / self.seconds / processes:.0%}"
            f" and preprocess {self.preprocess_s / self.seconds / processes:.0%} of {processes} process(es)"
        )
        return [
            f"{self.path}: {self.frames} frames, {self.views} views, {human_bytes(self.nbytes)} in {self.shards}"
            f" shards, {human_time(self.seconds)}, {self.views / self.seconds:.1f} views/s",
            f"busy, of that time: {shares}",
        ]


def extract(options: ExtractOptions, *, say: Say = print) -> ExtractReport:
    """Run stage one.

    Args:
        options: what is asked for.
        say: takes each line for the user.

    Raises:
        GeomcacheError: of the kind that says what is wrong; shards written before are kept.
    """
    process, codec = _Process.current(), Codec.of(options.codec)
    workers = _default_workers(process) if options.num_workers is None else options.num_workers
    server = ForkServer() if workers and not options.dry_run else None
    dataset, episodes = open_dataset(
        options.dataset,
        root=options.root,
        revision=options.revision,
        cameras=options.cameras,
        episodes=options.episodes,
    )
    encoder = DA3Encoder.from_pretrained(
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
    if options.batch_size == "auto":
        batch_size = find_batch_size(encoder, say if process.is_main else silent)
    else:
        batch_size = options.batch_size or (4 if encoder.device.type == "cpu" else 16)
    rows = dataset.rows(episodes)
    if options.dry_run:
        for line in describe_plan(options.output_path, dataset, encoder, rows, batch_size, codec):
            say(line)
        return ExtractReport(path=options.output_path)
    if not options.output_path.exists():
        require_space(options.output_path, encoder.spec, count_rows(rows), codec)
    with process.main_first():  # the others find what the main process made, also where it overwrote a cache
        writer = StoreWriter.create_or_open(
            options.output_path,
            encoder.spec,
            dataset.spec,
            dataset.reader.episode_length,
            rows,
            codec=codec,
            overwrite=options.overwrite and process.is_main,
        )
    with writer:
        if process.is_main:
            note = write_run_config(writer.path, resolve(options, encoder.spec, dataset.spec))
            if note is not None:
                say(note)
        done, total = writer.frames_done(), count_rows(writer.wanted)
        if process.is_main:
            if writer.removed_stale_files:
                say(f"{writer.path}: removed {writer.removed_stale_files} stale files of an interrupted run")
            if 0 < done < total:
                say(f"{writer.path}: {done} of {total} frames are there; going on with the rest")
        require_space(writer.path, encoder.spec, total - done, codec)
        return _Run(dataset, encoder, writer, batch_size, workers, server, process, say).until_sealed(total)


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
        process: "_Process",
        say: Say,
    ) -> None:
        self.dataset, self.encoder, self.writer = dataset, encoder, writer
        self.batch_size, self.server, self.process, self.say = batch_size, server, process, say
        self.together = batch_size  # frames a forward; fewer once memory has run out
        self.report = ExtractReport(path=writer.path, workers=workers)

    def until_sealed(self, total: int) -> ExtractReport:
        """Work until every row that was asked for is durable, by whoever, and the cache is sealed."""
        report, began = self.report, time.perf_counter()
        report.frames_total = total
        views = len(self.dataset.cameras)
        with Progress(total, views, self.writer.frames_done, show=self.process.is_main, say=self.say) as progress:
            while True:
                first = self.writer.claim()
                if first is not None:
                    self._work(first, progress)
                elif self.writer.pending():
                    time.sleep(POLL_S)  # others hold the rest; what they lose by dying can be claimed
                    progress.update(unwritten=0, nbytes=report.nbytes)
                else:
                    break
            self.writer.seal()
        report.seconds = time.perf_counter() - began
        report.views = report.frames * views
        return report

    def _work(self, first: Claim, progress: Progress) -> None:
        """Encode and write `first` and all that can be claimed after it."""
        report, encoded = self.report, 0
        on_gpu = self.encoder.device.type == "cuda"
        ahead = 1 if on_gpu else 0  # forwards that a GPU has to do while the one before them is read and written
        flying: deque[_Flight] = deque()
        with ShardSink(self.writer, self.encoder.spec) as sink, naming_worker_death():

            def land(most: int) -> None:
                nonlocal encoded
                while len(flying) > most:
                    began = time.perf_counter()
                    flight = flying.popleft()
                    maps = self._land(flight)
                    report.encode_s += time.perf_counter() - began
                    sink.put(maps)
                    encoded += flight.stop - flight.start
                    progress.update(unwritten=encoded - sink.frames_written, nbytes=report.nbytes + sink.nbytes_written)

            batches = Batches(self.writer, first, sink, self.batch_size)
            for work in decode(
                self.dataset.reader,
                self.encoder.preprocessor,
                batches,
                report.workers,
                server=self.server,
                pin_memory=on_gpu,
            ):
                report.decode_s += work.decode_s
                report.preprocess_s += work.preprocess_s
                for flight in self._launch(work):
                    flying.append(flight)
                    land(ahead)
            land(0)
        report.frames += sink.frames_written
        report.shards += sink.shards_written
        report.nbytes += sink.nbytes_written
        report.write_s += sink.write_s

    def _launch(self, work: Work) -> Iterator["_Flight"]:
        """Forwards of a batch: one, or several where memory did not suffice for one."""
        start = work.start
        while start < work.stop:
            stop = min(start + self.together, work.stop)
            began = time.perf_counter()
            pending = self._try(work, start, stop)
            self.report.encode_s += time.perf_counter() - began
            if pending is None:
                self._halve(stop - start)
            else:
                yield _Flight(start, stop, pending)
                start = stop

    def _try(self, work: Work, start: int, stop: int) -> PendingGeometry | None:
        """Begin with the geometry of these rows; None where memory does not suffice."""
        rows = slice(start - work.start, stop - work.start)
        inputs = [view[rows] for view in work.inputs] if isinstance(work.inputs, list) else work.inputs[rows]
        try:
            return self.encoder.launch(inputs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None  # outside of the handler: what the traceback held of the device's memory is free again

    def _land(self, flight: "_Flight") -> dict[str, NDArray[np.float16]]:
        try:
            return {name: values.numpy() for name, values in flight.pending.result().items()}
        except NonFiniteGeometryError as error:
            places = "; ".join(self._place(flight.start + b, view, name) for b, view, name in error.places[:4])
            raise NonFiniteGeometryError(
                f"{places}: the encoder gave NaN: check the weights, or try --dtype fp32", error.places
            ) from error

    def _halve(self, frames: int) -> None:
        if frames == 1:
            raise memory_error(self.encoder)
        self.together = frames // 2
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"{self.encoder.device}: out of memory with {frames} frames a forward; going on with {self.together}")

    def _place(self, index: int, view: int, output: str) -> str:
        episode, frame = self.dataset.reader.locate(index)
        return f"episode {episode} frame {frame} camera {self.encoder.spec.camera_keys[view]} {output}"


class _Flight(NamedTuple):
    """Consecutive rows whose geometry is being computed."""

    start: int
    stop: int
    pending: PendingGeometry


@dataclass(frozen=True, kw_only=True)
class _Process:
    """Where we stand among the processes that `accelerate launch` started."""

    is_main: bool = True
    count: int = 1
    local_count: int = 1
    device: torch.device | None = None
    """The accelerator that is this process's; None lets the encoder choose."""

    @classmethod
    def current(cls) -> Self:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # Without GPUs accelerate takes processes for one another's strangers unless it is told to use the CPU.
        state = PartialState(cpu=not torch.cuda.is_available())
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(is_main=state.is_main_process, count=state.num_processes, local_count=local, device=state.device)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the block before the others enter it."""
        if self.count == 1:
            yield
            return
        from accelerate import PartialState

        with PartialState().main_process_first():
            yield


def _default_workers(process: _Process) -> int:
    cores = len(os.sched_getaffinity(0)) // process.local_count
    return max(1, min(8, cores - 1))
