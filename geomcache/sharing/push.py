"""Send a sealed cache to a remote, so that nothing incomplete is ever taken for a cache.

    1. what the remote holds is examined: nothing, this cache or a part of it, another one, or something else
    2. its manifest is removed, and then every file that differs from this cache's
    3. zarr.json is sent, then metadata and shards, several at a time
    4. the journal is sent, and last the manifest: from here on the cache exists

The same command again sends what is missing or differs. Remotes tell sizes, and the Hub hashes of large files. For all
others the manifest lies there under a temporary name meanwhile: it is right about every file of the right size, because
files that it would be wrong about are removed before it is written.
"""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from geomcache.cache import durable
from geomcache.cache.create import is_cache
from geomcache.cache.header import COORDINATES, EPISODES, GROUP, Header
from geomcache.cache.inventory import CONTROL_LIMITS, Inventory, Stored, files_of
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.errors import CacheCorruptError, CacheExistsError, CacheFormatError, CacheLockedError
from geomcache.progress import TransferBar, human_bytes
from geomcache.ranges import common_ranges, count_rows
from geomcache.sharing import lease, remote_journal
from geomcache.sharing.base import Content, damaged, errors_name, file_size, in_parallel
from geomcache.sharing.card import published_header, write_card
from geomcache.sharing.limits import check_hub_limits
from geomcache.sharing.object_store import FsspecRemote
from geomcache.sharing.open import open_remote
from geomcache.sharing.remote_journal import is_unfinished

logger = logging.getLogger(__name__)

