"""Where copies of remote caches, and what is made for them, lie on this machine."""

import os
from pathlib import Path


def home() -> Path:
    """Return the folder of the copies: GEOMCACHE_HOME, otherwise one next to the Hub's own cache."""
    if given := os.environ.get("GEOMCACHE_HOME"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "geomcache"
