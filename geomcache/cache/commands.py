"""The `geomcache extract` that made a cache: its options and machines next to it, and the command in messages."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from geomcache.geometry import DatasetSpec, GeometrySpec
from geomcache.ranges import format_ranges

if TYPE_CHECKING:
    from geomcache.cache.store import GeometryStore


_ENCODED_ON = re.compile(r"# encoded on: (?P<device>.+) \((?P<engine>eager|compiled)\)")


class Machine(NamedTuple):
    """What encoded frames of a cache. Not part of the cache: a comment line in the options of its run, next to it."""

    device: str
    """A GPU's name, or ``CPU``."""
    engine: str

    @property
    def line(self) -> str:
        """Return the comment line."""
        return f"# encoded on: {self.device} ({self.engine})\n"


def run_config_path(cache: Path) -> Path:
    """Return where the options of a cache's last run are: ``libero.zarr`` -> ``libero.run.yaml``, next to it."""
    return cache.with_name(cache.name.removesuffix(".zarr") + ".run.yaml")


def recorded_machines(cache: Path) -> tuple[Machine, ...]:
    """Return what encoded a cache, as far as that is recorded: a pulled or moved cache has no such record."""
    try:
        text = run_config_path(cache).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ()
    found = [match for line in text.splitlines() if (match := _ENCODED_ON.fullmatch(line))]
    return tuple(dict.fromkeys(Machine(match["device"], match["engine"]) for match in found))


def extract_settings(spec: GeometrySpec, dataset: DatasetSpec, codec: str) -> dict[str, object]:
    """Return the options of `geomcache extract` that make a cache of this kind, by their names in `ExtractOptions`.

    `extract` records them next to a cache, and `extract_command` prints them.
    """
    return {
        "model": spec.model_id,
        "model_revision": spec.model_revision,
        "dataset": dataset.repo_id,
        "revision": dataset.revision,
        "cameras": spec.camera_keys,
        "views": spec.views,
        "process_res": spec.process_res,
        "grid": spec.grid,
        "outputs": spec.outputs,
        "feature_dim": None if spec.feature is None else spec.feature.dim,
        "codec": codec,
        "dtype": spec.compute_dtype,
    }


def extract_command(store: "GeometryStore", episodes: NDArray[np.int64], root: str | None = None) -> str:
    """Return the command that puts these episodes (sorted, at least one) into a cache."""
    options = extract_settings(store.spec, store.dataset, store.codec)
    options |= {"output": store.path, "root": root}
    if store.codec == "raw":
        del options["codec"]
    if len(episodes) < store.dataset.episodes:
        ranges = format_ranges(episodes)
        # Many small gaps would make a command that nobody can read, and extraction skips what the cache has.
        options["episodes"] = ranges if len(ranges) <= 80 else f"{episodes[0]}:{episodes[-1] + 1}"
    words = ["geomcache", "extract"]
    for name, value in options.items():
        if value is not None:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def update_command(cache: Path, repo_id: str, root: Path | str | None = None) -> str:
    """Return the command that lets a cache follow a dataset that has changed."""
    words = ["geomcache", "update", str(cache), "--dataset", repo_id]
    return shlex.join([*words, "--root", str(root)] if root is not None else words)
