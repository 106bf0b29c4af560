"""Batches come in order, whoever decodes them: this process until the workers are ready, then the workers.

And they come if the workers cannot hand them over, or one is stopped; one that dies is an error.
"""

import multiprocessing
import os
import queue
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, cast

import pytest
import torch

from geomcache import waits
from geomcache.cache.writer import Claim
from geomcache.da3.preprocess import DA3Preprocessor
from geomcache.errors import FrameDecodeError, WorkerDiedError
from geomcache.frames.reader import FrameReader
from geomcache.frames.source import FrameDataset, open_dataset
from geomcache.pipeline import workers as workers_module
from geomcache.pipeline.decoding import BatchDecoder, NetworkBatch
from geomcache.pipeline.handover import open_channel, receive, send
from geomcache.pipeline.workers import ForkServer, RowRange, claimed_ranges, decode
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
    """Leaves the process's number in place of a time, and does something at some rows if it runs in a worker."""

    def __init__(self, reader: FrameReader, preprocessor: DA3Preprocessor | None) -> None:
        super().__init__(reader, preprocessor)
        self.main = os.getpid()

    def decode(self, start: int, stop: int) -> NetworkBatch:
        batch = replace(super().decode(start, stop), decode_s=os.getpid())
        return batch if os.getpid() == self.main else self.in_worker(batch)

    def in_worker(self, batch: NetworkBatch) -> NetworkBatch:
        return batch


class Noting(Marked):
    """Notes which batch it has begun."""

    begun: ClassVar[queue.SimpleQueue[int]] = queue.SimpleQueue()

    def decode(self, start: int, stop: int) -> NetworkBatch:
        self.begun.put(start)
        return super().decode(start, stop)


class Unsendable(Marked):
    def in_worker(self, batch: NetworkBatch) -> NetworkBatch:
        return cast("NetworkBatch", threading.Lock()) if batch.start == 8 else batch


class WithoutMemory(Marked):
    """Is refused the memory for the tensors of a batch."""

    def in_worker(self, batch: NetworkBatch) -> NetworkBatch:
        if batch.start == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return batch


class Stopping(Marked):
    """Stops its worker, as a debugger or a job scheduler does."""

    def in_worker(self, batch: NetworkBatch) -> NetworkBatch:
        if batch.start == 12:
            os.kill(os.getpid(), signal.SIGSTOP)
        return batch


class Dying(Marked):
    def in_worker(self, batch: NetworkBatch) -> NetworkBatch:
        if batch.start == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch


class Failing(Marked):
    """Has a fault that no error of ours describes."""

    def in_worker(self, batch: NetworkBatch) -> NetworkBatch:
        if batch.start == 8:
            raise KeyError("missing key")
        return batch


class Slow(Marked):
    """Works for longer than the watch waits."""

    def in_worker(self, batch: NetworkBatch) -> NetworkBatch:
        end = time.process_time() + (2.5 if batch.start == 12 else 0)
        while time.process_time() < end:
            pass
        return batch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> FrameDataset:
    root = tmp_path_factory.mktemp("decoding") / "dataset"
    make_dataset(root, (10, ROWS - 10))
    return open_dataset("test", root=root)[0]


def ranges(on_claim: Callable[[Claim], None] = lambda _: None) -> Iterator[RowRange]:
    return claimed_ranges(Writer().claim, Claim(0, ((0, 8),)), 4, on_claim=on_claim)


EXPECTED = [(0, 4), (4, 8), (8, 11), (12, 16), (16, 20), (20, 23)]


def run(decoder: BatchDecoder, workers: int, server: Server | None = None) -> list[NetworkBatch]:
    batches = list(decode(decoder, ranges(), workers, server=cast("ForkServer | None", server)))
    assert [(batch.start, batch.stop) for batch in batches] == EXPECTED
    for batch in batches:
        assert decoder.preprocessor is not None
        expected = decoder.preprocessor(decoder.reader.read(batch.start, batch.stop).images)
        assert isinstance(expected, torch.Tensor)
        assert isinstance(batch.inputs, torch.Tensor)
        assert torch.equal(batch.inputs, expected)
    return batches


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    """Fork the workers of these tests from a server that has imported torch and LeRobot, as `extract` does."""
    ForkServer()._starting.join(240)


@pytest.fixture
def decoder(dataset: FrameDataset) -> Marked:
    return Marked(dataset.reader, DA3Preprocessor(dataset.cameras, 56, "upper_bound_resize"))


def test_rows_in_order_and_claims_announced(decoder: Marked) -> None:
    claims: list[Claim] = []
    for _ in decode(decoder, ranges(claims.append), 0, server=None):
        pass
    assert [claim.shard for claim in claims] == [0, 1, 2]
    run(decoder, 0)


@pytest.mark.parametrize("after", [0, 2, 100])
def test_this_process_decodes_until_the_workers_can(decoder: Marked, after: int) -> None:
    in_this_process = [batch.decode_s == os.getpid() for batch in run(decoder, 1, Server(after))]
    assert in_this_process == [True] * min(after, 6) + [False] * max(0, 6 - after)


