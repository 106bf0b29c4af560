"""Watch the data loader of LeRobot's trainer: what is waited for, processes that die, shared memory that is too small.

Loading processes hand batches over in /dev/shm, which has 64 MB in a container: a batch that does not fit kills the
process that makes it. torch's loader waits without a limit for a process that was stopped, or whose disk is gone.
"""

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from geomcache.errors import WorkerDiedError, one_line
from geomcache.lerobot_options import replaced
from geomcache.progress import human_bytes
from geomcache.waits import Activity, activity, waiting

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where torch puts batches
IDLE_LIMIT_S = 300.0  # after so long in which no loading process did anything, they are ended
_IDLE_S = 1.0  # processor seconds between two lines below which a process is not working

logger = logging.getLogger(__name__)


def fit_shared_memory(config: Any, dataset: Any) -> None:
    """Let as many loading processes run as /dev/shm can hold the batches of, and say so where that are fewer.

    Each has LeRobot's `prefetch_factor` of batches ready, and the trainer holds one.

    Args:
        config: LeRobot's `TrainPipelineConfig`; its `num_workers` and `prefetch_factor` may be lowered.
        dataset: what the loader reads; a streaming one is not asked for an item.
    """
    if config.num_workers == 0 or config.dataset.streaming:
        return
    with torch.random.fork_rng(devices=[]):  # which image transforms draw from
        values = [value for value in dataset[0].values() if isinstance(value, torch.Tensor)]
    batch_nbytes = config.batch_size * sum(value.nbytes for value in values)
    free = shutil.disk_usage(SHARED_MEMORY).free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asked, ahead = config.num_workers, config.prefetch_factor or 2
    room = int(0.9 * free) // batch_nbytes - 1  # batches that may be ready
    if asked * ahead <= room:
        return
    config.num_workers = min(asked, max(room, 0))
    config.prefetch_factor = min(ahead, max(1, room // max(1, config.num_workers)))
    logger.warning(
        "%s: expected room for the %s that %d loading processes have ready, found %s: %d processes load, with %d"
        " batches each; for more give the container a larger one (docker run --shm-size=8g)",
        SHARED_MEMORY,
        human_bytes((asked * ahead + 1) * batch_nbytes),
        asked,
        human_bytes(free),
        config.num_workers,
        config.prefetch_factor if config.num_workers else 0,
    )


@contextlib.contextmanager
def watched_loader(resume_note: Callable[[], str]) -> Iterator[None]:
    """Let LeRobot's trainer say every 30 s that it waits for a batch, and for what, or for the processes of the run.

    A loading process that died ends the run in one line, and so do processes that did nothing for `IDLE_LIMIT_S`.

    Args:
        resume_note: says how the run is resumed, for these lines.
    """
    import accelerate
    from lerobot.scripts import lerobot_train

    workers = _LoadingProcesses()

    def watched(cycle: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        def batches(loader: Any) -> Iterator[Any]:
            iterator = cycle(loader)
            while True:
                workers.begin()
                with waiting(workers.describe):
                    batch = next(iterator)
                yield batch

        return batches

    def waited(wait: Callable[[Any], None]) -> Callable[[Any], None]:
        def wait_for_everyone(accelerator: Any) -> None:
            with waiting("waiting for the other processes of this run: see what they print"):
                wait(accelerator)

        return wait_for_everyone

    with replaced(lerobot_train, "cycle", watched), replaced(accelerate.Accelerator, "wait_for_everyone", waited):
        try:
            yield
        except RuntimeError as error:  # of torch, wherever the main thread is when a loading process dies
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerDiedError(f"{workers.fate or one_line(error)}: {resume_note()}") from error


class _LoadingProcesses:
    """The processes that load batches for this one, while it waits.

    Attributes:
        fate: what was done to them; empty if nothing was.
    """

    def __init__(self) -> None:
        self.fate = ""
        self.begin()

    def begin(self) -> None:
        """Begin to wait."""
        self._before: dict[int, Activity] = {}
        self._worked = time.monotonic()

    def describe(self) -> str:
        """Return a line about them; end them if they did nothing for too long."""
        now = {child.pid: activity(child.pid) for child in multiprocessing.active_children() if child.pid is not None}
        if not now:
            return "waiting for a batch, which this process makes itself: its disk is slow, or the batch is large"
        at_work = {pid for pid, each in now.items() if each.cpu_s - self._before.get(pid, each).cpu_s >= _IDLE_S}
        if at_work or not self._before:
            self._worked = time.monotonic()
        self._before = now
        listed = ", ".join(f"{pid} {_describe(pid, each, pid in at_work)}" for pid, each in now.items())
        if time.monotonic() - self._worked >= IDLE_LIMIT_S:
            self.fate = f"loading processes did nothing for {IDLE_LIMIT_S:g} s ({listed}) and were ended"
            for pid in now:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return self.fate
        return f"waiting for a batch from loading processes: {listed}"


def _describe(pid: int, process: Activity, at_work: bool) -> str:
    if process.state == "T":
        return f"is stopped (`kill -CONT {pid}` lets it continue)"
    if at_work:
        return "is at work"
    return "waits for its disk" if process.state == "D" else "does nothing"
