"""The geomcache commands that error messages suggest."""

import shlex
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geomcache.geometry import DatasetSpec, GeometrySpec
from geomcache.ranges import format_ranges

if TYPE_CHECKING:
    from geomcache.cache.store import GeometryStore


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
        # Many small gaps would make an unreadable command; rows that exist already are not made again.
        options["episodes"] = ranges if len(ranges) <= 80 else f"{episodes[0]}:{episodes[-1] + 1}"
    words = ["geomcache", "extract"]
    for name, value in options.items():
        if value is not None:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)
