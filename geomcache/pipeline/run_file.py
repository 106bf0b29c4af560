"""The file next to a cache that holds the options of its run: who may write it, and what encoded the frames."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from geomcache.cache import durable, locks
from geomcache.cache.commands import Machine, run_config_path
from geomcache.cache.header import LOCK

HEADER = "# Written by `geomcache extract`; `geomcache extract --config` of this file repeats the run.\n"


def record_machine(cache: Path, machine: Machine) -> None:
    """Add to a run's options, once, what encodes its frames; not to a file that the user wrote."""
    with locked_run_config(cache) as (path, previous):
        if previous is not None and previous.startswith(HEADER) and machine.line not in previous:
            replace_run_config(path, previous, HEADER + machine.line + previous.removeprefix(HEADER))


@contextlib.contextmanager
def locked_run_config(cache: Path) -> Iterator[tuple[Path, str | None]]:
    """Give the file's path and its content, None if there is no file, while no other process writes it."""
    path = run_config_path(cache)
    with contextlib.closing(locks.LockFile(cache / LOCK)) as lock, lock.exclusive():
        try:
            previous = path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            previous = None
        yield path, previous


def replace_run_config(path: Path, previous: str | None, content: str) -> None:
    """Write the file, if its content changes."""
    if content != previous:
        durable.replace_file(path, content.encode())
