"""Updates of a cache that are killed by a real SIGKILL, as `killing` does it for writers.

Run as a program by test_update_kills.py, with what to do, a count and a folder. Prints one JSON object.
"""

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lerobot.datasets import LeRobotDatasetMetadata  # imported here, so that no child needs seconds for it

from geomcache.cache.header import Header
from geomcache.cache.verify import verify
from tests.faults.killing import Child, kill_before
from tests.support.edits import Episode, largest_difference, picture_of, workshop, write_dataset

assert LeRobotDatasetMetadata

Frames = list[tuple[Any, ...]]


def episode(first: int, length: int) -> Episode:
    return Episode(tuple((number, number + 1) for number in range(first, first + length)), first + 1)


BEFORE = [episode(0, 32), episode(100, 20), episode(200, 16), episode(300, 30)]
NEW_FRAMES = 25
AFTER = [BEFORE[0], BEFORE[3], BEFORE[2], episode(400, NEW_FRAMES)]  # in place, moved, moved, new


def frames_of(episodes: list[Episode]) -> Frames:
    return [tuple(map(picture_of, frame)) for each in episodes for frame in each.frames]


class Bench:
    """A cache of a dataset that has been edited; what it must hold before and after an update."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        assert Child(lambda _report: self._make()).wait()[0] == 0
        self._old, self._new = frames_of(BEFORE), frames_of(AFTER)
        self._fingerprint = Header.read(folder / "old.zarr").fingerprint

    def _make(self) -> None:
        write_dataset(self.folder / "before", BEFORE)
        write_dataset(self.folder / "after", AFTER)
        with workshop() as shop:
            shop.extract(self.folder / "old.zarr", self.folder / "before")

    def copy(self) -> Path:
        """Another cache to be updated; links would be changed by nobody, but a copy proves it."""
        target = self.folder / "work" / "cache.zarr"
        shutil.rmtree(target.parent, ignore_errors=True)
        return Path(shutil.copytree(self.folder / "old.zarr", target))

    def update(self, cache: Path) -> None:
        with workshop() as shop:
            shop.update(cache, self.folder / "after")

    def state(self, cache: Path) -> str:
        """``old`` or ``new``: the cache is the one or the other, whole, and every number is right."""
        assert verify(cache).problems == ()
        is_old = Header.read(cache).fingerprint == self._fingerprint
        assert largest_difference(cache, self._old if is_old else self._new) == 0
        return "old" if is_old else "new"

    def finish(self, cache: Path) -> None:
        """Give the same command again, to the end."""
        assert Child(lambda _report: self.update(cache)).wait()[0] == 0
        assert self.state(cache) == "new"
        assert sorted(file.name for file in cache.parent.iterdir()) == ["cache.run.yaml", "cache.zarr"]


def random_moments(count: int, folder: Path) -> dict[str, Any]:
    """Kill an update at a random moment, again and again; each resumes where the last one was killed."""
    generator, bench = random.Random(0), Bench(folder)
    began = time.perf_counter()
    cache = bench.copy()
    bench.finish(cache)
    duration = time.perf_counter() - began
    states = {"old": 0, "new": 0}
    kills = finished = 0
    cache = bench.copy()
    while kills < count:
        child = Child(lambda _report: bench.update(cache))  # noqa: B023 - ends in this round
        time.sleep(generator.uniform(0, duration))
        child.kill()
        status, _, _ = child.wait()
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        kills += os.WIFSIGNALED(status)
        state = bench.state(cache)
        states[state] += os.WIFSIGNALED(status)
        if state == "new" or generator.random() < 0.2:
            bench.finish(cache)
            finished += 1
            cache = bench.copy()
    return {"kills": kills, "found": states, "finished by the same command": finished}


def every_step(step: int, folder: Path) -> dict[str, Any]:
    """Kill an update in front of the n-th file operation, for every n (or every `step`-th)."""
    bench, states, kills, at = Bench(folder), {"old": 0, "new": 0}, 0, 0
    while True:
        cache = bench.copy()

        def job(_report: int) -> None:
            kill_before(at)  # noqa: B023 - ends in this round
            bench.update(cache)  # noqa: B023

        status, _, _ = Child(job).wait()
        states[bench.state(cache)] += os.WIFSIGNALED(status)
        bench.finish(cache)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return {"kills": kills, "found": states}
        kills += 1
        at += step


def two_at_once(rounds: int, folder: Path) -> dict[str, Any]:
    """Two updates of one cache at the same time."""
    bench, shares = Bench(folder), []
    for _ in range(rounds):
        cache = bench.copy()

        def job(report: int) -> None:
            with workshop() as shop:
                shop.update(cache, folder / "after")  # noqa: B023 - ends in this round
                os.write(report, b"done %d\n" % shop.frames_encoded)

        results = [child.wait() for child in [Child(job), Child(job)]]
        assert [status for status, _, _ in results] == [0, 0]
        shares.append([done for _, _, (done,) in results])
        assert sum(shares[-1]) == NEW_FRAMES  # none is encoded twice
        assert bench.state(cache) == "new"
        bench.finish(cache)
    return {"frames encoded by each": shares}


def main() -> None:
    torch.set_num_threads(1)
    what, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    jobs = {"random_moments": random_moments, "every_step": every_step, "two_at_once": two_at_once}
    print(json.dumps(jobs[what](count, folder)))
