"""Verify that a cache is as it was written, and repair what can be repaired. `check` compares.

This needs neither DA3 nor the dataset. Repair drops damaged shards, so that the next extraction makes just those
again, and makes a damaged manifest again from the journal. It leaves alone what could not be read now and may be whole,
and a shard that another process has made again meanwhile.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomcache.cache.check import CacheCheck, Problem
from geomcache.cache.commands import extract_command
from geomcache.cache.manifest import MANIFEST
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheCorruptError, CacheError
from geomcache.progress import human_bytes
from geomcache.ranges import Ranges, clip_ranges, count_rows, format_ranges, merge_ranges, rows_of

_LISTED = 100  # lines of problems; --json has all


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found, and what repair did."""

    path: str | Path
    """Of the cache, or its address."""
    sealed: bool
    frames: int
    """Rows that the cache says it has."""
    shards: int
    nbytes: int
    """Bytes of the shards' files."""
    problems: tuple[Problem, ...]
    repairs: tuple[str, ...] = ()
    """What was done about them, and what is left to do: a line each."""

    def lines(self) -> Iterator[str]:
        """Yield the report's lines for the user."""
        contents = f"{self.frames} frames in {self.shards} shards, {human_bytes(self.nbytes)}"
        if not self.problems:
            yield f"{self.path}: {contents}: every file, frame and row as it was written"
            return
        yield from (problem.message for problem in self.problems[:_LISTED])
        if len(self.problems) > _LISTED:
            yield f"... and {len(self.problems) - _LISTED} more: --json lists all"
        yield f"{self.path}: {contents}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        if self.repairs:
            yield from self.repairs
        elif any(problem.repairable for problem in self.problems):
            yield f"to repair what can be repaired: geomcache verify {self.path} --repair"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        problems = [
            {
                "file": each.file,
                "shard": each.shard,
                "rows": [list(part) for part in each.rows],
                "message": each.message,
            }
            for each in self.problems
        ]
        facts = {"path": str(self.path), "sealed": self.sealed, "frames": self.frames, "shards": self.shards}
        return {**facts, "nbytes": self.nbytes, "problems": problems, "repairs": list(self.repairs)}


def verify(path: str | Path, *, repair: bool = False) -> VerifyReport:
    """Compare everything in a cache with what was written. Shows a progress bar on a terminal.

    Repair drops damaged shards, and makes a damaged manifest again.

    Raises:
        CacheNotFoundError: nothing is at the path.
        CacheFormatError: the path is no cache, or its root attributes cannot be parsed.
        CacheLockedError: repair was asked for, and the file system has no POSIX locks.
        OSError: a file other than a shard's cannot be read.
    """
    folder = Path(path).absolute()
    check = CacheCheck(folder)
    check.run()
    repairs = tuple(_repair(folder, check)) if repair and check.problems else ()
    return report_of(check, folder, repairs)


def require_intact(path: str | Path) -> None:
    """Verify a cache that is about to be used, together with the other processes of a run on this machine.

    Every process of a run calls this. Those that torchrun or accelerate started on one machine check a share of the
    shards each, so that none waits for another; which share follows from LOCAL_RANK and LOCAL_WORLD_SIZE. A process
    without these two checks all shards, whatever RANK says.

    Raises:
        CacheCorruptError: the cache has a problem; the message has the first one.
        CacheError, OSError: as `verify`.
    """
    check = CacheCheck(Path(path).absolute())
    check.run(_share_of_shards(os.environ))
    report = report_of(check, check.folder)
    if report.problems:
        raise CacheCorruptError(
            f"cache {report.path}: expected what was written, found {len(report.problems)} problems: list them with"
            f" `geomcache verify {report.path}`; the first is {report.problems[0].message}"
        )


def _share_of_shards(environment: Mapping[str, str]) -> slice:
    """Return which of the shards, in order, this process of a run checks."""
    with contextlib.suppress(KeyError, ValueError):
        rank, processes = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
        if 0 <= rank < processes:
            return slice(rank, None, processes)
    return slice(None)


def report_of(check: CacheCheck, path: str | Path, repairs: tuple[str, ...] = ()) -> VerifyReport:
    """Return what a check of the cache at a path or address found."""
    return VerifyReport(
        path=path,
        sealed=check.manifest is not None,
        frames=count_rows(check.rows),
        shards=len(check.shards),
        nbytes=check.nbytes,
        problems=tuple(check.problems),
        repairs=repairs,
    )


def _repair(folder: Path, check: CacheCheck) -> Iterator[str]:
    """Drop damaged shards, or make a damaged manifest again; yield a line for each thing done or left to do."""
    from geomcache.cache.writer import StoreWriter

    if check.header is None or check.episodes is None or check.journal is None:
        yield "nothing was repaired: first restore from a copy the files listed above that belong to no shard"
        return
    in_shards = [problem for problem in check.problems if problem.shard is not None]
    damaged = {problem.shard: problem.file for problem in in_shards if problem.repairable}
    unread = {problem.shard for problem in in_shards} - damaged.keys()
    try:
        writer = StoreWriter(folder, check.header, check.episodes[1], ())
    except CacheCorruptError as error:
        yield f"nothing was repaired: {error}"
        return
    dropped: list[tuple[int, int]] = []
    with writer:
        for shard, file in damaged.items():
            assert shard is not None
            if writer.drop(shard, check.shards[shard], f"damaged: {file}"):
                dropped += clip_ranges(check.rows, *check.header.layout.shard_rows(shard))
            else:
                yield f"shard {shard} was not dropped: another process has it, or has made it again"
        # A manifest that exists was made when nothing was missing, and nothing has been written since.
        if not in_shards and (folder / MANIFEST).exists() and writer.seal():
            yield f"{folder / MANIFEST}: made again from the journal"
    if unread:
        yield f"{len(unread)} shards could not be read, and may be whole: they were left alone; verify again"
    if dropped:
        yield from _command(folder, check, merge_ranges(dropped))


def _command(folder: Path, check: CacheCheck, dropped: Ranges) -> Iterator[str]:
    assert check.episodes is not None
    episodes = np.unique(check.episodes[0].searchsorted(rows_of(dropped), "right") - 1)
    yield f"dropped {count_rows(dropped)} frames of episodes {format_ranges(episodes)}; to make them again:"
    try:
        with GeometryStore.open(folder) as store:
            yield f"  {extract_command(store, episodes)}  (with --root DIR where the dataset is local)"
    except CacheError as error:
        yield f"  the extract command that made the cache, once this is fixed: {error}"
