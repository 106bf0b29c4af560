"""The geomcache commands that error messages suggest."""

import shlex
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geomcache.ranges import format_ranges

if TYPE_CHECKING:
    from geomcache.cache.store import GeometryStore


def extract_command(store: "GeometryStore", episodes: NDArray[np.int64], root: str | None = None) -> str:
    """Return the command that adds episodes to a cache.

    Args:
        store: the cache.
        episodes: ascending numbers, int64 [n], at least one.
        root: folder of a local dataset.
    """
    spec, dataset = store.spec, store.dataset
    options = {
        "model": spec.model_id,
        "model-revision": spec.model_revision,
        "dataset": dataset.repo_id,
        "root": root,
        "revision": dataset.revision,
        "output": store.path,
        "cameras": ",".join(spec.camera_keys),
        "views": spec.views,
        "process-res": spec.process_res,
        "grid": spec.grid,
        "outputs": ",".join(spec.outputs),
        "dtype": spec.compute_dtype,
        "codec": store.codec if store.codec != "raw" else None,
    }
    if len(episodes) < dataset.episodes:
        ranges = format_ranges(episodes)
        # Many small gaps would make a command that nobody can read, and extraction skips what the cache has.
        options["episodes"] = ranges if len(ranges) <= 80 else f"{episodes[0]}:{episodes[-1] + 1}"
    given = [(name, str(value)) for name, value in options.items() if value is not None]
    return shlex.join(["geomcache", "extract", *(part for name, value in given for part in (f"--{name}", value))])
