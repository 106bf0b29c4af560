"""Depth Anything 3 geometry, computed once, cached in Zarr, and given to Pi0.5 as prefix tokens.

The Python API is what this file names; docs/python-api.md shows it at work. Names are imported when they are used, so
that `geomcache --help` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from geomcache.cache.store import GeometryStore
    from geomcache.da3.encoder import DA3Encoder
    from geomcache.geometry import Geometry, GeometrySpec
    from geomcache.training.dataset import GeometryDataset

__all__ = ["DA3Encoder", "Geometry", "GeometryDataset", "GeometrySpec", "GeometryStore", "open"]

_MODULES = {
    "DA3Encoder": "geomcache.da3.encoder",
    "Geometry": "geomcache.geometry",
    "GeometryDataset": "geomcache.training.dataset",
    "GeometrySpec": "geomcache.geometry",
    "GeometryStore": "geomcache.cache.store",
}


def open(path: "str | Path") -> "GeometryStore":  # noqa: A001 - as in zarr.open: `geomcache.open`
    """Open a cache for reading, finished or not, by its path or an address such as ``s3://...``.

    What is elsewhere stays there: every read goes over the network, through zarr-python. `geomcache pull` is for more
    than a look.

    Raises:
        CacheNotFoundError: there is none.
        CacheFormatError: it is no cache, malformed, or a newer version's.
        CacheCorruptError: a file is damaged or missing.
        RemoteError: the place refuses, or cannot be reached.
    """
    from geomcache.sharing.remote_store import open_store

    return open_store(path)


if not TYPE_CHECKING:  # type checkers see the imports above, and report names that are not there

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
