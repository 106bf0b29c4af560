"""What a remote is believed: the one place that bounds the names, sizes and counts of a cache that others made.

Control files have limits of their own. All other names and sizes follow from the header in ``zarr.json``: metadata and
coordinates are checked here, shards when the manifest is parsed (`Layout.size_bounds`). Nothing else is asked for.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.header import COORDINATE_CHUNK, GROUP, Header
from geomcache.cache.inventory import CONTROL_LIMITS, Inventory, damaged_files, read_episodes
from geomcache.cache.layout import CRC_NBYTES
from geomcache.cache.manifest import JOURNAL, MANIFEST
from geomcache.cache.records import Files
from geomcache.errors import CacheCorruptError, CacheIncompleteError, CacheNotFoundError, UserInputError
from geomcache.sharing.base import errors_name
from geomcache.sharing.object_store import FsspecRemote

MAX_METADATA_NBYTES = 16 << 20
MAX_TABLE_NBYTES = 256 << 20  # 32 million episodes
HUB_FOLDER_ENTRIES = 10_000  # the Hub refuses a commit with more in one folder
_INT64_NBYTES = 8


def fetch_description(
    remote: FsspecRemote, folder: Path, *, metadata: bool = False
) -> tuple[Inventory, NDArray[np.int64]]:
    """Download the few files that describe a sealed cache, check them, and compare them with each other.

    They come to `folder`, which is empty; with `metadata` also those of the arrays, not yet compared with their hashes.

    Returns:
        The inventory, and the length of every episode, int64 [E].

    Raises:
        CacheNotFoundError, CacheIncompleteError, CacheFormatError, CacheCorruptError: there is no sealed cache.
        RemoteError: the remote refuses, or the connection fails.
    """
    with errors_name(remote.address, folder):
        if not remote.fetch(GROUP, CONTROL_LIMITS[GROUP], folder):
            raise CacheNotFoundError(f"{remote.address}: expected a cache, found no {GROUP}: check the address")
        if not remote.fetch(MANIFEST, CONTROL_LIMITS[MANIFEST], folder):
            raise CacheIncompleteError(
                f"{remote.address}: expected a sealed cache, found no {MANIFEST}: it was not pushed to its end; run"
                " that `geomcache push` command again"
            )
        remote.fetch(JOURNAL, CONTROL_LIMITS[JOURNAL], folder)  # the inventory names a missing one
        inventory = Inventory.read(folder)
        files = inventory.manifest.files
        _check_sizes(inventory.header, files, folder / MANIFEST)
        table = [f"{name}/c.0" for name in inventory.header.episode_table]
        for name in [*table, *(inventory.header.metadata() if metadata else ())]:
            remote.fetch(name, files[name][0], folder)  # the check of the hashes names a missing one
        for _, error in damaged_files(folder, table, files):
            raise error
        return inventory, read_episodes(folder, inventory.header).length


def _check_sizes(header: Header, files: Files, manifest: Path) -> None:
    """Compare the sizes that a manifest gives with what the header allows.

    Raises:
        CacheCorruptError: a size cannot be that of such a file.
    """
    table_nbytes = header.dataset.episodes * _INT64_NBYTES + CRC_NBYTES
    chunk_nbytes = min(header.dataset.frames, COORDINATE_CHUNK) * _INT64_NBYTES
    bounds = dict.fromkeys(header.metadata(), (1, MAX_METADATA_NBYTES))
    bounds |= {f"{name}/c.0": (table_nbytes, min(table_nbytes, MAX_TABLE_NBYTES)) for name in header.episode_table}
    for name, (size, _) in files.items():
        # what is neither is a chunk of the coordinates; zstd makes incompressible data longer by a hundredth at most
        low, high = bounds.get(name, (1, chunk_nbytes + chunk_nbytes // 100 + 1024))
        if name != GROUP and not low <= size <= high:
            expected = f"{low}" if low == high else f"{low} to {high}"
            raise CacheCorruptError(
                f"{manifest}: {name}: expected {expected} bytes, found {size}: something else than geomcache wrote it;"
                " push the cache again"
            )


def check_hub_folders(path: Path, names: Iterable[str]) -> None:
    """Refuse a cache that the Hub would refuse, before anything is sent.

    Raises:
        UserInputError: a folder has more entries than the Hub takes.
    """
    paths = {path for name in names for path in (PurePosixPath(name), *PurePosixPath(name).parents[:-1])}
    folder, entries = Counter(str(path.parent) for path in paths).most_common(1)[0]
    if entries > HUB_FOLDER_ENTRIES:
        raise UserInputError(
            f"{path / folder}: expected at most {HUB_FOLDER_ENTRIES} files in one folder, as the Hub takes, found"
            f" {entries}: push the cache to an object store, such as s3://bucket/name.zarr"
        )
