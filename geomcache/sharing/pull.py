"""Download a sealed cache. PATH appears only when it is complete and every file has its sha256.

    1. control files and episode table are read within limits, compared with each other, and say which files are needed
    2. files are downloaded into a folder next to PATH, several at a time, each compared with its sha256
    3. journal, zarr.json and manifest are written, the folder is synchronised and renamed to PATH

An interruption leaves the folder, and the same command resumes. For a part of the episodes the shards that hold their
rows are downloaded as they are, with the rows of other episodes that share them. The part is a sealed cache like any
other, whose journal, manifest and statistics cover these shards alone; pulling more adds to it.
"""

import logging
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache import durable
from geomcache.cache.create import is_cache, replace_cache
from geomcache.cache.header import GROUP, LOCK
from geomcache.cache.inventory import Inventory, Stored
from geomcache.cache.journal import begin_line, encode_line
from geomcache.cache.manifest import JOURNAL, MANIFEST
from geomcache.cache.writer import StoreWriter
from geomcache.errors import CacheCorruptError, CacheExistsError, CacheIncompleteError, OutOfSpaceError
from geomcache.progress import TransferBar, human_bytes
from geomcache.ranges import (
    Ranges,
    RowSet,
    common_ranges,
    count_rows,
    format_ranges,
    merge_ranges,
    parse_episodes,
    rows_of,
)
from geomcache.sharing import draft as drafts
from geomcache.sharing.address import is_remote
from geomcache.sharing.base import damaged, file_size, home, in_parallel, one_rank_logs
from geomcache.sharing.limits import fetch_description
from geomcache.sharing.object_store import FsspecRemote
from geomcache.sharing.open import open_remote

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PullReport:
    """What `pull` did."""

    path: Path
    files: int
    """Of the cache, without control files."""
    fetched: int
    """How many of them were downloaded now."""
    nbytes: int
    """Of these."""
    frames: int
    """That the copy has now."""
    frames_extra: int
    """How many of them were not asked for now: they share a shard with those that were, or were there before."""
    episodes: str
    """That the copy has from end to end, such as ``0:10``."""

    def lines(self) -> list[str]:
        """Return the report for the user."""
        files = f"{self.fetched} of {self.files} files downloaded, {human_bytes(self.nbytes)}"
        lines = [f"{self.path}: {self.frames} frames, complete episodes: {self.episodes}; {files}"]
        if self.frames_extra:
            lines.append(
                f"{self.frames_extra} of these frames were not asked for now: they share shards with those that were,"
                " or were there before"
            )
        return lines


def pull(
    source: str,
    path: str | Path | None,
    *,
    revision: str | None = None,
    episodes: str | None = None,
    trust_copy: bool = False,
) -> PullReport:
    """Download a cache, or a part of it.

    Args:
        source: ``hf://datasets/owner/name``, or an address that fsspec knows.
        path: the cache to make, or to add to; None for a folder of its own below `home`.
        revision: a branch, tag or commit of the Hub's repository.
        episodes: such as ``0:10`` or ``0,3,5:8``; None for all.
        trust_copy: take a cache at `path` for undamaged if its manifest and file sizes are right: readers compare
            checksums.

    Raises:
        CacheNotFoundError: there is no cache.
        CacheIncompleteError: it is not sealed, or lacks episodes that were asked for.
        CacheCorruptError: a file is not the one that was pushed.
        CacheExistsError: something other than this cache, or a part of it, is at `path`.
        OutOfSpaceError: there is no room.
        RemoteError: the remote refuses, or the connection fails again and again.
    """
    remote = open_remote(source, revision)
    with tempfile.TemporaryDirectory(prefix="geomcache-") as folder:
        inventory, lengths = fetch_description(remote, Path(folder))
    wanted = _wanted_rows(remote.address, inventory, lengths, episodes)
    if path is None:
        name = remote.address.rpartition("/")[2].partition("@")[0]
        path = home() / f"{name}-{inventory.header.fingerprint[:16]}.zarr"
    target = Path(path).expanduser().resolve()  # the folder itself is made or replaced, not a link to it
    return _Pull(remote, inventory, lengths, target, trust_copy=trust_copy).run(wanted)


