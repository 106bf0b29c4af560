"""The watch on LeRobot's data loader: lines while it waits, an error in one line where its processes are gone."""

import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.scripts import lerobot_train
from torch.utils.data import DataLoader, Dataset

from geomcache import waits
from geomcache.errors import WorkerDiedError
from geomcache.training import loading
from geomcache.training.loading import fit_shared_memory, watched_loader
from tests.support.logs import logged_lines

# Python 3.12 warns of fork in a process with threads; a spawned process would import LeRobot for seconds.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

Usage = namedtuple("Usage", "total used free")


class Numbers(Dataset[int]):
    """Items 0 to 7; a loading process does something before it makes item 4."""

    def __init__(self, before: Callable[[], object]) -> None:
        self._before = before

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> int:
        if number == 4:
            self._before()
        return number


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dawdle() -> None:
    time.sleep(1.0)


@contextmanager
def loader(before: Callable[[], object]) -> Iterator[Iterator[Any]]:
    """The batches that the trainer asks for, with one loading process."""
    context = multiprocessing.get_context("fork")
    made = DataLoader(Numbers(before), batch_size=2, num_workers=1, multiprocessing_context=context)
    with watched_loader(lambda: "resume from step 7"):
        yield lerobot_train.cycle(made)


def test_a_slow_batch_has_lines_and_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.2)
    with logged_lines() as lines, loader(dawdle) as batches:
        assert [next(batches).tolist() for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert any(line.startswith("waiting for a batch from loading processes: ") for line in lines)


def test_a_process_that_was_stopped_is_named_with_the_way_out_and_ended_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.5)
    monkeypatch.setattr(loading, "IDLE_LIMIT_S", 1.2)
    monkeypatch.setattr(loading, "_IDLE_S", 0.01)
    with logged_lines() as lines, pytest.raises(WorkerDiedError) as caught, loader(stop) as batches:
        for _ in batches:
            pass
    assert any("is stopped (`kill -CONT " in line for line in lines)
    for part in ("did nothing for 1.2 s", "resume from step 7"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_process_that_died_is_one_line() -> None:
    with pytest.raises(WorkerDiedError) as caught, loader(die) as batches:
        for _ in batches:
            pass
    for part in ("DataLoader worker", "resume from step 7"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_faults_of_the_loader_keep_their_error() -> None:
    def fail(loader: Any) -> Iterator[Any]:
        yield 0
        raise RuntimeError("something else")

    upstream = lerobot_train.cycle
    try:
        lerobot_train.cycle = fail
        with pytest.raises(RuntimeError, match="something else"), watched_loader(lambda: ""):
            list(lerobot_train.cycle(None))
    finally:
        lerobot_train.cycle = upstream


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (10_000, (4, 2)),  # 4 x 2 batches of 800 bytes, and the trainer's
        (8_100, (4, 2)),
        (7_900, (4, 1)),  # room for 7 besides the trainer's
        (3_600, (3, 1)),
        (1_800, (1, 1)),
        (1_700, (0, 2)),
        (0, (0, 2)),
    ],
)
def test_as_many_processes_load_as_the_shared_memory_can_hold(
    monkeypatch: pytest.MonkeyPatch, free: int, expected: tuple[int, int]
) -> None:
    item = {"picture": torch.zeros(3, 8, 8, dtype=torch.uint8), "action": torch.zeros(2), "task": "pick"}  # 200 bytes
    streaming = SimpleNamespace(streaming=False)
    config = SimpleNamespace(num_workers=4, prefetch_factor=2, batch_size=4, dataset=streaming)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    with logged_lines() as lines:
        fit_shared_memory(config, [item])
    workers, ahead = expected
    assert config.num_workers == workers
    assert config.prefetch_factor == ahead or workers == 0
    assert bool(lines) == (expected != (4, 2))


def test_a_barrier_of_the_trainer_is_waited_for_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.1)
    monkeypatch.setattr(accelerate.Accelerator, "wait_for_everyone", lambda _: time.sleep(0.5))
    with logged_lines() as lines, watched_loader(lambda: ""):
        accelerate.Accelerator().wait_for_everyone()
    assert lines[0].startswith("waiting for the other processes of this run")
