"""Batches come in order, whoever decodes them: this process until the workers are ready, then the workers.

And they come if the workers cannot hand them over: no room in shared memory, a queue that fails, a stopped process.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.utils.data import get_worker_info

from geomcache.cache.writer import Claim, StoreWriter
from geomcache.da3.encoder import DA3Preprocessor
from geomcache.errors import FrameDecodeError, GeomcacheError
from geomcache.extraction import workers as workers_module
from geomcache.extraction.decoding import BatchDecoder, Handed, NetworkBatch, hand_over, open_batch
from geomcache.extraction.workers import ForkServer, RowRange, claimed_ranges, decode
from geomcache.frames.source import FrameDataset, open_dataset
from tests.support.datasets import make_dataset
from tests.support.logs import logged_lines

ROWS = 23


class Writer:
    """Three claims; the second has a gap."""

    def __init__(self) -> None:
        self.claims = [Claim(1, ((8, 11), (12, 16))), Claim(2, ((16, ROWS),))]

    def claim(self) -> Claim | None:
        return self.claims.pop(0) if self.claims else None


class Server:
    """Is ready after it was asked so often."""

    def __init__(self, after: int) -> None:
        self.after = after

    @property
    def ready(self) -> bool:
        self.after -= 1
        return self.after < 0


class Marked(BatchDecoder):
    """Leaves the process's number in place of a time."""

    def decode(self, start: int, stop: int) -> NetworkBatch | GeomcacheError:
        batch = super().decode(start, stop)
        return replace(batch, decode_s=os.getpid()) if isinstance(batch, NetworkBatch) else batch


class Unsendable(Marked):
    """Hands over something, in a worker, on which the thread that feeds its queue fails."""

    def __getitem__(self, rows: RowRange) -> Handed:
        if get_worker_info() is not None and rows == (8, 11):
            return cast("Handed", threading.Lock())
        return super().__getitem__(rows)


class Stopping(Marked):
    """Stops its worker, as a debugger or a job scheduler does."""

    def __getitem__(self, rows: RowRange) -> Handed:
        if get_worker_info() is not None and rows == (12, 16):
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__getitem__(rows)


class Slow(Marked):
    """Works for longer than the watch waits."""

    def __getitem__(self, rows: RowRange) -> Handed:
        end = time.process_time() + (2.5 if get_worker_info() is not None and rows == (12, 16) else 0)
        while time.process_time() < end:
            pass
        return super().__getitem__(rows)


class Cramped(Marked):
    """Finds no room in shared memory."""

    def __getitem__(self, rows: RowRange) -> Handed:
        if get_worker_info() is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "share_memory_", refuse)
                return super().__getitem__(rows)
        return super().__getitem__(rows)


def refuse(_tensor: torch.Tensor) -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> FrameDataset:
    root = tmp_path_factory.mktemp("decoding") / "dataset"
    make_dataset(root, (10, ROWS - 10))
    return open_dataset("test", root=root)[0]


def ranges(on_claim: Callable[[Claim], None] = lambda _: None) -> Iterator[RowRange]:
    return claimed_ranges(cast("StoreWriter", Writer()), Claim(0, ((0, 8),)), 4, on_claim=on_claim)


EXPECTED = [(0, 4), (4, 8), (8, 11), (12, 16), (16, 20), (20, 23)]


def run(decoder: BatchDecoder, workers: int, server: Server | None = None) -> list[NetworkBatch]:
    batches = list(decode(decoder, ranges(), workers, server=cast("ForkServer | None", server), pin_memory=False))
    assert [(batch.start, batch.stop) for batch in batches] == EXPECTED
    for batch in batches:
        expected = decoder.preprocessor(decoder.reader.read(batch.start, batch.stop).images)
        assert isinstance(expected, torch.Tensor)
        assert torch.equal(tensor(batch), expected)
    return batches


def tensor(batch: NetworkBatch) -> torch.Tensor:
    assert isinstance(batch.inputs, torch.Tensor)
    return batch.inputs


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    """Fork the workers of these tests from a server that has imported torch and LeRobot, as `extract` does."""
    ForkServer()._starting.join(240)