def local_copy(cache: str) -> Path:
    """Return the path of a cache: of one that is remote, a local copy, which is made where it is not up to date.

    Raises:
        CacheError: as `pull`.
    """
    if not is_remote(cache):
        return Path(cache)
    with one_rank_logs():
        logger.info("a copy below %s is used; set GEOMCACHE_HOME for another folder", home())
        report = pull(cache, None, trust_copy=True)
        for line in report.lines():
            logger.info("%s", line)
    return report.path


def _wanted_rows(address: str, inventory: Inventory, lengths: NDArray[np.int64], episodes: str | None) -> Ranges:
    if episodes is None:
        return inventory.manifest.rows
    stops = np.cumsum(lengths)
    numbers = rows_of(tuple(parse_episodes(episodes, len(lengths))))
    complete = RowSet(inventory.manifest.rows).covers(stops[numbers] - lengths[numbers], stops[numbers])
    if not complete.all():
        raise CacheIncompleteError(
            f"{address}: expected episodes {episodes}, lacks {format_ranges(numbers[~complete])}: ask for others, or"
            " extract these and push again"
        )
    return merge_ranges((int(stops[number] - lengths[number]), int(stops[number])) for number in numbers)


class _Pull:
    def __init__(
        self, remote: FsspecRemote, inventory: Inventory, lengths: NDArray[np.int64], target: Path, *, trust_copy: bool
    ) -> None:
        self._remote, self._inventory, self._lengths, self._target = remote, inventory, lengths, target
        self._trust_copy, self._draft = trust_copy, drafts.draft_of(target)

    def run(self, wanted: Ranges) -> PullReport:
        """Download the shards that have these rows, and keep those that the target has already."""
        asked = self._inventory.manifest.shards.keys() & set(self._inventory.header.layout.shards_of(wanted))
        present = self._shards_present()
        if not self._is_complete(asked, present):
            with drafts.claimed(self._draft):
                present = self._shards_present()  # another process may have downloaded them meanwhile
                if not self._is_complete(asked, present):
                    return self._download(asked | present, wanted)
                drafts.remove_empty(self._draft)
        return self._report(present, wanted, fetched=())

    def _shards_present(self) -> set[int]:
        """Return the shards at the target, which is a part of the remote cache, or nothing."""
        target, address = self._target, self._remote.address
        if not target.exists():
            return set()
        if not is_cache(target):
            raise CacheExistsError(
                f"{target}: expected nothing, or a copy of {address}, found something else: choose another path"
            )
        local, remote = Inventory.read(target), self._inventory
        if local.header.fingerprint != remote.header.fingerprint:
            raise CacheExistsError(
                f"{target}: expected nothing, or a copy of {address} with fingerprint {remote.header.fingerprint},"
                f" found a cache with {local.header.fingerprint}: choose another path"
            )
        shards = local.manifest.shards
        different = [shard for shard, files in shards.items() if remote.manifest.shards.get(shard) != files]
        if different:
            raise CacheExistsError(
                f"{target}: expected nothing, or a copy of {address}, found {len(different)} shards with other content:"
                " choose another path, or remove this cache"
            )
        return set(shards)

    def _is_complete(self, asked: Collection[int], present: set[int]) -> bool:
        """Return whether the target has all shards that were asked for, undamaged."""
        if not present.issuperset(asked):
            return False
        files = self._inventory.files(present)
        if self._trust_copy:
            return all(file_size(self._target / name) == stored.size for name, stored in files.items())
        return not damaged(self._target, files)

    def _download(self, shards: set[int], wanted: Ranges) -> PullReport:
        files = self._inventory.files(shards)
        missing = {name: files[name] for name in self._prepare_draft(files)}
        nbytes, present = sum(stored.size for stored in missing.values()), len(files) - len(missing)
        logger.info(
            "%s: %d of %d files to download, %s%s",
            self._remote.address,
            len(missing),
            len(files),
            human_bytes(nbytes),
            f"; {present} are there already, undamaged" if present else "",
        )
        free = shutil.disk_usage(self._draft).free
        if nbytes > free:
            raise OutOfSpaceError(
                f"{self._target}: expected room for {human_bytes(nbytes)}, found {human_bytes(free)}: free some, choose"
                " another path, or pull a part with --episodes"
            )
        with TransferBar("pull", nbytes) as bar:
            in_parallel(lambda name: self._fetch(name, missing[name], bar), missing)
        self._finish(shards)
        return self._report(shards, wanted, fetched=missing)

    def _prepare_draft(self, files: Mapping[str, Stored]) -> set[str]:
        """Leave in the draft what is to be in the cache, and add what the target has.

        Returns:
            Names of the files that must be downloaded.
        """
        left = drafts.files_in(self._draft, self._inventory.files().keys())
        missing = damaged(self._draft, files)
        for name in left - (files.keys() - missing):
            durable.unlink(self._draft / name)
        if self._target.exists():
            damaged_too = damaged(self._target, {name: files[name] for name in missing})
            for name in missing - damaged_too:
                self._reuse(name)
            missing = damaged_too
        return missing

    def _reuse(self, name: str) -> None:
        """Link a file of the target into the draft: no file of a cache is ever changed in place."""
        copy = self._draft / name
        with durable.file_errors(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy.hardlink_to(self._target / name)
            except OSError:  # a file system without links
                shutil.copyfile(self._target / name, copy)

    def _fetch(self, name: str, expected: Stored, bar: TransferBar) -> None:
        copy = self._draft / name
        found = Stored.of_file(copy) if self._remote.fetch(name, expected.size, self._draft) else None
        if found != expected:
            if found is not None:
                durable.unlink(copy)
            raise CacheCorruptError(
                f"{self._remote.address}/{name}: expected {expected}, as its {MANIFEST} says, found {found or 'none'}:"
                " push the cache again, with --verify"
            )
        bar(expected.size)

    def _finish(self, shards: set[int]) -> None:
        """Make a sealed cache of the draft, and rename it to the target."""
        draft, inventory = self._draft, self._inventory
        if shards == inventory.manifest.shards.keys():
            for name in (JOURNAL, GROUP, MANIFEST):
                durable.write_file(draft / name, [inventory.control[name]])
        else:
            header, journal = inventory.header, inventory.journal
            begin = begin_line(header.layout, header.fingerprint, journal.files)
            commits = (encode_line(journal.commits[shard].to_dict()) for shard in sorted(shards))
            durable.write_file(draft / JOURNAL, [begin, *commits])
            durable.write_file(draft / GROUP, [header.encode()])
            with StoreWriter(draft, header, self._lengths, ()) as writer:
                sealed = writer.seal()
            assert sealed
        durable.sync_tree(draft, locked=LOCK)
        if self._target.exists():
            replace_cache(self._target, draft)
        else:
            with durable.file_errors(self._target):
                durable.rename(draft, self._target)
            durable.sync_folder(self._target.parent)

    def _report(self, shards: set[int], wanted: Ranges, *, fetched: Collection[str]) -> PullReport:
        files, rows = self._inventory.files(shards), self._inventory.rows(shards)
        stops = np.cumsum(self._lengths)
        return PullReport(
            path=self._target,
            files=len(files),
            fetched=len(fetched),
            nbytes=sum(files[name].size for name in fetched),
            frames=count_rows(rows),
            frames_extra=count_rows(rows) - count_rows(common_ranges(rows, wanted)),
            episodes=format_ranges(np.flatnonzero(RowSet(rows).covers(stops - self._lengths, stops))) or "none",
        )
