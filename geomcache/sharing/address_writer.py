"""Write a cache at an address: shards are made in a folder of this machine, and sent when they are committed there.

    1. a shard's files, each an object that is created only if there is none, and compared with what the store reports
    2. its line of the journal, `journal/N.json`, created only if there is none: from here on the shard exists
    3. the files here are removed

The folder is a cache as any other, with the journal of the address and without the shards that were sent. It is made
anew by every driver: what a killed one had not sent is made again. docs/cache-format.md has the protocol; one driver
writes at a time, which `lease` sees to.
"""

import hashlib
import logging
import re
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Self, override

import numpy as np
from numpy.typing import NDArray

from geomcache.cache import durable
from geomcache.cache.codecs import RAW, Codec
from geomcache.cache.create import check_episodes, check_identities, check_rows, create, matching_header
from geomcache.cache.header import GROUP, Header
from geomcache.cache.inventory import CONTROL_LIMITS
from geomcache.cache.journal import Drop, Journal, decode_line
from geomcache.cache.manifest import JOURNAL, MANIFEST
from geomcache.cache.signatures import Signatures
from geomcache.cache.writer import Claim, ShardMaps, StoreWriter
from geomcache.errors import CacheCorruptError, CacheExistsError, CacheLockedError
from geomcache.geometry import DatasetSpec, GeometrySpec
from geomcache.ranges import Ranges
from geomcache.sharing import lease as leases
from geomcache.sharing import remote_journal
from geomcache.sharing.base import errors_name, home, in_parallel, retried
from geomcache.sharing.conditional import ConditionalRemote

logger = logging.getLogger(__name__)


