"""The process among those that `accelerate launch` started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch

from geomcache.waits import waiting

MOST_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class Process:
    """One of the processes that share the work; the main one prints and creates the cache."""

    is_main: bool = True
    count: int = 1
    local_count: int = 1
    """Processes on this machine."""
    device: torch.device | None = None
    """The accelerator that this process owns; None leaves the choice to the encoder."""

    @classmethod
    def current(cls) -> Self:
        """Return this process, as accelerate's environment variables describe it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # Without GPUs accelerate does not connect the processes unless it is told to use the CPU.
        with waiting("waiting for the other processes of this run to connect: see what they print"):
            state = PartialState(cpu=not torch.cuda.is_available())
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(is_main=state.is_main_process, count=state.num_processes, local_count=local, device=state.device)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process before the others enter it."""
        if self.count == 1:
            yield
            return
        from accelerate import PartialState

        state = PartialState()
        if not self.is_main:
            with waiting("waiting for the main process of this run to create the cache: see what it prints"):
                state.wait_for_everyone()
        yield
        if self.is_main:
            with waiting("waiting for the other processes of this run to start: see what they print"):
                state.wait_for_everyone()

    @property
    def default_workers(self) -> int:
        """Decoding processes for this process: its share of the spare cores, at most 8."""
        cores = len(os.sched_getaffinity(0)) // self.local_count
        return max(1, min(MOST_WORKERS, cores - 1))