@pytest.fixture
def decoder(dataset: FrameDataset) -> Marked:
    return Marked(dataset.reader, DA3Preprocessor(dataset.cameras, 56, "upper_bound_resize"))


def test_rows_in_order_and_claims_announced(decoder: Marked) -> None:
    claims: list[Claim] = []
    for _ in decode(decoder, ranges(claims.append), 0, server=None, pin_memory=False):
        pass
    assert [claim.shard for claim in claims] == [0, 1, 2]
    run(decoder, 0)


@pytest.mark.parametrize("after", [0, 2, 100])
def test_this_process_decodes_until_the_workers_can(decoder: Marked, after: int) -> None:
    in_this_process = [batch.decode_s == os.getpid() for batch in run(decoder, 1, Server(after))]
    assert in_this_process == [True] * min(after, 6) + [False] * max(0, 6 - after)


@pytest.mark.parametrize("after", [0, 100])
def test_a_bad_frame_is_one_line_from_either(decoder: Marked, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr(decoder.reader, "root", Path("/nowhere"))
    with pytest.raises(FrameDecodeError) as caught:
        run(decoder, 1, Server(after))
    assert "\n" not in str(caught.value)
    assert "/nowhere" in str(caught.value)


@pytest.mark.parametrize("kind", [Unsendable, Stopping])
def test_workers_that_hand_over_nothing_are_given_up_with_a_line(
    decoder: Marked, monkeypatch: pytest.MonkeyPatch, kind: type[Marked]
) -> None:
    """Without the watch the loader would wait forever; no batch is lost and none comes twice."""
    monkeypatch.setattr(workers_module, "WATCH_S", 3)
    monkeypatch.setattr(workers_module, "IDLE_S", 0.05)
    with logged_lines() as lines:
        batches = run(kind(decoder.reader, decoder.preprocessor), 1)
    assert [line for line in lines if "idle" in line and "timed out after 3 seconds" in line]
    assert batches[0].decode_s != os.getpid()
    assert batches[-1].decode_s == os.getpid()
    for worker in multiprocessing.active_children():
        worker.join(20)
        assert not worker.is_alive()


def test_workers_that_are_slow_are_waited_for_with_a_line(decoder: Marked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "WATCH_S", 2)
    monkeypatch.setattr(workers_module, "IDLE_S", 0.0)  # any work is work, also on a busy machine
    with logged_lines() as lines:
        batches = run(Slow(decoder.reader, decoder.preprocessor), 1)
    assert [line for line in lines if "at work" in line]
    assert all(batch.decode_s != os.getpid() for batch in batches)


def test_batches_without_room_in_shared_memory_come_through_the_pipe(decoder: Marked) -> None:
    with logged_lines() as lines:
        batches = run(Cramped(decoder.reader, decoder.preprocessor), 1)
    assert all(batch.decode_s != os.getpid() for batch in batches)
    (line,) = lines  # once
    assert line.startswith("/dev/shm: ")
    assert "--shm-size" in line


@pytest.mark.parametrize("several", [False, True])
def test_a_batch_is_pickled_whole_if_it_does_not_fit(monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    inputs = [torch.rand(2, 3, 4, 4), torch.rand(2, 3, 8, 4)]
    batch = NetworkBatch(start=0, stop=2, inputs=inputs if several else inputs[0], decode_s=0, preprocess_s=0)
    assert hand_over(batch) is batch
    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    handed = hand_over(batch)
    assert isinstance(handed, bytes)
    opened = open_batch(handed, pin_memory=False).inputs
    for ours, expected in zip(opened if several else [opened], inputs, strict=False):
        assert isinstance(ours, torch.Tensor)
        assert torch.equal(ours, expected)


def test_processes_that_cannot_be_started_are_done_without(decoder: Marked, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_loader: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", fail)
    with logged_lines() as lines:
        batches = run(decoder, 1)
    assert all(batch.decode_s == os.getpid() for batch in batches)
    assert [line for line in lines if "No space left on device" in line]


def test_the_fork_server_becomes_ready() -> None:
    server = ForkServer()
    server._starting.join(120)
    assert server.ready
