"""Where copies of remote caches, and what is made for them, lie on this machine, and who speaks of them."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path


def home() -> Path:
    """Return the folder of the copies: GEOMCACHE_HOME, otherwise one next to the Hub's own cache."""
    if given := os.environ.get("GEOMCACHE_HOME"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "geomcache"


@contextlib.contextmanager
def one_rank_logs() -> Iterator[None]:
    """Of many processes that use the same cache, let the first tell the user."""
    package = logging.getLogger("geomcache")
    level = package.level
    if os.environ.get("RANK", "0") != "0":
        package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)