UNSEALED = MANIFEST + durable.TEMPORARY
"""On a remote: the manifest of a push that has not ended."""
CARD = "README.md"
_OF_THE_HUB = {CARD, ".gitattributes"}  # made with a repository
_CONTROL = (GROUP, JOURNAL, MANIFEST)


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What `push` did."""

    address: str
    files: int
    """Of the cache."""
    sent: int
    """How many of them were sent now."""
    nbytes_sent: int

    def lines(self) -> list[str]:
        """Return the report for the user."""
        if not self.sent:
            return [f"{self.address}: complete; all {self.files} files were there already"]
        sent = f"{self.sent} of {self.files} files sent, {human_bytes(self.nbytes_sent)}"
        return [f"{self.address}: complete; {sent}", f"download it with: geomcache pull {self.address} PATH"]


def push(
    path: str | Path,
    destination: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
    private: bool = False,
) -> PushReport:
    """Send a sealed cache. No process should write to it meanwhile.

    Args:
        path: the cache.
        destination: ``hf://datasets/owner/name``, or an address that fsspec knows.
        revision: a branch of the Hub's repository.
        overwrite: replace another cache at the destination.
        verify: read everything back before the manifest is sent, also files that were there already.
        private: make the Hub's repository a private one.

    Raises:
        CacheIncompleteError: the cache is not sealed.
        CacheCorruptError: a file of the cache, or one read back from the remote, is not the one that was written.
        CacheExistsError: something else is at the destination.
        UserInputError: the Hub would refuse the cache.
        RemoteError: the destination cannot be used.
    """
    folder = Path(path).absolute()
    inventory = Inventory.read(folder)
    remote = open_remote(destination, revision)
    if remote.on_hub:
        sizes = {name: stored.size for name, stored in inventory.files().items()}
        check_hub_limits(folder, {**sizes, **dict.fromkeys((*_CONTROL, CARD), 0)})
    remote.prepare(private=private)
    return _Push(folder, inventory, remote).run(overwrite=overwrite, verify=verify)


def _published_control(inventory: Inventory) -> dict[str, bytes]:
    """Return the control files as they are sent: without paths of this machine in the labels."""
    header, manifest = published_header(inventory.header), inventory.manifest
    if header == inventory.header:
        return inventory.control
    group = header.encode(manifest.statistics)
    files = manifest.files | {GROUP: Stored.of(group)}
    sealed = dataclasses.replace(manifest, files=files).encode(header.layout, header.fingerprint)
    return inventory.control | {GROUP: group, MANIFEST: sealed}


class _Push:
    def __init__(self, folder: Path, inventory: Inventory, remote: FsspecRemote) -> None:
        self._folder, self._inventory, self._remote = folder, inventory, remote
        self._control = _published_control(inventory)
        self._files = inventory.files() | {name: Stored.of(content) for name, content in self._control.items()}

    def run(self, *, overwrite: bool, verify: bool) -> PushReport:
        """Send what the remote lacks."""
        listing = self._remote.listing()
        if is_unfinished(listing) and not overwrite:
            raise CacheExistsError(
                f"{self._remote.address}: expected nothing, or this cache, found one that `geomcache extract` makes"
                " there: run that command again to finish it, choose another address, or replace it with --overwrite"
            )
        remote = self._remote_header(listing)
        manifests = self._manifests(listing, remote)
        stale = self._check_destination(listing, remote, None if overwrite else manifests)
        hashes = self._known_hashes(listing, remote, manifests)
        missing = {
            name: stored
            for name, stored in self._files.items()
            if name not in listing or stored != (listing[name].size, listing[name].sha256 or hashes.get(name))
        }
        address, nbytes = self._remote.address, sum(stored.size for stored in missing.values())
        if missing or stale:
            logger.info("%s: %d of %d files to send, %s", address, len(missing), len(self._files), human_bytes(nbytes))
            self._check_local_files(missing)
            self._remove(stale | (listing.keys() & missing.keys()))
            self._send(missing)
        self._check_sizes_sent()
        if verify:
            self._read_back()
        if MANIFEST in missing:
            self._seal()
        if missing or stale or UNSEALED in listing:
            self._remote.delete({UNSEALED})
        return PushReport(address=address, files=len(self._files), sent=len(missing), nbytes_sent=nbytes)

    def _remote_header(self, listing: Mapping[str, Stored]) -> Header | None:
        """Return the header of the cache at the destination, of whatever fingerprint; None where nothing is.

        Raises:
            CacheExistsError: something else is there.
        """
        others = sorted(listing.keys() - _OF_THE_HUB)
        if not others:
            return None
        address = self._remote.address
        with tempfile.TemporaryDirectory(prefix="geomcache-") as name, errors_name(address, Path(name)):
            if GROUP in listing:
                self._remote.fetch(GROUP, CONTROL_LIMITS[GROUP], Path(name))
            if not is_cache(Path(name)):
                raise CacheExistsError(
                    f"{address}: expected nothing, or a cache, found {len(others)} files without a cache's {GROUP},"
                    f" such as {others[0]}: choose another address"
                )
            return Header.read(Path(name))

    def _manifests(self, listing: Mapping[str, Stored], remote: Header | None) -> dict[bytes, Manifest]:
        """Return the remote's manifests of its fingerprint, by content: an incomplete or other one tells nothing."""
        manifests: dict[bytes, Manifest] = {}
        if remote is None:
            return manifests
        for name in {MANIFEST, UNSEALED} & listing.keys():
            content = self._read(name)
            with contextlib.suppress(CacheFormatError, CacheCorruptError):
                manifests[content] = Manifest.parse(content, Path(name), remote.layout, remote.fingerprint)
        return manifests

    def _check_destination(
        self, listing: Mapping[str, Stored], remote: Header | None, manifests: Mapping[bytes, Manifest] | None
    ) -> set[str]:
        """Refuse to write to a cache that holds what this one lacks; without manifests it may be replaced.

        Returns:
            Names of the remote's files that belong to a cache and have no place in this one.
        """
        if remote is None:
            return set()
        address, local = self._remote.address, self._inventory.header
        if manifests is not None and remote.fingerprint != local.fingerprint:
            raise CacheExistsError(
                f"{address}: expected nothing, or the cache with fingerprint {local.fingerprint}, found the one with"
                f" {remote.fingerprint} ({remote.spec.model_id} on {remote.dataset.repo_id}): choose another address,"
                " or replace it with --overwrite, which sends what differs"
            )
        for manifest in (manifests or {}).values():
            common = common_ranges(manifest.rows, self._inventory.manifest.rows)
            lost = count_rows(manifest.rows) - count_rows(common)
            if lost:
                raise CacheExistsError(
                    f"{address}: expected no frames that {self._folder} lacks, found {lost}: choose another address, or"
                    " replace what is there with --overwrite"
                )
        return {name for name in listing if _belongs(name, remote)} - self._files.keys() - {UNSEALED}

    def _known_hashes(
        self, listing: Mapping[str, Stored], remote: Header | None, manifests: Mapping[bytes, Manifest]
    ) -> dict[str, str]:
        """Return what the remote's manifests say of its files. Where there are two, they never differ."""
        hashes: dict[str, str] = {}
        if remote is None:
            return hashes
        for content, manifest in manifests.items():
            hashes |= {name: digest for name, (_, digest) in files_of(remote.layout, manifest).items()}
            if content == self._control[MANIFEST]:
                hashes |= {name: self._files[name].sha256 for name in (JOURNAL, MANIFEST)}
        if GROUP in listing:  # it is overwritten in place, before the manifest that knows it is there
            hashes[GROUP] = Stored.of(self._read(GROUP)).sha256
        return hashes

    def _check_local_files(self, missing: Mapping[str, Stored]) -> None:
        names = damaged(self._folder, {name: stored for name, stored in missing.items() if name not in self._control})
        if names:
            raise CacheCorruptError(
                f"{self._folder / min(names)}: expected the content that {MANIFEST} has a hash of, found other: see"
                f" `geomcache verify {self._folder}`"
            )

    def _remove(self, names: set[str]) -> None:
        """Remove the seal, then what differs. zarr.json stays: it says that a cache is there."""
        if MANIFEST in names:
            self._put({UNSEALED: self._read(MANIFEST)})
            self._remote.delete({MANIFEST})
        self._remote.delete(names - {GROUP, MANIFEST})

    def _send(self, missing: Mapping[str, Stored]) -> None:
        """Send everything but the manifest."""
        contents = {name: self._control.get(name, self._folder / name) for name in missing}
        first: dict[str, Content] = {name: contents[name] for name in missing if name == GROUP}
        if self._remote.on_hub:
            header = published_header(self._inventory.header)
            first[CARD] = write_card(self._folder, self._remote.address, header).encode()
        self._put(first)
        self._put({UNSEALED: self._control[MANIFEST]})
        self._put({name: content for name, content in contents.items() if name not in _CONTROL})
        self._put({name: content for name, content in contents.items() if name == JOURNAL})

    def _check_sizes_sent(self) -> None:
        sizes = {name: stored.size for name, stored in self._remote.listing().items()}
        for name, stored in self._files.items():
            if name != MANIFEST and sizes.get(name) != stored.size:
                raise CacheCorruptError(
                    f"{self._remote.address}/{name}: expected {stored.size} bytes, found {sizes.get(name, 'none')}"
                    " after it was sent: run the same command again"
                )

    def _read_back(self) -> None:
        files = {name: stored for name, stored in self._files.items() if name != MANIFEST}
        with (
            tempfile.TemporaryDirectory(prefix="geomcache-") as folder,
            TransferBar("read back", sum(stored.size for stored in files.values())) as bar,
        ):

            def check(name: str) -> None:
                copy, stored = Path(folder, name), files[name]
                self._remote.fetch(name, stored.size, Path(folder))
                found = Stored.of_file(copy)
                if found != stored:
                    self._remote.delete({name})  # so that the same command sends it again
                    raise CacheCorruptError(
                        f"{self._remote.address}/{name}: expected {stored}, found {found or 'none'}: removed; run the"
                        " same command again"
                    )
                copy.unlink()
                bar(stored.size)

            in_parallel(check, files)

    def _seal(self) -> None:
        if (self._folder / MANIFEST).read_bytes() != self._inventory.control[MANIFEST]:
            raise CacheLockedError(
                f"{self._folder}: expected a cache that no process writes to, found that its manifest has changed"
                " meanwhile: run the same command again"
            )
        self._put({MANIFEST: self._control[MANIFEST]})

    def _put(self, contents: Mapping[str, Content]) -> None:
        with TransferBar("push", sum(file_size(content) or 0 for content in contents.values())) as bar:
            self._remote.put(contents, bar)

    def _read(self, name: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="geomcache-") as folder:
            self._remote.fetch(name, CONTROL_LIMITS.get(name, CONTROL_LIMITS[MANIFEST]), Path(folder))
            return Path(folder, name).read_bytes()


def _belongs(name: str, header: Header) -> bool:
    """Return whether a file is a part of the cache with this header, which other readers would take for data."""
    folders = {*header.spec.camera_keys, *COORDINATES, EPISODES, *(table.key for table in header.layout.tables)}
    folders |= {lease.FOLDER, remote_journal.FOLDER}
    return name in (*_CONTROL, UNSEALED) or name.partition("/")[0] in folders
