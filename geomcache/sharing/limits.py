"""What a remote is believed: the one place that bounds the names, sizes and counts of a cache that others made.

Control files have limits of their own. All other names and sizes follow from the header in ``zarr.json``: metadata and
coordinates are checked here, shards when the manifest is parsed (`Layout.size_bounds`). Nothing else is asked for.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.header import COORDINATE_CHUNK, GROUP, Header
from geomcache.cache.inventory import CONTROL_LIMITS, Inventory, damaged_files, read_episodes
from geomcache.cache.journal import Journal
from geomcache.cache.layout import CRC_NBYTES, HUB_FOLDER_ENTRIES
from geomcache.cache.manifest import JOURNAL, MANIFEST
from geomcache.cache.records import Files
from geomcache.errors import CacheCorruptError, CacheIncompleteError, CacheNotFoundError, RemoteError, UserInputError
from geomcache.progress import human_bytes
from geomcache.sharing.base import errors_name, in_parallel
from geomcache.sharing.object_store import FsspecRemote
from geomcache.sharing.remote_journal import fetch_journal, is_begun, is_unfinished

logger = logging.getLogger(__name__)

MAX_METADATA_NBYTES = 16 << 20
MAX_TABLE_NBYTES = 256 << 20  # 32 million episodes
HUB_FILE_NBYTES = 500 * 10**9  # of one file; its documentation recommends less than 200 GB
HUB_FILES = 100_000  # in a repository: what its documentation recommends, not a limit
_INT64_NBYTES, _FLOAT32_NBYTES = 8, 4


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
            raise _unfinished(remote)
        remote.fetch(JOURNAL, CONTROL_LIMITS[JOURNAL], folder)  # the inventory names a missing one
        inventory = Inventory.read(folder)
        files = inventory.manifest.files
        _check_sizes(inventory.header, files, folder / MANIFEST)
        table = inventory.header.small_chunks
        for name in [*table, *(inventory.header.metadata() if metadata else ())]:
            remote.fetch(name, files[name][0], folder)  # the check of the hashes names a missing one
        for _, error in damaged_files(folder, table, files):
            raise error
        return inventory, read_episodes(folder, inventory.header).length


def _unfinished(remote: FsspecRemote) -> CacheIncompleteError:
    with contextlib.suppress(RemoteError):  # a web server, which lists nothing: no driver writes there
        if is_unfinished(remote.listing()):
            return CacheIncompleteError(
                f"{remote.address}: expected a sealed cache, found one that is being made: run the `geomcache extract`"
                " command that makes it again to finish it"
            )
    return CacheIncompleteError(
        f"{remote.address}: expected a sealed cache, found no {MANIFEST}: it was not pushed to its end; run that"
        " `geomcache push` command again"
    )


def fetch_state(remote: FsspecRemote, folder: Path) -> None:
    """Download the few files that describe a cache, sealed or not, to an empty folder: with them it opens there.

    Raises:
        CacheNotFoundError, CacheIncompleteError, CacheFormatError, CacheCorruptError: there is no cache, neither a
            sealed one nor one that `extract` makes.
        RemoteError: the remote refuses, or the connection fails.
    """
    try:
        fetch_description(remote, folder, metadata=True)
    except CacheIncompleteError:
        names = {*remote.listing()}
        if not (is_unfinished(names) and is_begun(names)):
            raise
        _fetch_unfinished(remote, names, folder)


def _fetch_unfinished(remote: FsspecRemote, names: Collection[str], folder: Path) -> None:
    """Download the same of a cache that `extract` makes: it opens by its journal."""
    with errors_name(remote.address, folder):
        header = Header.read(folder)
        fetch_journal(remote, names, folder)
        journal = Journal(folder / JOURNAL, header.layout, header.fingerprint)
        journal.read()
        _check_sizes(header, journal.files, folder / JOURNAL)
        small = [*header.metadata(), *(f"{name}/c.0" for name in header.episode_table)]
        in_parallel(lambda name: remote.fetch(name, journal.files[name][0], folder), small)


def _check_sizes(header: Header, files: Files, manifest: Path) -> None:
    """Compare the sizes that a manifest gives with what the header allows.

    Raises:
        CacheCorruptError: a size cannot be that of such a file.
    """
    table_nbytes = header.dataset.episodes * _INT64_NBYTES + CRC_NBYTES
    chunk_nbytes = min(header.dataset.frames, COORDINATE_CHUNK) * _INT64_NBYTES
    bounds = dict.fromkeys(header.metadata(), (1, MAX_METADATA_NBYTES))
    bounds |= {f"{name}/c.0": (table_nbytes, min(table_nbytes, MAX_TABLE_NBYTES)) for name in header.episode_table}
    if (feature := header.spec.feature) is not None:
        basis_nbytes = feature.width * feature.dim * _FLOAT32_NBYTES + CRC_NBYTES
        bounds[header.small_chunks[-1]] = basis_nbytes, basis_nbytes
    for name, (size, _) in files.items():
        # what is neither is a chunk of the coordinates; zstd makes incompressible data longer by a hundredth at most
        low, high = bounds.get(name, (1, chunk_nbytes + chunk_nbytes // 100 + 1024))
        if name != GROUP and not low <= size <= high:
            expected = f"{low}" if low == high else f"{low} to {high}"
            raise CacheCorruptError(
                f"{manifest}: {name}: expected {expected} bytes, found {size}: something else than geomcache wrote it;"
                " push the cache again"
            )


def check_hub_limits(path: Path, files: Mapping[str, int]) -> None:
    """Refuse a cache that the Hub would refuse, before anything is sent.

    Its limits are those of https://huggingface.co/docs/hub/storage-limits: entries of a folder and bytes of a file.
    More files than it recommends for a repository are said.

    Args:
        path: of the cache.
        files: bytes of each file, by name.

    Raises:
        UserInputError: a folder has more entries, or a file more bytes, than the Hub takes.
    """
    largest = max(files, key=files.__getitem__)
    if files[largest] > HUB_FILE_NBYTES:
        raise UserInputError(
            f"{path / largest}: expected at most {human_bytes(HUB_FILE_NBYTES)} in one file, as the Hub takes, found"
            f" {human_bytes(files[largest])}: push the cache to an object store, such as s3://bucket/name.zarr"
        )
    if len(files) > HUB_FILES:
        logger.warning("%s: %d files; the Hub recommends less than %d in a repository", path, len(files), HUB_FILES)
    counts, counted = Counter[str](), set[str]()
    for name in files:
        entry = name
        while entry and entry not in counted:  # a file, and then the folders above it
            counted.add(entry)
            entry = entry.rpartition("/")[0]
            counts[entry] += 1
    folder, entries = counts.most_common(1)[0]
    if entries > HUB_FOLDER_ENTRIES:
        raise UserInputError(
            f"{path / folder}: expected at most {HUB_FOLDER_ENTRIES} files in one folder, as the Hub takes, found"
            f" {entries}: push the cache to an object store, such as s3://bucket/name.zarr"
        )
