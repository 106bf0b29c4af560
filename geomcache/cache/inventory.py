"""What a sealed cache consists of, file by file: what is pushed, and what a pulled one is compared with.

    zarr.json, journal.jsonl, manifest.json     control files: they say what the cache is, and bear the hashes
    metadata, coordinates, episode table        named in the manifest, with bytes and sha256
    shards                                      named by the layout; the manifest has bytes and sha256
    lock                                        empty, for writers on this machine: no part of what travels

The control files of a cache elsewhere are read from a copy of them in a folder here, before anything else is fetched.
"""

import contextlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Self

from geomcache.cache.header import GROUP, Header
from geomcache.cache.journal import Journal
from geomcache.cache.layout import Layout
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.errors import CacheCorruptError, CacheError, CacheIncompleteError
from geomcache.ranges import Ranges, clip_ranges, merge_ranges

CONTROL_LIMITS = {GROUP: 16 << 20, MANIFEST: 256 << 20, JOURNAL: 1 << 30}
"""Bytes that a control file from elsewhere may have: a million shards fit."""


class Stored(NamedTuple):
    """Content of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """A sealed cache."""

    header: Header
    manifest: Manifest
    journal: Journal
    control: dict[str, bytes]
    """Content of the control files."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From a folder that has the control files, and compare them with each other.

        Raises:
            CacheNotFoundError: nothing is there.
            CacheIncompleteError: the cache is not sealed.
            CacheFormatError, CacheCorruptError: it is malformed, or the control files contradict each other.
        """
        header = Header.read(folder)
        if not (folder / MANIFEST).exists():
            raise CacheIncompleteError(
                f"{folder}: expected a sealed cache, found no {MANIFEST}: finish it with the `geomcache extract`"
                " command that made it"
            )
        control = {name: (folder / name).read_bytes() for name in (GROUP, MANIFEST)}
        manifest = Manifest.parse(control[MANIFEST], folder / MANIFEST, header.layout, header.fingerprint)
        journal = Journal(folder / JOURNAL, header.layout, header.fingerprint)
        journal.read()
        control[JOURNAL] = (folder / JOURNAL).read_bytes()
        # The attributes of a hostile cache may promise any number of chunks: what is named bounds what is looked for.
        names = itertools.chain([GROUP], header.metadata(), header.chunks())
        checks = {
            f"{MANIFEST}: expected the files of such a cache": manifest.files.keys()
            == {*itertools.islice(names, len(manifest.files) + 1)},
            f"{GROUP}: expected the content that {MANIFEST} has a hash of": manifest.files.get(GROUP)
            == _stored(control[GROUP]),
            f"{JOURNAL}: expected the shards, hashes and files of {MANIFEST}": not journal.torn
            and (journal.rows, journal.shards) == (manifest.rows, manifest.shards)
            and journal.files == {name: stored for name, stored in manifest.files.items() if name != GROUP},
        }
        for expected, holds in checks.items():
            if not holds:
                raise CacheCorruptError(f"{folder}/{expected}, found other: files of two caches were mixed, or damaged")
        return cls(header=header, manifest=manifest, journal=journal, control=control)

    def files(self, shards: Collection[int] | None = None) -> dict[str, Stored]:
        """All files but the control files, by name; of these shards, or of all."""
        return files_of(self.header.layout, self.manifest, shards)

    def rows_of(self, shard: int) -> Ranges:
        """The rows that a shard holds."""
        return clip_ranges(self.manifest.rows, *self.header.layout.shard_rows(shard))

    def rows(self, shards: Collection[int]) -> Ranges:
        """The rows that shards hold together."""
        return merge_ranges(part for shard in shards for part in self.rows_of(shard))


def files_of(layout: Layout, manifest: Manifest, shards: Collection[int] | None = None) -> dict[str, Stored]:
    """What a manifest says of files, by name, but for the control files; of these shards, or of all."""
    found = {name: Stored(*stored) for name, stored in manifest.files.items() if name != GROUP}
    for shard, written in manifest.shards.items():
        if shards is None or shard in shards:
            files = zip(layout.files(shard), written.sizes, written.digests, strict=True)
            found |= {name: Stored(size, digest.hex()) for name, size, digest in files}
    return found


@contextlib.contextmanager
def named_as(folder: Path, address: str) -> Iterator[None]:
    """Let the messages of errors about the copy in a folder name the address that the copy was made from."""
    try:
        yield
    except CacheError as error:
        error.args = (str(error).replace(str(folder), address),)
        raise


def _stored(content: bytes) -> tuple[int, str]:
    return len(content), sha256(content).hexdigest()
