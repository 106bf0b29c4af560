"""Extractions on a local Ray cluster of several nodes, whose parts are killed.

Run as a program:

    python -m tests.faults.ray_cluster drive FILE           a driver: `geomcache extract --cluster ray`, shards counted
    python -m tests.faults.ray_cluster KIND COUNT FOLDER    equal, actors, nodes, drivers, later: prints JSON
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from geomcache.cache.journal import decode_line
from geomcache.cache.manifest import JOURNAL
from geomcache.cache.store import GeometryStore
from geomcache.extraction import ray_pool
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.ray_actor import MadeShard, ShardMaker
from geomcache.extraction.run import extract
from tests.support.datasets import DEMO, ROOT

NODE = {"num_cpus": 2, "object_store_memory": 200_000_000}  # an actor and its decoding task
UNLIKE = {JOURNAL, "lock"}  # files that depend on the order of events
MADE = "GEOMCACHE_TEST_MADE"  # the file in which actors count what they make
TOGETHER = "GEOMCACHE_TEST_TOGETHER"  # set: an actor goes on when another one has made a shard, too


class CountedShardMaker(ShardMaker):
    """An actor that writes down each shard as it has made it."""

    def make(self, *arguments: Any) -> Iterator[MadeShard]:
        descriptor = os.open(os.environ[MADE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for made in super().make(*arguments):
            os.write(descriptor, f"{made.shard} {os.getpid()}\n".encode())
            while TOGETHER in os.environ and len({pid for _, pid in _made_shards()}) < 2:
                time.sleep(0.1)
            yield made


def drive(file: Path) -> None:
    """Be a driver."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    values = json.loads(file.read_text())
    paths = {name: Path(values[name]) for name in ("root", "output")}
    vars(ray_pool)["ShardMaker"] = CountedShardMaker
    report = extract(ExtractOptions(**(values | paths)))
    print("\n".join(report.lines()), f"given out again: {report.shards_again}", sep="\n", flush=True)


def _made_shards() -> list[tuple[int, int]]:
    file = Path(os.environ[MADE])
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(shard), int(pid)) for shard, pid in map(str.split, lines)]


def demo_options(model: Path, output: Path, **changes: Any) -> ExtractOptions:
    """Three episodes of LIBERO, two cameras, video: 24 shards."""
    values: dict[str, Any] = {
        "model": str(model),
        "dataset": "demo",
        "root": DEMO,
        "output": output,
        "process_res": 56,
        "batch_size": 4,
        "num_workers": 1,
        "device": "cpu",
    }
    return ExtractOptions(**(values | changes))