class AddressWriter(StoreWriter):
    """A cache at an address that is open for writing: a `StoreWriter`, by one process at a time.

    Attributes:
        address: without credentials; never None.
        path: the folder on this machine. Errors of the methods name the address instead.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        episode_lengths: NDArray[np.int64],
        wanted: Ranges,
        *,
        remote: ConditionalRemote,
        lease: leases.Lease,
        sent: int,
        sealed: bool,
    ) -> None:
        """Continue with a folder that `create_or_open` has prepared: `sent` lines of its journal are at the address."""
        self._remote, self._lease, self._sent, self._sealed = remote, lease, sent, sealed
        self._sending = threading.Lock()
        self.address = remote.address
        super().__init__(path, header, episode_lengths, wanted)

    @classmethod
    @override
    def create_or_open(
        cls,
        path: str | Path,
        spec: GeometrySpec,
        dataset: DatasetSpec,
        episode_lengths: NDArray[np.int64],
        wanted: Iterable[tuple[int, int]],
        *,
        identities: NDArray[np.uint64] | None = None,
        codec: Codec = RAW,
        shard_frames: int | None = None,
        overwrite: bool = False,
    ) -> Self:
        """Create a cache at an address, or open the one that is there to resume or extend it.

        Arguments and errors are those of `StoreWriter.create_or_open`; `path` is an address that fsspec knows.

        Raises:
            CacheLockedError: another driver writes to the address.
            RemoteError: the store refuses, or does not keep conditional writes.
        """
        remote = ConditionalRemote(str(path))
        if not remote.is_atomic:
            logger.warning(
                "%s: the driver does not create objects in one step: start no second run on this address",
                remote.address,
            )
        lengths, rows = check_episodes(dataset, episode_lengths), check_rows(dataset, wanted)
        header, table = Header.new(spec, dataset, codec, shard_frames), check_identities(dataset, identities)
        folder = work_folder(remote.address)
        with errors_name(remote.address, folder):
            _require_cache(remote, {*remote.sizes()})
            lease, sealed = leases.Lease(remote), False
            try:
                opening = _Opening(remote, lease, folder, header)
                sealed = MANIFEST in opening.names
                if overwrite:
                    opening.remove_cache()
                    sealed = False
                opening.make_folder(lengths, table)
                sent = opening.bring_journal()
                return cls(folder, opening.header, lengths, rows, remote=remote, lease=lease, sent=sent, sealed=sealed)
            except BaseException:
                lease.release(sealed=sealed)
                shutil.rmtree(folder, ignore_errors=True)
                raise

    @override
    def commit(self, claim: Claim, maps: ShardMaps, signatures: Signatures | None = None) -> int:
        with errors_name(self._remote.address, self.path):
            nbytes = super().commit(claim, maps, signatures)
            with self._sending:  # several threads may commit: lines are sent in their order
                self._send()
        return nbytes

    @override
    def seal(self) -> bool:
        with errors_name(self._remote.address, self.path):
            if not super().seal():
                return False
            with self._sending:
                self._send()
            if not self._sealed:
                self._check_objects()
                self._lease.check()
                for name in (JOURNAL, GROUP, MANIFEST):
                    self._remote.replace(name, (self.path / name).read_bytes())
                self._sealed = True
            self._remote.remove(self._remote.names(remote_journal.FOLDER))
            self._lease.finish()
        return True

    @override
    def close(self) -> None:
        super().close()
        self._lease.release(sealed=self._sealed)
        shutil.rmtree(self.path, ignore_errors=True)  # the next driver makes it anew

    @override
    def _unseal(self) -> None:
        super()._unseal()
        if self._sealed:
            self._lease.check()
            self._remote.remove({MANIFEST})
            self._remote.replace(GROUP, self._header.encode())
            self._sealed = False

    def _send(self) -> None:
        """Send the lines of the journal that are not at the address yet, and what they are about before them."""
        lines = (self.path / JOURNAL).read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines[self._sent :], self._sent):
            record = decode_line(line)
            files = self._layout.files(record["shard"])
            if record["record"] == "commit":
                in_parallel(self._send_file, files)
            self._lease.check()
            if not self._remote.create(remote_journal.line_name(number), line):
                raise self._other_driver(remote_journal.line_name(number))
            self._sent = number + 1
            if record["record"] == "drop":
                self._remote.remove({*files})
            else:
                for name in files:
                    durable.unlink(self.path / name)

    def _send_file(self, name: str) -> None:
        if not self._remote.create(name, self.path / name):
            raise self._other_driver(name)

    def _other_driver(self, name: str) -> CacheLockedError:
        return CacheLockedError(
            f"{self.address}/{name}: expected none yet, found an object of another driver: one driver writes to an"
            " address at a time; run the same command again to resume"
        )

    def _check_objects(self) -> None:
        """Compare what the store has with what was written: sizes, and checksums of what this process wrote.

        Raises:
            CacheCorruptError: an object is missing or another one.
        """
        present = self._remote.sizes()
        for shard, written in self._journal.shards.items():
            for name, size in zip(self._layout.files(shard), written.sizes, strict=True):
                found, checksum = present.get(name, (None, ""))
                sent = self._remote.checksums.get(name, checksum)
                if found != size or sent != checksum:
                    raise CacheCorruptError(
                        f"{self.address}/{name}: expected {size} bytes with checksum {sent or 'of any kind'}, found"
                        f" {'none' if found is None else f'{found} bytes with {checksum}'}: something else changed it;"
                        " run the same command again, which makes what is missing"
                    )


class _Opening:
    """What a driver does before it can write: find what is there, and make the folder that it works in.

    Attributes:
        header: of the cache that is there, or of the one to create.
        names: of the objects at the address.
    """

    def __init__(self, remote: ConditionalRemote, lease: leases.Lease, folder: Path, header: Header) -> None:
        self._remote, self._lease, self._folder, self.header = remote, lease, folder, header
        self._sizes = {name: size for name, (size, _) in remote.sizes().items()}

    @property
    def names(self) -> set[str]:
        return {*self._sizes}

    def remove_cache(self) -> None:
        """Remove the cache that is there: what says that shards exist first, what says that a cache is there last."""
        control = {name for name in self.names if name.startswith(f"{remote_journal.FOLDER}/")} | {JOURNAL, MANIFEST}
        others = {name for name in self.names if not name.startswith(f"{leases.FOLDER}/")} - control - {GROUP}
        for names in ({MANIFEST}, control, others, {GROUP}):
            self._lease.check()
            self._remote.remove(names & self.names)
        self._sizes = {name: size for name, size in self._sizes.items() if name.startswith(f"{leases.FOLDER}/")}

    def make_folder(self, lengths: NDArray[np.int64], identities: NDArray[np.uint64] | None) -> None:
        """Make an empty cache here. Its header is that of the one at the address, which must fit."""
        if self._folder.exists():
            shutil.rmtree(self._folder)
        if GROUP in self.names:
            self._folder.mkdir(parents=True)
            self._fetch(GROUP, CONTROL_LIMITS[GROUP])
            self.header = matching_header(self._folder, self.header)
            shutil.rmtree(self._folder)
        create(self._folder, self.header, lengths, identities)

    def bring_journal(self) -> int:
        """Let the journal here be that of the address, where the cache is created if there is none.

        Returns:
            How many of its lines are at the address.
        """
        journal = Journal(self._folder / JOURNAL, self.header.layout, self.header.fingerprint)
        if not remote_journal.is_begun(self.names):
            self._remove_stale(journal)
            self._create()
            return 1
        (self._folder / JOURNAL).unlink()
        sent = remote_journal.fetch_journal(self._remote, self.names, self._folder)
        journal.read()
        in_parallel(lambda name: self._fetch(name, journal.files[name][0]), [*self._small_files()])
        self._drop_missing(journal)
        self._remove_stale(journal)
        return sent

    def _create(self) -> None:
        """Send everything but shards; the journal's first line last."""
        self._lease.check()
        self._remote.replace(GROUP, (self._folder / GROUP).read_bytes())
        names = [*self.header.metadata(), *self.header.chunks()]
        in_parallel(lambda name: self._remote.replace(name, (self._folder / name).read_bytes()), names)
        self._lease.check()
        if not self._remote.create(remote_journal.line_name(0), (self._folder / JOURNAL).read_bytes()):
            raise CacheLockedError(
                f"{self._remote.address}: expected no cache yet, found one that another driver has just created: run"
                " the same command again"
            )

    def _small_files(self) -> Iterable[str]:
        yield from self.header.metadata()
        yield from (f"{name}/c.0" for name in self.header.episode_table)

    def _drop_missing(self, journal: Journal) -> None:
        """Drop shards of which an object is missing or has another size, as `extract` does on a disk."""
        for shard, commit in sorted(journal.commits.items()):
            for name, size in zip(self.header.layout.files(shard), commit.files.sizes, strict=True):
                if self._sizes.get(name) != size:
                    problem = f"{name}: expected {size} bytes, found {self._sizes.get(name, 'none')}"
                    logger.warning("%s: shard %d is made again: %s", self._remote.address, shard, problem)
                    journal.append(Drop(shard, problem))
                    break

    def _remove_stale(self, journal: Journal) -> None:
        """Remove objects of shards that do not exist: a driver ended between them and their line."""
        keys = "|".join(map(re.escape, self.header.layout.keys))
        pattern = re.compile(rf"(?:{keys})/c\.[0-9]+(?:\.0)+")
        committed = {name for shard in journal.commits for name in self.header.layout.files(shard)}
        stale = {name for name in self.names if pattern.fullmatch(name)} - committed
        stale |= self.names & {MANIFEST + durable.TEMPORARY}  # of a push that has not ended
        if stale:
            self._lease.check()
            self._remote.remove(stale)
            logger.info("%s: removed %d stale objects of an interrupted run", self._remote.address, len(stale))

    def _fetch(self, name: str, limit: int) -> None:
        retried(lambda: self._remote.fetch(name, limit, self._folder))


def work_folder(address: str) -> Path:
    """Return the folder of this machine in which the shards of a cache at an address are made."""
    name = address.rstrip("/").rpartition("/")[2]
    return home() / "extract" / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}"


def _require_cache(remote: ConditionalRemote, names: set[str]) -> None:
    """Refuse an address that holds something else than a cache, or what a push has not ended.

    Raises:
        CacheExistsError: it does.
    """
    others = {name for name in names if not name.startswith((f"{leases.FOLDER}/", f"{remote_journal.FOLDER}/"))}
    if others and GROUP not in others:
        raise CacheExistsError(
            f"{remote.address}: expected nothing, or a cache, found {len(others)} objects without a cache's {GROUP},"
            f" such as {min(others)}: choose another --output"
        )
