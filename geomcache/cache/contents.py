"""The small files of a cache: their hashes, and the episode table."""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.header import EPISODES, GROUP, Header
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
    small = [*header.metadata(), *(f"{name}/c.0" for name in header.episode_table)]
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


class EpisodeTable(NamedTuple):
    """What a cache records of the dataset's episodes."""

    start: NDArray[np.int64]
    """Row of each episode's first frame, [E]."""
    length: NDArray[np.int64]
    """Frames of each episode, [E]."""
    identity: NDArray[np.uint64] | None
    """What tells each episode from others, [E]; 0 where the dataset does not say. None in schema version 1."""


def read_episodes(folder: Path, header: Header) -> EpisodeTable:
    """Return the episode table. Check the files' hashes first.

    Raises:
        CacheCorruptError: it is not the dataset's.
    """
    arrays = []
    for name in header.episode_table:
        path = folder / name / "c.0"
        content = without_crc(path.read_bytes())
        if content is None or len(content) != 8 * header.dataset.episodes:
            raise CacheCorruptError(f"{path}: expected {header.dataset.episodes} episodes, found other content")
        arrays.append(np.frombuffer(content, "<i8"))
    start, length, *rest = arrays
    identity = rest[0].view("<u8") if rest else None
    if identity is not None and sha256(identity.tobytes()).hexdigest() != header.dataset.identities_sha256:
        raise CacheCorruptError(
            f"{folder / EPISODES}: expected identities with sha256 {header.dataset.identities_sha256}, found others:"
            " restore the folder from a copy"
        )
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
    return EpisodeTable(start, length, identity)
