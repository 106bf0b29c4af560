"""Writers that are killed by a real SIGKILL: forked from a small process, so that a kill costs milliseconds.

Run as a program by test_kills.py: `python -c "from tests.faults.killing import main; main()" WHAT COUNT FOLDER`. Prints
one JSON object.
"""

import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geomcache.cache import durable
from geomcache.cache.writer import StoreWriter
from tests.faults.common import LONG, SHORT, assert_finished, finish, held_rows
from tests.support.stores import Faults, claim_rows, commit, make_maps, make_store, open_writer


def work(path: Path, lengths: tuple[int, ...], report: int) -> None:
    """Write all that can be claimed; every claim and every acknowledged commit is reported at once."""
    with open_writer(path, lengths=lengths) as writer:
        _work(writer, report)


def _work(writer: StoreWriter, report: int) -> None:
    while (claim := writer.claim()) is not None:
        os.write(report, b"claim %d\n" % claim.shard)
        commit(writer, claim, make_maps(writer.spec, claim_rows(claim)))
        os.write(report, b"done %d\n" % claim.shard)
    writer.seal()


class Child:
    """A forked process and what it reported."""

    def __init__(self, job: Callable[[int], None]) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            code = 1
            try:
                job(write)
                code = 0
            finally:
                os._exit(code)
        os.close(write)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> tuple[int, list[int], list[int]]:
        """Exit status, shards that it claimed, shards whose commit was acknowledged."""
        lines = b""
        while part := os.read(self._read, 1 << 16):
            lines += part
        os.close(self._read)
        status = os.waitpid(self.pid, 0)[1]
        words = [line.split() for line in lines.decode().splitlines()]
        return (
            status,
            [int(number) for word, number in words if word == "claim"],
            [int(number) for word, number in words if word == "done"],
        )


def rows_of_shard(shard: int, lengths: tuple[int, ...]) -> set[int]:
    return {*range(16 * shard, min(16 * shard + 16, sum(lengths)))}


def random_moments(count: int, folder: Path) -> dict[str, Any]:
    """One writer, killed at a random moment of its run, again and again; each resumes where the last one was killed."""
    generator = random.Random(0)
    began = time.perf_counter()
    half = make_store(folder / "half", [(0, 8), (24, 40)], lengths=LONG)
    empty = folder / "empty"
    open_writer(empty, lengths=LONG).close()
    whole = shutil.copytree(empty, folder / "whole")
    began = time.perf_counter()
    Child(lambda report: work(whole, LONG, report)).wait()
    duration = time.perf_counter() - began
    path = folder / "cache"
    again: list[int] = []
    recovery: list[float] = []
    kills = finished = 0
    while kills < count:
        if not path.exists():
            shutil.copytree(half if finished % 2 else empty, path)
        before = held_rows(path)
        child = Child(lambda report: work(path, LONG, report))
        time.sleep(generator.uniform(0, duration / 2))
        child.kill()
        status, claimed, done = child.wait()
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0
        kills += killed
        held = held_rows(path)
        for shard in done:
            assert rows_of_shard(shard, LONG) <= held, f"shard {shard} was acknowledged and is lost"
        # Only the shard at hand may lack what was there before: it was being replaced.
        assert len({row // 16 for row in before - held}) <= 1
        if killed:
            lost = [shard for shard in claimed if not rows_of_shard(shard, LONG) <= held]
            again.append(sum(len(rows_of_shard(shard, LONG)) for shard in lost))
            began = time.perf_counter()
            with open_writer(path, lengths=LONG) as writer:
                writer.claim()
            recovery.append(time.perf_counter() - began)
        if not killed or generator.random() < 0.1:
            finish(path, LONG)
            shutil.rmtree(path)
            finished += 1
    if path.exists():
        finish(path, LONG)
    return {
        "kills": kills,
        "caches finished afterwards": finished,
        "frames computed again": {"median": statistics.median(again), "worst": max(again)},
        "recovery ms": {"median": 1e3 * statistics.median(recovery), "worst": 1e3 * max(recovery)},
    }


def every_step(step: int, folder: Path) -> dict[str, Any]:
    """SIGKILL in front of the n-th file operation of a run, for every n (or every `step`-th)."""
    begun = make_store(folder / "begun", [(8, 24)], lengths=SHORT)
    empty = folder / "empty"
    open_writer(empty, lengths=SHORT).close()
    kills = 0
    for start in (begun, empty):
        at = 0
        while True:
            path = shutil.copytree(start, folder / f"{start.name}-{at}")
            status, _, done = Child(lambda report: kill_at(at, path, report)).wait()  # noqa: B023 - ends in this round
            held = held_rows(path)
            assert all(rows_of_shard(shard, SHORT) <= held for shard in done)
            finish(path, SHORT)
            shutil.rmtree(path)
            if not os.WIFSIGNALED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            kills += 1
            at += step
    return {"kills": kills}


def kill_at(at: int, path: Path, report: int) -> None:
    kill_before(at)
    work(path, SHORT, report)


def kill_before(at: int) -> None:
    """Let this process be killed in front of a file operation, counted from 0."""
    count = 0

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return operation(*arguments)

        return wrapped

    for name in Faults.OPERATIONS:
        setattr(durable, name, wrap(getattr(durable, name)))


def many_writers(rounds: int, folder: Path) -> dict[str, Any]:
    """2 to 8 writers on one cache, about a third of them killed at random moments; the others go on to the end."""
    generator = random.Random(1)
    empty = folder / "empty"
    open_writer(empty, lengths=LONG).close()
    writers = killed = 0
    for number in range(rounds):
        path = shutil.copytree(empty, folder / "cache")
        children = [Child(lambda report: work(path, LONG, report)) for _ in range(2 + number % 7)]  # noqa: B023
        for child in children[: len(children) // 3 + 1]:
            time.sleep(generator.uniform(0, 0.02))
            child.kill()
        results = [child.wait() for child in children]
        writers += len(children)
        killed += sum(os.WIFSIGNALED(status) for status, _, _ in results)
        done = [shard for _, _, shards in results for shard in shards]
        assert len(done) == len({*done}), "a shard was made twice"
        held = held_rows(path)
        assert all(rows_of_shard(shard, LONG) <= held for shard in done)
        finish(path, LONG)
        assert_finished(path, LONG)
        shutil.rmtree(path)
    return {"rounds": rounds, "writers": writers, "killed": killed}


def main() -> None:
    what, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    jobs = {"random_moments": random_moments, "every_step": every_step, "many_writers": many_writers}
    print(json.dumps(jobs[what](count, folder)))
