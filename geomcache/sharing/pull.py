"""A sealed cache from a place elsewhere: at PATH only when it is whole and every file is as its hash says.

    1. control files and episode table are read, compared with each other, and say which files are wanted
    2. files arrive in a folder beside PATH, each under its name once its sha256 is right; several at a time
    3. journal, zarr.json and manifest are written, the folder is synchronised and renamed to PATH

What ends it in between leaves the folder, and the same command goes on with it. Of a part of the episodes the shards
are brought that hold their rows, as they are: rows of other episodes that share them come along. The part is a sealed
cache like any other, whose journal, manifest and statistics speak of these shards alone; pulling more adds to it.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache import durable, locks
from geomcache.cache.contents import damaged_files, read_episodes
from geomcache.cache.create import is_cache, replace_cache
from geomcache.cache.header import EPISODE_TABLE, GROUP, LOCK
from geomcache.cache.inventory import CONTROL_LIMITS, Inventory, Stored, named_as
from geomcache.cache.journal import begin_line, encode_line
from geomcache.cache.manifest import JOURNAL, MANIFEST
from geomcache.cache.writer import StoreWriter
from geomcache.errors import (
    CacheCorruptError,
    CacheExistsError,
    CacheIncompleteError,
    CacheNotFoundError,
    OutOfSpaceError,
)
from geomcache.progress import Say, TransferBar, human_bytes, silent
from geomcache.ranges import (
    Ranges,
    RowSet,
    clip_ranges,
    common_ranges,
    count_rows,
    format_ranges,
    merge_ranges,
    parse_episodes,
)
from geomcache.sharing.base import Patience, Remote, hash_file, in_parallel, is_remote, sleep, without_secrets
from geomcache.sharing.open import open_remote

_ASIDE = ".geomcache-pull"  # ends the name of the folder beside PATH that files arrive in
_INCOMING = ".incoming"  # in it, for files whose hash is not known to be right yet
_CLAIM = 1 << 41  # a byte of its lock file, behind those that writers use
_LOCK_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class PullReport:
    """What `pull` brought."""

    path: Path
    files: int
    """Of the cache, without control files."""
    fetched: int
    """How many of them came from elsewhere now."""
    nbytes_fetched: int
    nbytes_kept: int
    """Of the files that were here already, and as they should be."""
    frames: int
    """That the cache here has now."""
    episodes: str
    """That it has from end to end, such as ``0:10``."""
    frames_beside: int
    """How many of its frames were not asked for now: they share a shard with those that were, or were there before."""

    def lines(self) -> list[str]:
        """For the user."""
        if not self.fetched:
            what = f"all {self.files} files were here already ({human_bytes(self.nbytes_kept)})"
        else:
            what = f"{self.fetched} of {self.files} files fetched, {human_bytes(self.nbytes_fetched)}"
            if self.nbytes_kept:
                what += f"; {human_bytes(self.nbytes_kept)} were here already"
        lines = [f"{self.path}: {self.frames} frames, whole episodes: {self.episodes}; {what}"]
        if self.frames_beside:
            lines.append(
                f"{self.frames_beside} of these frames were not asked for now: they share shards with those that were,"
                " or were here before"
            )
        return lines


def pull(
    source: str,
    path: str | Path | None,
    *,
    revision: str | None = None,
    episodes: str | None = None,
    trust_copy: bool = False,
    say: Say,
) -> PullReport:
    """Bring a cache, or a part of it.

    Args:
        source: ``hf://datasets/owner/name``, or an address that fsspec knows.
        path: where the cache is to be; None for a folder of its own below `home`.
        revision: a branch, tag or commit of the Hub's repository.
        episodes: such as ``0:10`` or ``0,3,5:8``; all where None.
        trust_copy: take a cache at `path` for right whose manifest and file sizes are: what reads it has checksums.
        say: takes lines for the user.

    Raises:
        CacheNotFoundError: there is no cache.
        CacheIncompleteError: it is not sealed, or lacks episodes that were asked for.
        CacheCorruptError: what is there, or what arrived, is not what was pushed.
        CacheExistsError: something else than this cache, or a part of it, is at `path`.
        OutOfSpaceError: there is no room.
        RemoteError: the place refuses, or the connection fails again and again.
    """
    with open_remote(source, revision) as remote, tempfile.TemporaryDirectory(prefix="geomcache-") as folder:
        insist = Patience(say)
        with named_as(Path(folder), remote.address):
            inventory, lengths = look(remote, Path(folder), insist)
        wanted = _rows(remote.address, inventory, lengths, episodes)
        name = f"{remote.address.rstrip('/').rpartition('/')[2].partition('@')[0]}-{inventory.header.fingerprint[:16]}"
        target = Path(path).expanduser().absolute() if path is not None else home() / f"{name}.zarr"
        target = target.resolve()  # the folder itself is made or replaced, not a link to it
        return _Pull(remote, inventory, lengths, target, insist, trust_copy=trust_copy).run(wanted)


def local_copy(cache: str, *, say: Say) -> Path:
    """The path of a cache that may be elsewhere: a copy here that is, or is made, as its manifest there says.

    Raises:
        CacheError: as `pull`.
    """
    if not is_remote(cache):
        return Path(cache)
    if os.environ.get("RANK", "0") != "0":  # of many processes, one speaks
        say = silent
    say(f"{without_secrets(cache)}: a copy below {home()} is used; set GEOMCACHE_HOME for another place")
    report = pull(cache, None, trust_copy=True, say=say)
    for line in report.lines():
        say(line)
    return report.path


def home() -> Path:
    """Where caches from elsewhere are kept: GEOMCACHE_HOME, else beside the Hub's own."""
    if given := os.environ.get("GEOMCACHE_HOME"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "geomcache"


def look(remote: Remote, folder: Path, insist: Patience) -> tuple[Inventory, NDArray[np.int64]]:
    """What is there, and the lengths of its episodes, by a copy of the few files that say so.

    Args:
        remote: the place.
        folder: an empty one, for the copy.
        insist: tries again.

    Raises:
        CacheError: as `pull`.
    """

    def bring(name: str, limit: int) -> bool:
        content = insist(lambda: remote.read(name, limit))
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return content is not None

    if not bring(GROUP, CONTROL_LIMITS[GROUP]):
        raise CacheNotFoundError(f"{remote.address}: expected a cache, found no {GROUP}: check the address")
    if not bring(MANIFEST, CONTROL_LIMITS[MANIFEST]):
        raise CacheIncompleteError(
            f"{remote.address}: expected a sealed cache, found no {MANIFEST}: it was not pushed to its end; give that"
            " `geomcache push` command once more"
        )
    bring(JOURNAL, CONTROL_LIMITS[JOURNAL])
    inventory = Inventory.read(folder)
    table = [f"{name}/c.0" for name in EPISODE_TABLE]
    for name in table:
        bring(name, inventory.manifest.files[name][0])
    for _, error in damaged_files(folder, table, inventory.manifest.files):
        raise error
    return inventory, read_episodes(folder, inventory.header)[1]


def _rows(address: str, inventory: Inventory, lengths: NDArray[np.int64], episodes: str | None) -> Ranges:
    """The rows that are wanted."""
    held = inventory.manifest.rows
    if episodes is None:
        return held
    stops = np.cumsum(lengths)
    parts = parse_episodes(episodes, len(lengths))
    wanted = merge_ranges((int(stops[first] - lengths[first]), int(stops[last - 1])) for first, last in parts)
    if count_rows(common_ranges(held, wanted)) < count_rows(wanted):
        numbers = np.concatenate([np.arange(first, last) for first, last in parts])
        bounds = [(int(stops[number] - lengths[number]), int(stops[number])) for number in numbers]
        lacking = [
            number
            for number, (start, stop) in zip(numbers, bounds, strict=True)
            if count_rows(clip_ranges(held, start, stop)) < stop - start
        ]
        raise CacheIncompleteError(
            f"{address}: expected episodes {episodes}, lacks {format_ranges(np.array(lacking))}: ask for others, or"
            " extract these and push again"
        )
    return wanted


class _Pull:
    def __init__(
        self,
        remote: Remote,
        inventory: Inventory,
        lengths: NDArray[np.int64],
        target: Path,
        insist: Patience,
        *,
        trust_copy: bool,
    ) -> None:
        self._remote, self._inventory, self._lengths, self._target = remote, inventory, lengths, target
        self._insist, self._say, self._trust_copy = insist, insist.say, trust_copy
        self._draft = target.with_name(f".{target.name}{_ASIDE}")

    def run(self, wanted: Ranges) -> PullReport:
        """Bring the shards that have these rows, beside those that are at the target already."""
        shards = self._inventory.manifest.shards
        asked = shards.keys() & set(self._inventory.header.layout.shards_of(wanted))
        there = self._shards_there()
        if not asked <= there or not self._copy_is_good(there):
            with self._claimed_draft():
                there = self._shards_there()  # another process may have brought them meanwhile
                if not asked <= there or not self._copy_is_good(there):
                    return self._bring(asked | there, wanted)
                durable.remove_tree(self._draft)
        return self._report(there, wanted, fetched=())

    def _shards_there(self) -> set[int]:
        """Shards at the target, which is a part of the cache elsewhere, or nothing."""
        target, address = self._target, self._remote.address
        if not target.exists():
            return set()
        if not is_cache(target):
            raise CacheExistsError(
                f"{target}: expected nothing, or a copy of {address}, found something else: choose another path"
            )
        mine, theirs = Inventory.read(target), self._inventory
        if mine.header.fingerprint != theirs.header.fingerprint:
            raise CacheExistsError(
                f"{target}: expected nothing, or a copy of {address} with fingerprint {theirs.header.fingerprint},"
                f" found a cache with {mine.header.fingerprint}: choose another path"
            )
        other = [shard for shard, held in mine.manifest.shards.items() if theirs.manifest.shards.get(shard) != held]
        if other:
            raise CacheExistsError(
                f"{target}: expected nothing, or a copy of {address}, found {len(other)} shards that are not as"
                " they are there: choose another path, or remove this cache"
            )
        return set(mine.manifest.shards)

    def _copy_is_good(self, there: set[int]) -> bool:
        files = self._inventory.files(there)
        if self._trust_copy:
            return all(_size(self._target / name) == stored.size for name, stored in files.items())
        return len(self._good_in(self._target, files)) == len(files)

    def _good_in(self, folder: Path, files: dict[str, Stored]) -> set[str]:
        """Names of the files that are in a folder as they should be."""
        names = [name for name, stored in files.items() if _size(folder / name) == stored.size]
        good: set[str] = set()
        with TransferBar("check", sum(files[name].size for name in names), self._say) as bar:

            def check(name: str) -> None:
                if hash_file(folder / name) == files[name]:
                    good.add(name)
                bar(files[name].size)

            in_parallel(check, names)
        return good

    @contextlib.contextmanager
    def _claimed_draft(self) -> Iterator[None]:
        """Have the folder beside the target for oneself; waits for another process that has it."""
        told = False
        while True:
            with durable.file_errors(self._draft):
                self._draft.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the other process has just renamed the folder
                lock = locks.LockFile(self._draft / LOCK)
                if lock.claim(_CLAIM) and (self._draft / LOCK).exists():
                    break
                lock.close()
            if not told:
                self._say(f"{self._target}: another process is pulling it: waiting")
                told = True
            sleep(_LOCK_POLL_S)
        try:
            yield
        finally:
            lock.close()

    def _bring(self, shards: set[int], wanted: Ranges) -> PullReport:
        files = self._inventory.files(shards)
        here = self._good_in(self._draft, files)
        self._reuse(files, here)
        missing = [name for name in files if name not in here]
        nbytes = sum(files[name].size for name in missing)
        kept = f"; {len(here)} are here already, as they should be" if here else ""
        self._say(f"{self._remote.address}: {len(missing)} of {len(files)} files to fetch, {human_bytes(nbytes)}{kept}")
        free = shutil.disk_usage(self._draft).free
        if nbytes > free:
            raise OutOfSpaceError(
                f"{self._target}: expected room for {human_bytes(nbytes)}, found {human_bytes(free)}: free some, choose"
                " another path, or pull a part with --episodes"
            )
        incoming = self._draft / _INCOMING
        if incoming.exists():
            durable.remove_tree(incoming)
        incoming.mkdir()
        with TransferBar("pull", nbytes, self._say) as bar:
            in_parallel(lambda name: self._fetch(name, files[name], incoming, bar), missing)
        durable.remove_tree(incoming)
        self._finish(shards, files)
        return self._report(shards, wanted, fetched=missing)

    def _reuse(self, files: dict[str, Stored], here: set[str]) -> None:
        """Take what the cache at the target has: by links, as no file of a cache is ever changed in place."""
        if not self._target.exists():
            return
        lacking = {name: stored for name, stored in files.items() if name not in here}
        for name in self._good_in(self._target, lacking):
            place = self._draft / name
            with durable.file_errors(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.unlink(missing_ok=True)
                try:
                    place.hardlink_to(self._target / name)
                except OSError:  # a file system without links
                    shutil.copyfile(self._target / name, place)
            here.add(name)

    def _fetch(self, name: str, stored: Stored, incoming: Path, bar: TransferBar) -> None:
        path = self._insist(lambda: self._remote.fetch(name, stored.size, incoming))
        found = None if path is None else hash_file(path)
        if path is None or found != stored:
            what = f"{found[0]} bytes with {found[1]}" if found else "none"
            raise CacheCorruptError(
                f"{self._remote.address}/{name}: expected {stored.size} bytes with sha256 {stored.sha256}, as"
                f" {MANIFEST} there has it, found {what}: push the cache once more, with --verify"
            )
        place = self._draft / name
        with durable.file_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            durable.rename(path, place)
        bar(stored.size)

    def _finish(self, shards: set[int], files: dict[str, Stored]) -> None:
        """Make a cache of the files, and put it into its place."""
        draft, inventory = self._draft, self._inventory
        for found in [Path(folder, name) for folder, _, names in os.walk(draft) for name in names]:
            if str(found.relative_to(draft)) not in {*files, LOCK}:  # of another pull that was given up
                durable.unlink(found)
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
        nbytes, stops = sum(files[name].size for name in fetched), np.cumsum(self._lengths)
        return PullReport(
            path=self._target,
            files=len(files),
            fetched=len(fetched),
            nbytes_fetched=nbytes,
            nbytes_kept=sum(stored.size for stored in files.values()) - nbytes,
            frames=count_rows(rows),
            episodes=format_ranges(np.flatnonzero(RowSet(rows).covers(stops - self._lengths, stops))) or "none",
            frames_beside=count_rows(rows) - count_rows(common_ranges(rows, wanted)),
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
