"""What the benchmarks share: the machine's name, tables as Markdown and JSON, random models, and a longer dataset."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
MINI = ROOT.parent / "shared" / "libero_object_mini"
DEMO = ROOT / "examples" / "libero_object_demo"
JSON_FILE = "GEOMCACHE_BENCH_JSON"  # the variable that names a file for the tables, one JSON object a line


def real_dataset() -> Path:
    """Return the largest real dataset on this machine."""
    return MINI if MINI.is_dir() else DEMO


def machine() -> str:
    """Return device, date and versions, in one line."""
    cores = len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu_name()}, {cores} cores"
    packages = ("torch", "depth-anything-3", "lerobot", "zarr")
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    return f"{device}; {datetime.now(UTC):%Y-%m-%d}; Python {platform.python_version()}, {versions}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a machine without a registry, where it was unpacked
        return "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(title: str, method: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table as Markdown, with its method and machine above it, and add it to the file of `JSON_FILE`."""
    print(f"### {title}\n\n{method}\n\n{machine()}\n")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)
    if JSON_FILE in os.environ:
        found = {
            "title": title,
            "method": method,
            "machine": machine(),
            "head": list(head),
            "rows": list(map(list, rows)),
        }
        with Path(os.environ[JSON_FILE]).open("a") as file:
            file.write(json.dumps(found) + "\n")


def synchronize(device: torch.device) -> None:
    """Wait for what runs on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the time of a call, to the end of what it starts on a GPU."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def median_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of a call, after one that warms up."""
    run()
    return float(np.median([seconds(run, device) for _ in range(repeats)]))


@contextlib.contextmanager
def da3_folder(folder: Path | None, preset: str) -> Iterator[Path]:
    """Give a DA3 folder: `folder`, which is made with random weights where it does not exist, or a temporary one."""
    from pipelines.make_random_da3 import save_random_da3

    if folder is not None:
        if not folder.exists():
            save_random_da3(folder, preset)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="bench-da3-") as name:
        save_random_da3(Path(name), preset)
        yield Path(name)


@contextlib.contextmanager
def initialised_on(device: str) -> Iterator[None]:
    """Have Pi0.5's random weights drawn on a GPU: on a CPU 3.6 billion of them take minutes. They stay random."""
    from geomcache.policy.modeling_pi05_geometry import PI05GeometryPytorch

    initialise = PI05GeometryPytorch.__init__

    def on_device(self: Any, *args: Any, **options: Any) -> None:
        with torch.device(device):
            initialise(self, *args, **options)

    with mock.patch.object(PI05GeometryPytorch, "__init__", on_device):
        yield


def repeat_dataset(source: Path, target: Path, times: int) -> Path:
    """Write a LeRobot dataset that has the episodes of another so many times, with the same video files.

    Args:
        source: a dataset whose tables are one file each.
        target: the folder to write; its videos are links.
        times: how often.
    """
    import pandas as pd  # type: ignore[import-untyped, unused-ignore]

    shutil.copytree(source / "meta", target / "meta")
    (target / "videos").symlink_to((source / "videos").resolve())
    info = json.loads((source / "meta" / "info.json").read_text())
    episodes, frames = info["total_episodes"], info["total_frames"]
    for table_name, shifted in (
        (
            "meta/episodes/chunk-000/file-000.parquet",
            {"episode_index": episodes, "dataset_from_index": frames, "dataset_to_index": frames},
        ),
        ("data/chunk-000/file-000.parquet", {"episode_index": episodes, "index": frames}),
    ):
        original = pd.read_parquet(source / table_name)
        copies = [
            original.assign(**{name: original[name] + n * by for name, by in shifted.items()}) for n in range(times)
        ]
        (target / table_name).parent.mkdir(parents=True, exist_ok=True)
        pd.concat(copies, ignore_index=True).to_parquet(target / table_name)
    info.update(total_episodes=episodes * times, total_frames=frames * times, splits={"train": f"0:{episodes * times}"})
    (target / "meta" / "info.json").write_text(json.dumps(info))
    return target
