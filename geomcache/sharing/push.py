"""A sealed cache to a place elsewhere, so that nothing half sent is ever taken for whole.

    1. what is there is looked at: nothing, this cache or a part of it, another one, or something else
    2. the manifest there is taken away, and whatever is not as this cache has it
    3. zarr.json, then metadata and shards, several at a time
    4. the journal, and last the manifest: from here on the cache exists

Giving the same command again sends what is missing or differs. The Hub tells hashes of its files. Other places tell
sizes only, so a note of what is being sent lies there meanwhile: the manifest, under a temporary name. It is right
about every file of the right size, because what it would be wrong about is removed before it is written.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha1, sha256
from pathlib import Path

from geomcache.cache import durable
from geomcache.cache.create import is_cache
from geomcache.cache.header import COORDINATES, EPISODE_TABLE, GROUP, Header
from geomcache.cache.inventory import CONTROL_LIMITS, Inventory, files_of, named_as
from geomcache.cache.layout import CHECKSUMS
from geomcache.cache.manifest import JOURNAL, MANIFEST, Manifest
from geomcache.errors import CacheCorruptError, CacheError, CacheExistsError, CacheLockedError
from geomcache.progress import Say, TransferBar, human_bytes
from geomcache.ranges import common_ranges, count_rows
from geomcache.sharing.base import LocalFile, Patience, Remote, RemoteFile, hash_file, in_parallel
from geomcache.sharing.card import write_card
from geomcache.sharing.open import open_remote

NOTE = MANIFEST + durable.TEMPORARY
CARD = "README.md"
_NOT_OURS = {CARD, ".gitattributes"}  # the Hub makes them with a repository
_CONTROL = (GROUP, JOURNAL, MANIFEST)


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What `push` sent."""

    address: str
    files: int
    """Of the cache."""
    sent: int
    """How many of them were sent now."""
    nbytes_sent: int

    def lines(self) -> list[str]:
        """For the user."""
        if not self.sent:
            return [f"{self.address}: whole; all {self.files} files were there already"]
        sent = f"{self.sent} of {self.files} files sent, {human_bytes(self.nbytes_sent)}"
        return [f"{self.address}: whole; {sent}", f"to have it elsewhere: geomcache pull {self.address} PATH"]


def push(
    path: str | Path,
    destination: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
    private: bool = False,
    say: Say,
) -> PushReport:
    """Send a sealed cache. Nobody should write it meanwhile.

    Args:
        path: of the cache.
        destination: ``hf://datasets/owner/name``, or an address that fsspec knows.
        revision: a branch of the Hub's repository.
        overwrite: replace another cache that is there.
        verify: read everything back before the manifest is sent, also what was there already.
        private: make the Hub's repository a private one.
        say: takes lines for the user.

    Raises:
        CacheIncompleteError: the cache is not sealed.
        CacheCorruptError: a file here, or one read back from there, is not as it was written.
        CacheExistsError: something else is at the destination.
        RemoteError: the destination cannot be used.
    """
    folder = Path(path).absolute()
    inventory = Inventory.read(folder)
    with open_remote(destination, revision) as remote:
        insist = Patience(say)
        insist(lambda: remote.prepare(private=private))
        return _Push(folder, inventory, remote, insist).run(overwrite=overwrite, verify=verify)