def test_until_then_a_batch_is_decoded_while_the_encoder_works_on_the_one_before(decoder: Marked) -> None:
    noting = Noting(decoder.reader, decoder.preprocessor)
    batches = decode(noting, ranges(), 1, server=cast("ForkServer", Server(100)))
    next(batches)
    assert [noting.begun.get(timeout=60) for _ in range(2)] == [0, 4]  # nobody has asked for the second
    assert [batch.start for batch in batches] == [start for start, _ in EXPECTED[1:]]


@pytest.mark.parametrize("after", [0, 100])
def test_a_bad_frame_is_one_line_from_either(decoder: Marked, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr(decoder.reader, "root", Path("/nowhere"))
    with pytest.raises(FrameDecodeError) as caught:
        run(decoder, 1, Server(after))
    assert "\n" not in str(caught.value)
    assert "/nowhere" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Unsendable, "lock"),
        (WithoutMemory, "File too large"),
        (Stopping, "3 s"),
    ],
)
def test_workers_that_hand_over_nothing_are_given_up_with_a_line(
    decoder: Marked, monkeypatch: pytest.MonkeyPatch, kind: type[Marked], reason: str
) -> None:
    """No batch is lost and none comes twice."""
    monkeypatch.setattr(workers_module, "WATCH_S", 3)
    monkeypatch.setattr(workers_module, "IDLE_S", 0.05)
    with logged_lines() as lines:
        batches = run(kind(decoder.reader, decoder.preprocessor), 1)
    assert [line for line in lines if reason in line and "in this process" in line]
    assert batches[0].decode_s != os.getpid()
    assert batches[-1].decode_s == os.getpid()
    assert not multiprocessing.active_children()


def test_a_worker_that_is_stopped_while_its_batches_are_unread_holds_up_nothing(
    decoder: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "WATCH_S", 3)
    batches = decode(decoder, ranges(), 1, server=None)
    first = next(batches)
    time.sleep(1)  # the next two are decoded
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    with logged_lines() as lines:
        rest = list(batches)
    assert [(batch.start, batch.stop) for batch in (first, *rest)] == EXPECTED
    assert [line for line in lines if "in this process" in line]


def test_workers_that_are_slow_are_waited_for_with_a_line(decoder: Marked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "WATCH_S", 2)
    monkeypatch.setattr(workers_module, "IDLE_S", 0.0)  # any work is work, also on a busy machine
    with logged_lines() as lines:
        batches = run(Slow(decoder.reader, decoder.preprocessor), 1)
    assert [line for line in lines if "at work" in line]
    assert all(batch.decode_s != os.getpid() for batch in batches)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_dies_is_one_line_with_the_signal(decoder: Marked, workers: int) -> None:
    with pytest.raises(WorkerDiedError, match="SIGKILL") as caught:
        run(Dying(decoder.reader, decoder.preprocessor), workers)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_another_fault_in_a_worker_keeps_its_traceback(decoder: Marked) -> None:
    with pytest.raises(KeyError, match="missing key") as caught:
        run(Failing(decoder.reader, decoder.preprocessor), 1)
    assert "in in_worker" in "".join(caught.value.__notes__)


def test_processes_that_cannot_be_started_are_done_without(decoder: Marked, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_process: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", fail)
    with logged_lines() as lines:
        batches = run(decoder, 1)
    assert all(batch.decode_s == os.getpid() for batch in batches)
    assert [line for line in lines if "No space left on device" in line]


def test_workers_end_with_whoever_reads_their_batches(decoder: Marked) -> None:
    batches = decode(decoder, ranges(), 2, server=None)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_a_worker_ends_when_the_main_process_is_gone(decoder: Marked) -> None:
    near, far = open_channel()
    process = multiprocessing.get_context("forkserver").Process(target=workers_module._work, args=(decoder, far))
    process.start()
    far.close()
    send(near, (0, 4))
    assert receive(near).start == 0
    near.close()  # as the kernel does
    process.join(20)
    assert process.exitcode == 0


def test_the_fork_server_becomes_ready() -> None:
    server = ForkServer()
    server._starting.join(120)
    assert server.ready


def test_workers_that_start_late_are_waited_for_with_a_line(decoder: Marked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.1)
    with logged_lines() as lines:
        for number, batch in enumerate(decode(decoder, ranges(), 1, server=cast("ForkServer", Server(100)))):
            assert batch.decode_s == os.getpid()
            for _ in range(200 if number == 0 else 0):
                if lines:
                    break
                time.sleep(0.05)
    assert lines[0].startswith("waiting for decoding processes to start")


def test_a_killed_worker_that_does_not_end_is_waited_for_with_a_line(
    decoder: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its disk never answers: here it is killed late."""
    worker = workers_module._Worker(decoder)
    process = worker._process
    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.1)
    monkeypatch.setattr(process, "kill", lambda: threading.Timer(1.0, process.terminate).start())
    with logged_lines() as lines:
        worker.kill()
    assert not process.is_alive()
    assert lines[0].startswith("waiting for a decoding process that was killed")