def hashes(cache: Path) -> dict[str, str]:
    """Return the sha256 of each file of a cache, other than its journal."""
    files = (file for file in cache.rglob("*") if file.is_file() and file.name not in UNLIKE)
    return {str(file.relative_to(cache)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def commits(cache: Path) -> Counter[int]:
    """Return how often each shard was committed, by the journal."""
    with contextlib.suppress(FileNotFoundError):
        lines = (cache / JOURNAL).read_bytes().splitlines(keepends=True)
        records = [record for line in lines if (record := decode_line(line)) is not None]
        assert not any(record["record"] == "drop" for record in records)
        return Counter(record["shard"] for record in records if record["record"] == "commit")
    return Counter()


class Scene:
    """A cluster, a reference by one process, and drivers on it."""

    def __init__(self, folder: Path, model: Path, nodes: int = 2) -> None:
        from ray.cluster_utils import Cluster

        self.folder, self.model = folder, model
        self.made = folder / "made"
        self.fresh()
        os.environ[MADE] = str(self.made)  # for the nodes, and so for the actors
        os.environ["PYTHONPATH"] = str(ROOT)
        os.environ["OMP_NUM_THREADS"] = "1"  # numbers of a CPU depend on it; Ray would set an actor's processors
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - otherwise the lowest, on a machine with other work
        torch.set_num_threads(1)
        self.reference = folder / "reference.zarr"
        if not self.reference.exists():
            extract(demo_options(model, self.reference))
        self.expected = hashes(self.reference)
        self.shards = len(commits(self.reference))
        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self.others = [self.add_node() for _ in range(nodes - 1)]

    def add_node(self) -> Any:
        return self.cluster.add_node(**NODE)

    def driver(self, output: Path) -> subprocess.Popen[str]:
        options = demo_options(self.model, output, cluster="ray", cluster_address=self.cluster.address)
        file = self.folder / "options.json"
        file.write_text(json.dumps(dataclasses.asdict(options), default=str))
        command = [sys.executable, "-m", "tests.faults.ray_cluster", "drive", str(file)]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def made_shards(self) -> list[tuple[int, int]]:
        """Return (shard, process) of all shards that actors have made since the last call of `fresh`."""
        return _made_shards()

    def fresh(self) -> Path:
        self.made.unlink(missing_ok=True)
        output = self.folder / "ray.zarr"
        shutil.rmtree(output, ignore_errors=True)
        return output

    def check(self, output: Path, driver: subprocess.Popen[str]) -> str:
        """Wait for a driver; require its cache to be that of one process, each shard committed once."""
        said, _ = driver.communicate(timeout=600)
        assert driver.returncode == 0, said
        assert commits(output) == Counter(range(self.shards)), said  # nothing lost, nothing doubled
        with GeometryStore.open(output) as store:
            assert store.sealed
        assert hashes(output) == self.expected, said
        return said

    def actors(self) -> list[int]:
        """Return the processes of actors that this cluster runs."""
        import psutil

        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::CountedShardMaker"):
                    found.append(process.pid)
        return found

    def close(self) -> None:
        self.cluster.shutdown()

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_for(condition: Any, driver: subprocess.Popen[str], seconds: float = 300) -> bool:
    """Wait until something holds, or the driver has ended; return whether it held."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and driver.poll() is None:
        if condition():
            return True
        time.sleep(0.05)
    return False


def equal(scene: Scene, _count: int) -> dict[str, Any]:
    """A run without faults."""
    output = scene.fresh()
    said = scene.check(output, scene.driver(output))
    made = scene.made_shards()
    assert len(made) == scene.shards
    return {
        "files": len(scene.expected),
        "equal": True,
        "shards by actor": list(Counter(p for _, p in made).values()),
        "said": said,
    }


def _killing(scene: Scene, count: int, kill: Any) -> dict[str, Any]:
    """Kill something at random moments of as many runs as it takes."""
    generator = random.Random(0)
    kills, runs, again, handed = 0, 0, [], 0
    while kills < count:
        output = scene.fresh()
        driver = scene.driver(output)
        runs += 1
        while kills < count and driver.poll() is None:
            made = len(scene.made_shards())
            if not wait_for(lambda: scene.actors() and len(scene.made_shards()) > made, driver):  # noqa: B023 - at once
                break
            time.sleep(generator.uniform(0, 4))
            if driver.poll() is None and kill(generator):
                kills += 1
                print(f"kill {kills}, {len(scene.made_shards())} shards made", file=sys.stderr, flush=True)
        said = scene.check(output, driver)
        again.append(len(scene.made_shards()) - scene.shards)
        handed += int(said.rpartition("given out again: ")[2])
    return {
        "kills": kills,
        "runs": runs,
        "shards of a run": scene.shards,
        "computed again": sum(again),
        "by run": again,
        "given out again": handed,
    }


def actors(scene: Scene, count: int) -> dict[str, Any]:
    """SIGKILL to an actor."""

    def kill(generator: random.Random) -> bool:
        alive = scene.actors()
        if alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(generator.choice(alive), signal.SIGKILL)
                return True
        return False

    return _killing(scene, count, kill)


def nodes(scene: Scene, count: int) -> dict[str, Any]:
    """Remove the second node, with the actor and the decoding task that it runs; then add another."""

    def kill(_generator: random.Random) -> bool:
        scene.cluster.remove_node(scene.others.pop(), allow_graceful=False)
        scene.others.append(scene.add_node())
        return True

    return _killing(scene, count, kill)


def drivers(scene: Scene, count: int) -> dict[str, Any]:
    """SIGKILL to the driver, which is started again."""
    generator = random.Random(0)
    kills, caches, again, at = 0, 0, 0, []
    while kills < count:
        output = scene.fresh()
        while True:
            driver = scene.driver(output)
            made = len(scene.made_shards())
            if kills == count or not wait_for(lambda: len(scene.made_shards()) > made, driver):  # noqa: B023 - at once
                break  # done, or it ends by itself
            time.sleep(generator.uniform(0, 3))
            driver.kill()
            driver.communicate()
            kills += driver.returncode == -signal.SIGKILL
            at.append(len(commits(output)))
            print(f"kill {kills}, {at[-1]} shards durable", file=sys.stderr, flush=True)
        scene.check(output, driver)
        caches += 1
        again += len(scene.made_shards()) - scene.shards
    return {"kills": kills, "caches": caches, "shards durable at each kill": at, "computed again": again}


def later(scene: Scene, _count: int) -> dict[str, Any]:
    """A node that is added while a run works on one."""
    output = scene.fresh()
    driver = scene.driver(output)
    assert wait_for(scene.made_shards, driver)
    first = {pid for _, pid in scene.made_shards()}
    scene.add_node()
    said = scene.check(output, driver)
    by_actor = Counter(pid for _, pid in scene.made_shards())
    assert len(first) == 1
    assert len(by_actor) == 2, said
    return {"shards by actor": list(by_actor.values())}


KINDS = {"equal": equal, "actors": actors, "nodes": nodes, "drivers": drivers, "later": later}


def run(kind: str, count: int, folder: Path, model: Path) -> dict[str, Any]:
    if kind == "later":
        os.environ[TOGETHER] = "1"
    try:
        with Scene(folder, model, nodes=1 if kind == "later" else 2) as scene:
            return KINDS[kind](scene, count)
    finally:
        os.environ.pop(TOGETHER, None)


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "drive":
        drive(Path(arguments[1]))
        return
    kind, count, folder = arguments
    model = Path(folder) / "da3-small"
    if not model.exists():
        from pipelines.make_random_da3 import save_random_da3

        save_random_da3(model)
    began = time.perf_counter()
    print(json.dumps({kind: run(kind, int(count), Path(folder), model), "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(sys.argv[1:])
