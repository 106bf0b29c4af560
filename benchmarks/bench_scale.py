"""Does anything grow with the number of frames, and do two processes extract twice as much as one?

    python benchmarks/bench_scale.py [--frames 100000,1000000,30000000] [--extract-frames 64] [--process-res 168]

Two tables: the time and memory that opening a cache takes, complete ones of 10^5, 10^6 and 3 x 10^7 frames of one view
and one cell; and views/s of `geomcache extract` by one process and by two, each bound to a core of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.bench_read import made_up_dataset, made_up_signatures, made_up_spec
from benchmarks.common import real_dataset, table
from geomcache.cache.layout import MAX_SHARD_FRAMES
from geomcache.cache.writer import StoreWriter
from geomcache.frames.source import open_dataset
from pipelines.make_random_da3 import save_random_da3

EPISODE = 250  # frames
OPENS = 5
BATCH = 32

# Opens a cache in a process that has imported what it needs, and reads: what a worker of training does.
OPEN = """
import json, sys, time
import numpy as np
from geomcache.cache.store import GeometryStore
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before, began = resident(), time.perf_counter()
store = GeometryStore.open(sys.argv[1])
opened = time.perf_counter() - began
after = resident()
rng, times = np.random.default_rng(0), []
for _ in range(20):
    rows = rng.integers(0, store.dataset.frames, int(sys.argv[2]))
    began = time.perf_counter()
    store.batch(rows)
    times.append(time.perf_counter() - began)
print(json.dumps([opened, after - before, resident() - before, sorted(times)[10]]))
"""

# One process of an extraction, bound to the core that is named; prints frames, begin and end of its work.
EXTRACT = """
import json, os, sys, time
from pathlib import Path
options = json.loads(sys.argv[1])
os.sched_setaffinity(0, {options.pop("core")})
from geomcache.extraction.run import extract
from geomcache.extraction.options import ExtractOptions
options.update(root=Path(options["root"]), output=Path(options["output"]))
report = extract(ExtractOptions(**options))
print(json.dumps([report.frames, time.time() - report.seconds, time.time()]))
"""


def write_cache(path: Path, frames: int) -> float:
    """Write a complete cache of one view and one cell, and return the seconds that it took."""
    spec, dataset = made_up_spec((1, 1), cameras=1), made_up_dataset(frames, EPISODE)
    began = time.perf_counter()
    rng = np.random.default_rng(0)
    maps = rng.random((MAX_SHARD_FRAMES, 1, 1, 6)).astype(np.float16)
    signatures = made_up_signatures(rng, MAX_SHARD_FRAMES, cameras=1)
    with StoreWriter.create_or_open(
        path, spec, dataset.spec, dataset.lengths, [(0, frames)], identities=dataset.identities
    ) as writer:
        while (claim := writer.claim()) is not None:
            count = sum(stop - start for start, stop in claim.rows)
            key = spec.camera_keys[0]
            shard = {key: {"ray": maps[:count], "ray_conf": 1 + maps[:count, ..., 0]}}
            writer.commit(claim, shard, signatures[:count])
        writer.seal()
    return time.perf_counter() - began


def opening(folder: Path, sizes: list[int]) -> None:
    rows = []
    for frames in sizes:
        path = folder / f"{frames}.zarr"
        print(f"writing a cache of {frames} frames", file=sys.stderr)
        write_cache(path, frames)
        files = sum(len(names) for _, _, names in os.walk(path))
        runs = []
        for _ in range(OPENS):
            done = subprocess.run([sys.executable, "-c", OPEN, path, str(BATCH)], check=True, capture_output=True)
            runs.append(json.loads(done.stdout))
        opened, held, used, batch = (statistics.median(values) for values in zip(*runs, strict=True))
        cells = [f"{opened:.3f}", f"{held / 2**20:.1f}", f"{used / 2**20:.1f}", f"{1e3 * batch:.2f}"]
        rows.append([f"{frames:,}", f"{-(-frames // EPISODE):,}", f"{files:,}", *cells])
        shutil.rmtree(path)
    table(
        "Opening a cache",
        f"A fresh process that has imported geomcache: seconds of `GeometryStore.open`, resident memory that it adds,"
        f" the same after 20 batches of {BATCH} random frames, and the median of these. Median of {OPENS} processes,"
        " files in the page cache.",
        ["frames", "episodes", "files", "open, s", "memory, MiB", "after reading, MiB", f"batch of {BATCH}, ms"],
        rows,
    )


def run_together(options: dict[str, object], cores: list[int]) -> tuple[int, float]:
    """Return the frames, and the seconds from the first process's first claim to the last one's end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", EXTRACT, json.dumps({**options, "core": core})],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for core in cores
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    begins, ends = [begin for _, begin, _ in found], [end for _, _, end in found]
    return sum(frames for frames, _, _ in found), max(ends) - min(begins)


def extraction(folder: Path, arguments: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("Extraction by two processes was left out: this machine has one core.")
        return
    save_random_da3(folder / "model", "da3-small")
    dataset, _ = open_dataset("bench", root=arguments.root)
    lengths = dataset.reader.episode_length.cumsum()
    episodes = int((lengths < arguments.extract_frames).sum()) + 1
    rates: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(arguments.repeats):
        for count in rates:
            options = {
                "model": str(folder / "model"),
                "dataset": "bench",
                "root": str(arguments.root),
                "episodes": f"0:{episodes}",
                "output": str(folder / f"{count}-{repeat}.zarr"),
                "process_res": arguments.process_res,
                "batch_size": 4,
                "num_workers": 0,
                "device": "cpu",
            }
            frames, seconds = run_together(options, cores[:count])
            rates[count].append(frames * len(dataset.cameras) / seconds)
    one, two = (statistics.median(rates[count]) for count in (1, 2))
    ratio = statistics.median(b / a for a, b in zip(rates[1], rates[2], strict=True))
    table(
        "Extraction by one process and by two",
        f"DA3-SMALL at {arguments.process_res} px, {int(lengths[episodes - 1])} frames of {len(dataset.cameras)} views,"
        " one thread and one core a process, decoding in the process. From the first claim to the end of the last"
        f" process, median of {arguments.repeats}, in turn.",
        ["processes", "views/s", "ratio"],
        [["1", f"{one:.2f}", "1"], ["2", f"{two:.2f}", f"{ratio:.2f}"]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", default="100000,1000000,30000000")
    parser.add_argument("--root", type=Path, default=real_dataset())
    parser.add_argument("--extract-frames", type=int, default=64)
    parser.add_argument("--process-res", type=int, default=168)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one where none is given")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-scale-", dir=arguments.folder))
    try:
        opening(folder, [int(frames) for frames in arguments.frames.split(",") if frames])
        extraction(folder, arguments)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
