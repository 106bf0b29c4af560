"""The files of a cache with their sizes and hashes: what readers check first, push sends, and pull compares.

    zarr.json, journal.jsonl, manifest.json     control files: they describe the cache, and have the other files' hashes
    metadata, coordinates, tables, basis        named in the manifest, with bytes and sha256
    shards                                      named by the layout; the manifest has bytes and sha256
    lock                                        empty, for writers on this machine: it is never transferred

The control files of a remote cache are downloaded to a folder first; the inventory is read from that copy. Metadata and
episode table are small: everybody who opens a cache compares them with their hashes.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.header import EPISODES, FEATURE_BASIS, GROUP, Header
from geomcache.cache.journal import Journal
from geomcache.cache.layout import Layout, without_crc
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.cache.records import Files
from geomcache.errors import CacheCorruptError, CacheIncompleteError
from geomcache.ranges import Ranges, clip_ranges, merge_ranges

CONTROL_LIMITS = {GROUP: 16 << 20, MANIFEST: 256 << 20, JOURNAL: 1 << 30}
"""Largest size of each control file of a remote cache, in bytes: enough for a million shards."""


class Stored(NamedTuple):
    """Size and hash of a file's content."""

    size: int
    """In bytes."""
    sha256: str
    """Hexadecimal."""

    @classmethod
    def of(cls, content: bytes) -> Self:
        """Return size and hash of a content."""
        return cls(len(content), sha256(content).hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> Self | None:
        """Return size and hash of a file's content; None where there is no file."""
        try:
            with path.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
                return cls(file.tell(), digest)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def __str__(self) -> str:
        return f"{self.size} bytes with sha256 {self.sha256}"


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The files of a sealed cache."""

    header: Header
    manifest: Manifest
    journal: Journal
    control: dict[str, bytes]
    """Content of the control files, by name."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the control files in a folder, and compare them with each other.

        Raises:
            CacheNotFoundError: the folder does not exist.
            CacheIncompleteError: the cache is not sealed.
            CacheFormatError, CacheCorruptError: a control file is malformed or damaged, or they contradict each other.
        """
        header = Header.read(folder)
        if not (folder / MANIFEST).exists():
            raise CacheIncompleteError(
                f"{folder}: expected a sealed cache, found no {MANIFEST}: run the `geomcache extract` command that made"
                " the cache again to resume"
            )
        control = {name: (folder / name).read_bytes() for name in (GROUP, MANIFEST)}
        manifest = Manifest.parse(control[MANIFEST], folder / MANIFEST, header.layout, header.fingerprint)
        journal = Journal(folder / JOURNAL, header.layout, header.fingerprint)
        journal.read()
        control[JOURNAL] = (folder / JOURNAL).read_bytes()
        _compare(folder, header, manifest, journal, control[GROUP])
        return cls(header=header, manifest=manifest, journal=journal, control=control)

    def files(self, shards: Collection[int] | None = None) -> dict[str, Stored]:
        """Return all files but the control files, by name; of the given shards, or of all."""
        return files_of(self.header.layout, self.manifest, shards)

    def rows_of(self, shard: int) -> Ranges:
        """Return the rows that a shard has."""
        return clip_ranges(self.manifest.rows, *self.header.layout.shard_rows(shard))

    def rows(self, shards: Collection[int]) -> Ranges:
        """Return the rows that the given shards have together."""
        return merge_ranges(part for shard in shards for part in self.rows_of(shard))


def files_of(layout: Layout, manifest: Manifest, shards: Collection[int] | None = None) -> dict[str, Stored]:
    """Return what a manifest records of all files but the control files, by name; of the given shards, or of all."""
    stored = {name: Stored(*entry) for name, entry in manifest.files.items() if name != GROUP}
    for shard, written in manifest.shards.items():
        if shards is None or shard in shards:
            entries = zip(layout.files(shard), written.sizes, written.digests, strict=True)
            stored |= {name: Stored(size, digest.hex()) for name, size, digest in entries}
    return stored


def _compare(folder: Path, header: Header, manifest: Manifest, journal: Journal, group: bytes) -> None:
    """Compare the control files with each other.

    Raises:
        CacheCorruptError: one contradicts another.
    """
    if manifest.files.keys() != {*small_files(header, manifest)}:
        raise _contradiction(f"{folder / MANIFEST}: expected the files of a cache with these attributes")
    if manifest.files[GROUP] != Stored.of(group):
        raise _contradiction(f"{folder / GROUP}: expected the content that {MANIFEST} has a hash of")
    if journal.incomplete_nbytes:
        raise _contradiction(f"{journal.path}: expected complete lines, as the cache is sealed")
    if (journal.rows, journal.shards) != (manifest.rows, manifest.shards):
        raise _contradiction(f"{journal.path}: expected the shards and hashes of {MANIFEST}")
    if {**journal.files, GROUP: manifest.files[GROUP]} != manifest.files:
        raise _contradiction(f"{journal.path}: expected the files of {MANIFEST}")


def _contradiction(expected: str) -> CacheCorruptError:
    return CacheCorruptError(f"{expected}, found others: files of two caches were mixed, or one is damaged")


def small_files(header: Header, contents: Manifest | Journal) -> Iterator[str]:
    """Yield the names of metadata, coordinates and episode table that a cache with these attributes has.

    The attributes of a hostile cache may promise any number of them: only one more is named than are recorded.
    """
    group = [GROUP] if isinstance(contents, Manifest) else []
    names = itertools.chain(group, header.metadata(), header.chunks())
    return itertools.islice(names, len(contents.files) + 1)


def check_files(folder: Path, header: Header, contents: Manifest | Journal) -> None:
    """Compare metadata, episode table and basis with their hashes. `verify` also compares the large coordinates.

    Raises:
        CacheCorruptError: a file is missing or differs.
    """
    small = [*header.metadata(), *header.small_chunks]
    if isinstance(contents, Manifest):
        small.append(GROUP)
    for _, error in damaged_files(folder, small, contents.files):
        raise error


def damaged_files(folder: Path, names: Iterable[str], files: Files) -> Iterator[tuple[str, CacheCorruptError]]:
    """Compare files with their bytes and sha256; yield the name of each that is missing or differs, with its error."""
    for name in names:
        expected, actual = Stored(*files[name]) if name in files else None, Stored.of_file(folder / name)
        if actual is None or actual != expected:
            wanted = "the file" if actual is None else expected or "no such file"
            message = f"{folder / name}: expected {wanted}, found {actual or 'none'}: restore the file from a copy"
            yield name, CacheCorruptError(message)


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


def read_feature_basis(folder: Path, header: Header) -> NDArray[np.float32] | None:
    """Return the basis of a cache's features, float32 [width, D]; None without features. Check the file's hash first.

    Raises:
        CacheCorruptError: it is not the spec's.
    """
    feature = header.spec.feature
    if feature is None:
        return None
    path = folder / FEATURE_BASIS / "c.0.0"
    content = without_crc(path.read_bytes()) or b""
    digest = sha256(content).hexdigest()
    if len(content) != 4 * feature.width * feature.dim or digest != feature.basis_sha256:
        raise CacheCorruptError(
            f"{path}: expected the basis with sha256 {feature.basis_sha256}, found {digest}: restore the file from a"
            " copy"
        )
    return np.frombuffer(content, "<f4").reshape(feature.width, feature.dim)
