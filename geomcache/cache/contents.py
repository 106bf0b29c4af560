"""The small files of a cache: their hashes, and the episode table."""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.header import EPISODE_TABLE, GROUP, Header
from geomcache.cache.journal import Journal
from geomcache.cache.layout import without_crc
from geomcache.cache.manifest import Manifest
from geomcache.cache.records import Files
from geomcache.errors import CacheCorruptError


def check_files(folder: Path, header: Header, contents: Manifest | Journal) -> None:
    """Compare metadata and episode table with their hashes. `verify` does so for the large coordinates.

    Raises:
        CacheCorruptError: a file is missing or differs.
    """
    small = [*header.metadata(), *(f"{name}/c.0" for name in EPISODE_TABLE)]
    if isinstance(contents, Manifest):
        small.append(GROUP)
    for _, error in damaged_files(folder, small, contents.files):
        raise error


def damaged_files(folder: Path, names: Iterable[str], files: Files) -> Iterator[tuple[str, CacheCorruptError]]:
    """Compare files with their bytes and sha256; yield the name of each that is missing or differs, with its error."""
    for name in names:
        path = folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            yield name, CacheCorruptError(f"{path}: expected the file, found none: restore it from a copy")
            continue
        expected, actual = files.get(name), (len(content), sha256(content).hexdigest())
        if actual != expected:
            yield (
                name,
                CacheCorruptError(
                    f"{path}: expected {expected or 'no such file'} (bytes, sha256), found {actual}: the file was"
                    " changed; restore it from a copy"
                ),
            )


def read_episodes(folder: Path, header: Header) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return start and length of every episode, int64 [E] each. Check the files' hashes first.

    Raises:
        CacheCorruptError: they are not the dataset's.
    """
    arrays = []
    for name in EPISODE_TABLE:
        path = folder / name / "c.0"
        content = without_crc(path.read_bytes())
        if content is None or len(content) != 8 * header.dataset.episodes:
            raise CacheCorruptError(f"{path}: expected {header.dataset.episodes} episodes, found other content")
        arrays.append(np.frombuffer(content, "<i8"))
    start, length = arrays
    if (
        sha256(length.tobytes()).hexdigest() != header.dataset.episodes_sha256
        or ((length < 1) | (length > header.dataset.frames)).any()
        or not np.array_equal(start, np.cumsum(length) - length)
        or int(length.sum()) != header.dataset.frames
    ):
        raise CacheCorruptError(
            f"{folder / 'episodes'}: expected {header.dataset.frames} frames in episodes of the lengths with sha256"
            f" {header.dataset.episodes_sha256}, found others: restore the folder from a copy"
        )
    return start, length
