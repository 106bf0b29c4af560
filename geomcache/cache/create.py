"""A new cache: made in a folder beside its place and put there whole, so that no half-made cache looks like one."""

import contextlib
import errno
import json
import re
import secrets
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache import durable, locks
from geomcache.cache.header import GROUP, LOCK, Header
from geomcache.cache.journal import begin_line
from geomcache.cache.manifest import JOURNAL
from geomcache.cache.records import Files
from geomcache.cache.zarr_arrays import create_arrays
from geomcache.errors import CacheExistsError, CacheLockedError, CacheMismatchError, UserInputError
from geomcache.geometry import DatasetSpec, differences
from geomcache.ranges import Ranges, merge_ranges

_ASIDE = ".geomcache-tmp"  # ends the names of folders beside a cache's place: not yet it, or it no more
_LABELS = {"spec.model_id", "dataset.repo_id"}  # other names of the same weights and frames are no difference


def create(target: Path, header: Header, episode_lengths: NDArray[np.int64]) -> bool:
    """Make an empty cache at `target`, in place of one that is there.

    Returns:
        False where another process has made one in the meantime.

    Raises:
        CacheExistsError: something that is no cache is there.
        CacheLockedError: the cache there is being written, or the file system has no POSIX locks.
        OutOfSpaceError: there is no room.
    """
    target = target.resolve()  # the folder itself is replaced, not a link to it
    with durable.naming(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        replaced = target.exists()
        if replaced:
            _take_over(target, stack)
        _remove_abandoned(target)
        draft = _aside(target)
        with durable.naming(draft):
            draft.mkdir()
        try:
            lock = locks.LockFile(draft / LOCK)
            stack.callback(lock.close)
            lock.claim(0)  # tells other processes that somebody is at work here
            _fill(draft, header, episode_lengths)
            if replaced:
                _swap(target, draft)
                return True
            if _place(target, draft):
                return True
        except BaseException:
            with contextlib.suppress(OSError):  # what failed is raised; what this leaves, the next creation removes
                durable.remove_tree(draft)
            raise
        durable.remove_tree(draft)
        return False


def replace_cache(target: Path, draft: Path) -> None:
    """Put a whole cache that was made beside `target` into the place of the one there, which is removed.

    Raises:
        CacheExistsError: something that is no cache is there.
        CacheLockedError: the cache there is being written, or the file system has no POSIX locks.
    """
    with contextlib.ExitStack() as stack:
        _take_over(target, stack)
        _swap(target, draft)


def _fill(draft: Path, header: Header, episode_lengths: NDArray[np.int64]) -> None:
    with durable.naming(draft):
        create_arrays(draft, header, episode_lengths)
    files: Files = {}
    for name in (*header.metadata(), *header.chunks()):
        content = (draft / name).read_bytes()
        files[name] = len(content), sha256(content).hexdigest()
    durable.write_file(draft / JOURNAL, [begin_line(header.layout, header.fingerprint, files)])
    durable.sync_tree(draft, locked=LOCK)


def _place(target: Path, draft: Path) -> bool:
    try:
        with durable.naming(target):
            durable.rename(draft, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    durable.sync_folder(target.parent)
    return True


def _swap(target: Path, draft: Path) -> None:
    old = _aside(target)
    with durable.naming(target):
        durable.rename(target, old)
        try:
            durable.rename(draft, target)
        except BaseException:
            durable.rename(old, target)
            raise
    durable.sync_folder(target.parent)
    with durable.naming(old):
        durable.remove_tree(old)


def _take_over(target: Path, stack: contextlib.ExitStack) -> None:
    """Lock everybody out of the cache that is to be replaced."""
    if not is_cache(target):
        raise CacheExistsError(
            f"{target}: expected a cache to replace, found something else: --overwrite removes caches only; choose"
            " another --output"
        )
    lock = locks.LockFile(target / LOCK)
    stack.callback(lock.close)
    if not lock.claim_everything():
        raise CacheLockedError(
            f"{target}: expected a cache that nobody writes, found one in use: wait, or stop the other run"
        )


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{_ASIDE}")


def _remove_abandoned(target: Path) -> None:
    """Remove what killed creations of this cache left beside it."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(_ASIDE)}")
    for folder in target.parent.iterdir():
        if pattern.fullmatch(folder.name) and (folder / LOCK).exists():
            lock = locks.LockFile(folder / LOCK)
            try:
                if lock.claim_everything():
                    with durable.naming(folder):
                        durable.remove_tree(folder)
            finally:
                lock.close()


def is_cache(folder: Path) -> bool:
    """Whether a folder's root group says that it is a cache, of whatever version and in whatever state."""
    try:
        return isinstance(json.loads((folder / GROUP).read_bytes())["attributes"]["geomcache"], dict)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return False


def matching_header(folder: Path, wanted: Header) -> Header:
    """The header of the cache that is there.

    Raises:
        CacheExistsError: something else is there.
        CacheMismatchError: it was made with other settings.
        CacheFormatError, CacheCorruptError: it is malformed or damaged.
    """
    if not is_cache(folder):
        raise CacheExistsError(f"{folder}: expected a cache or nothing, found something else: choose another --output")
    header = Header.read(folder)
    if header.codec != wanted.codec:
        there, here = header.codec.name, wanted.codec.name
        raise CacheMismatchError(
            f"{folder}: codec: the cache was made with {there}, this run has {here}: use --codec {there}, choose"
            " another --output, or replace the cache with --overwrite",
            "codec",
            there,
            here,
        )
    cached, asked = ({"spec": each.spec.to_dict(), "dataset": each.dataset.to_dict()} for each in (header, wanted))
    for field, there, here in differences(cached, asked):
        if field not in _LABELS:
            raise CacheMismatchError(
                f"{folder}: {field}: the cache was made with {there}, this run has {here}: use the same settings,"
                " choose another --output, or replace the cache with --overwrite",
                field,
                there,
                here,
            )
    return header


def check_episodes(dataset: DatasetSpec, episode_lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lengths, as little-endian int64.

    Raises:
        UserInputError: they are not the dataset's.
    """
    lengths = np.ascontiguousarray(episode_lengths, dtype="<i8")
    if lengths.shape != (dataset.episodes,) or (lengths < 1).any() or int(lengths.sum()) != dataset.frames:
        raise UserInputError(
            f"episode lengths of {dataset.repo_id}: expected {dataset.episodes} of at least 1 frame and"
            f" {dataset.frames} together, got {lengths.size} and {lengths.sum()}"
        )
    digest = sha256(lengths.tobytes()).hexdigest()
    if digest != dataset.episodes_sha256:
        raise UserInputError(
            f"episode lengths of {dataset.repo_id}: expected sha256 {dataset.episodes_sha256}, got {digest}"
        )
    return lengths


def check_rows(dataset: DatasetSpec, wanted: Iterable[tuple[int, int]]) -> Ranges:
    """The ranges, merged.

    Raises:
        UserInputError: they are empty, or not the dataset's.
    """
    rows = merge_ranges((int(start), int(stop)) for start, stop in wanted)
    if not rows or rows[0][0] < 0 or rows[-1][1] > dataset.frames:
        raise UserInputError(f"rows: expected some of 0 to {dataset.frames - 1}, got {rows!r:.80}")
    return rows
