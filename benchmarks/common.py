"""What every benchmark shares: the machine's name for a table, and the table."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
MINI = ROOT.parent / "shared" / "libero_object_mini"
DEMO = ROOT / "examples" / "libero_object_demo"


def real_dataset() -> Path:
    """The largest real dataset at hand."""
    return MINI if MINI.is_dir() else DEMO


def machine() -> str:
    """Device, date and versions, in one line."""
    cores = len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu_name()}, {cores} cores"
    packages = ("torch", "depth-anything-3", "lerobot", "zarr")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{device}; {datetime.now(UTC):%Y-%m-%d}; Python {platform.python_version()}, {versions}"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(title: str, method: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table as Markdown, with its method and machine above it."""
    print(f"### {title}\n\n{method}\n\n{machine()}\n")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print()
