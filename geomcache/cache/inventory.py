"""List the files of a sealed cache, with size and hash: what push sends, and what pull compares.

    zarr.json, journal.jsonl, manifest.json     control files: they describe the cache, and have the other files' hashes
    metadata, coordinates, episode table        named in the manifest, with bytes and sha256
    shards                                      named by the layout; the manifest has bytes and sha256
    lock                                        empty, for writers on this machine: it is never transferred

The control files of a remote cache are downloaded to a folder first; the inventory is read from that copy.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Self

from geomcache.cache.header import GROUP, Header
from geomcache.cache.journal import Journal
from geomcache.cache.layout import Layout
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
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
    # The attributes of a hostile cache may promise any number of chunks: look at no more names than are recorded.
    names = itertools.islice(itertools.chain([GROUP], header.metadata(), header.chunks()), len(manifest.files) + 1)
    if manifest.files.keys() != {*names}:
        raise _contradiction(f"{folder / MANIFEST}: expected the files of a cache with these attributes")
    if manifest.files[GROUP] != (len(group), sha256(group).hexdigest()):
        raise _contradiction(f"{folder / GROUP}: expected the content that {MANIFEST} has a hash of")
    if journal.incomplete_nbytes:
        raise _contradiction(f"{journal.path}: expected complete lines, as the cache is sealed")
    if (journal.rows, journal.shards) != (manifest.rows, manifest.shards):
        raise _contradiction(f"{journal.path}: expected the shards and hashes of {MANIFEST}")
    if {**journal.files, GROUP: manifest.files[GROUP]} != manifest.files:
        raise _contradiction(f"{journal.path}: expected the files of {MANIFEST}")


def _contradiction(expected: str) -> CacheCorruptError:
    return CacheCorruptError(f"{expected}, found others: files of two caches were mixed, or one is damaged")