class _Push:
    def __init__(self, folder: Path, inventory: Inventory, remote: Remote, insist: Patience) -> None:
        self._folder, self._inventory, self._remote = folder, inventory, remote
        self._insist, self._say = insist, insist.say
        self._files = {name: LocalFile.of(inventory.control[name]) for name in _CONTROL}
        for name, stored in inventory.files().items():
            self._files[name] = LocalFile(source=folder / name, size=stored.size, sha256=stored.sha256)
        self._stale: set[str] = set()

    def run(self, *, overwrite: bool, verify: bool) -> PushReport:
        """Send what is not there."""
        listing = self._insist(self._remote.listing)
        self._look(listing, overwrite=overwrite)
        known = {} if self._tells_hashes(listing) else self._known_hashes(listing)
        same = {name for name, file in self._files.items() if self._is_there(name, file, listing, known)}
        missing = {name: file for name, file in self._files.items() if name not in same}
        nbytes = sum(file.size for file in missing.values())
        if missing or self._stale:
            self._say(
                f"{self._remote.address}: {len(missing)} of {len(self._files)} files to send, {human_bytes(nbytes)}"
            )
            with TransferBar("check", nbytes, self._say) as bar:
                in_parallel(lambda name: self._check_here(name, bar), missing)
            self._clear(listing, same)
        if missing:
            self._send(missing, listing)
        self._check_there(verify=verify)
        if MANIFEST in missing:
            self._send_manifest()
        if not self._remote.has_card and (missing or NOTE in listing):
            self._delete({NOTE})
        return PushReport(address=self._remote.address, files=len(self._files), sent=len(missing), nbytes_sent=nbytes)

    def _look(self, listing: Mapping[str, RemoteFile], *, overwrite: bool) -> None:
        """See that what is there may be written to; note which of its files would have no place in this cache."""
        others = sorted(listing.keys() - _NOT_OURS)
        if not others:
            return
        address, mine = self._remote.address, self._inventory.header
        with tempfile.TemporaryDirectory(prefix="geomcache-") as name, named_as(Path(name), address):
            group = self._read(GROUP)
            if group is not None:
                Path(name, GROUP).write_bytes(group)
            if not is_cache(Path(name)):
                raise CacheExistsError(
                    f"{address}: expected nothing, or a cache, found {len(others)} files without a cache's {GROUP},"
                    f" such as {others[0]}: choose another address"
                )
            there = Header.read(Path(name))
        self._stale = {each for each in others if _belongs(each, there)} - self._files.keys() - {NOTE}
        if overwrite:
            return
        if there.fingerprint != mine.fingerprint:
            raise CacheExistsError(
                f"{address}: expected nothing, or the cache with fingerprint {mine.fingerprint}, found the one with"
                f" {there.fingerprint} ({there.spec.model_id} on {there.dataset.repo_id}): choose another address, or"
                " replace it with --overwrite"
            )
        for manifest in (self._manifest(MANIFEST), self._manifest(NOTE)):
            rows = manifest.rows if manifest else ()
            lost = count_rows(rows) - count_rows(common_ranges(rows, self._inventory.manifest.rows))
            if lost:
                raise CacheExistsError(
                    f"{address}: expected no frames that {self._folder} lacks, found {lost}: choose another address, or"
                    " replace what is there with --overwrite"
                )

    def _tells_hashes(self, listing: Mapping[str, RemoteFile]) -> bool:
        return any(found.sha256 or found.git_oid for found in listing.values())

    def _known_hashes(self, listing: Mapping[str, RemoteFile]) -> dict[str, str]:
        """sha256 of files there whose size is right: what manifest and note say, and of control files their content."""
        known: dict[str, str] = {}
        for manifest in (self._manifest(NOTE), self._manifest(MANIFEST)):
            if manifest is not None:
                files = files_of(self._inventory.header.layout, manifest)
                known |= {name: stored.sha256 for name, stored in files.items()}
        for name in _CONTROL:
            if name in listing and listing[name].size == self._files[name].size:
                known[name] = sha256(self._read(name) or b"").hexdigest()
        return known

    def _is_there(
        self, name: str, file: LocalFile, listing: Mapping[str, RemoteFile], known: Mapping[str, str]
    ) -> bool:
        found = listing.get(name)
        if found is None or found.size != file.size:
            return False
        if found.git_oid is not None:
            content = file.source if isinstance(file.source, bytes) else file.source.read_bytes()
            return found.git_oid == sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        return (found.sha256 or known.get(name)) == file.sha256

    def _check_here(self, name: str, bar: TransferBar) -> None:
        file = self._files[name]
        if isinstance(file.source, Path) and hash_file(file.source) != (file.size, file.sha256):
            raise CacheCorruptError(
                f"{file.source}: expected the content that {MANIFEST} has a hash of, found other: see `geomcache verify"
                f" {self._folder}`"
            )
        bar(file.size)

    def _clear(self, listing: Mapping[str, RemoteFile], same: set[str]) -> None:
        """Take away the seal, then what is not as it is to be. zarr.json stays: it says that a cache is there."""
        if MANIFEST in listing and MANIFEST not in same:
            if not self._tells_hashes(listing):
                self._put({NOTE: LocalFile.of(self._read(MANIFEST) or b"")})
            self._delete({MANIFEST})
        self._delete((self._files.keys() & listing.keys() - same - {GROUP, MANIFEST}) | self._stale)

    def _send(self, missing: Mapping[str, LocalFile], listing: Mapping[str, RemoteFile]) -> None:
        first = {name: missing[name] for name in missing if name == GROUP}
        if self._remote.has_card:
            card = LocalFile.of(write_card(self._folder, self._remote.address).encode())
            if not self._is_there(CARD, card, listing, {}):
                first[CARD] = card
        self._put(first)
        if not self._remote.has_card:
            self._put({NOTE: self._files[MANIFEST]})
        self._put({name: file for name, file in missing.items() if name not in _CONTROL})
        self._put({name: file for name, file in missing.items() if name == JOURNAL})

    def _send_manifest(self) -> None:
        if (self._folder / MANIFEST).read_bytes() != self._inventory.control[MANIFEST]:
            raise CacheLockedError(
                f"{self._folder}: expected a cache that nobody writes, found that its manifest has changed meanwhile:"
                " give the same command again"
            )
        self._put({MANIFEST: self._files[MANIFEST]})

    def _check_there(self, *, verify: bool) -> None:
        """See that everything but the manifest is there, and with `verify` that it reads as it should."""
        listing = self._insist(self._remote.listing)
        names = [name for name in self._files if name != MANIFEST]
        for name in names:
            found = listing.get(name)
            if found is None or found.size != self._files[name].size:
                raise CacheCorruptError(
                    f"{self._remote.address}/{name}: expected {self._files[name].size} bytes, found"
                    f" {'none' if found is None else found.size} after it was sent: give the same command again"
                )
        if verify:
            with (
                tempfile.TemporaryDirectory(prefix="geomcache-") as folder,
                TransferBar("read back", sum(self._files[name].size for name in names), self._say) as bar,
            ):
                in_parallel(lambda name: self._read_back(name, Path(folder), bar), names)

    def _read_back(self, name: str, folder: Path, bar: TransferBar) -> None:
        file = self._files[name]
        path = self._insist(lambda: self._remote.fetch(name, file.size, folder))
        found = None if path is None else hash_file(path)
        if found != (file.size, file.sha256):
            self._delete({name})  # so that the same command sends it again
            raise CacheCorruptError(
                f"{self._remote.address}/{name}: expected sha256 {file.sha256}, found {found and found[1]}: removed;"
                " give the same command again"
            )
        assert path is not None
        path.unlink()
        bar(file.size)

    def _put(self, files: Mapping[str, LocalFile]) -> None:
        with TransferBar("push", sum(file.size for file in files.values()), self._say) as bar:
            self._remote.put(files, self._insist, bar)

    def _delete(self, names: set[str]) -> None:
        self._insist(lambda: self._remote.delete(names))

    def _read(self, name: str) -> bytes | None:
        return self._insist(lambda: self._remote.read(name, CONTROL_LIMITS[name.removesuffix(durable.TEMPORARY)]))

    def _manifest(self, name: str) -> Manifest | None:
        """A manifest there, if it is a good one of this fingerprint: a note that was cut off tells nothing."""
        header, content = self._inventory.header, self._read(name)
        if content is None:
            return None
        try:
            return Manifest.parse(content, Path(name), header.layout, header.fingerprint)
        except CacheError:
            return None


def _belongs(name: str, header: Header) -> bool:
    """Whether a file is a part of the cache with this header, which other readers would take for data."""
    folders = {*header.spec.camera_keys, CHECKSUMS, *COORDINATES, EPISODE_TABLE[0].partition("/")[0]}
    return name in (*_CONTROL, NOTE) or name.partition("/")[0] in folders
