"""Creation of a cache: it is made in a folder next to its path and put there complete, so nobody sees half of one."""

import contextlib
import errno
import json
import re
import secrets
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache import durable, locks
from geomcache.cache.header import GROUP, LOCK, Header
from geomcache.cache.inventory import Stored
from geomcache.cache.journal import begin_line
from geomcache.cache.manifest import JOURNAL, MANIFEST
from geomcache.cache.records import Files
from geomcache.cache.zarr_arrays import create_arrays
from geomcache.errors import CacheExistsError, CacheLockedError, CacheMismatchError, UserInputError
from geomcache.geometry import DatasetSpec, GeometrySpec, differences
from geomcache.ranges import Ranges, merge_ranges

_SUCCESSOR = ".update"
_DRAFT = ".geomcache-tmp"  # ends the names of folders next to a cache's path: not yet the cache, or no longer
# Other names of the same weights and frames are no difference. `revision` is such a name from schema version 2 on.
_LABELS = {1: {"spec.model_id", "dataset.repo_id"}, 2: {"spec.model_id", "dataset.repo_id", "dataset.revision"}}


def create(
    target: Path,
    header: Header,
    episode_lengths: NDArray[np.int64],
    identities: NDArray[np.uint64] | None,
    *,
    feature_basis: NDArray[np.float32] | None = None,
    overwrite: bool = False,
) -> None:
    """Create an empty cache at `target`, unless another process does so first.

    `episode_lengths` is int64 [E]; `identities`, uint64 [E], are those of the episodes, None for schema version 1;
    `feature_basis`, float32 [width, D], is None for a cache without features.

    Raises:
        CacheExistsError: something that is no cache is there, and is to be replaced.
        CacheLockedError: somebody has the cache there open for writing, or the file system has no POSIX locks.
        OutOfSpaceError: there is no room.
    """
    target = target.resolve()  # the folder itself is replaced, not a link to it
    with durable.file_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        replaced = target.exists()
        if replaced and not overwrite:
            return
        if replaced:
            _lock_out(target, stack)
        _remove_abandoned(target)
        draft = _make_draft(target, stack)
        try:
            _fill(draft, header, episode_lengths, identities, feature_basis)
            if replaced:
                _swap(target, draft)
            elif not _place(target, draft):
                _remove(draft)
        except BaseException:
            with contextlib.suppress(OSError):  # what failed is raised; what this leaves, the next creation removes
                _remove(draft)
            raise


def replace_cache(target: Path, draft: Path) -> None:
    """Put a complete cache that was made next to `target` into its place, and remove the one that is there.

    Raises:
        CacheExistsError: something that is no cache is there.
        CacheLockedError: somebody has the cache there open for writing, or the file system has no POSIX locks.
    """
    with contextlib.ExitStack() as stack:
        _lock_out(target, stack)
        _swap(target, draft)


def successor_of(target: Path) -> Path:
    """Return the folder next to a cache in which the one that is to take its place is made: a cache itself."""
    return target.with_name(f".{target.name}{_SUCCESSOR}")


def recover(target: Path) -> None:
    """Give a complete successor the name of its cache, if a kill between two renames left no cache of that name."""
    successor = successor_of(target)
    if not target.exists() and (successor / MANIFEST).exists():
        with contextlib.suppress(FileNotFoundError):  # another process has just done it
            _place(target, successor)


def set_aside(target: Path) -> None:
    """Give the successor of a cache another name: it is of another dataset. `set_aside_by` finds it.

    Raises:
        CacheLockedError: somebody is making it.
    """
    successor = successor_of(target)
    with contextlib.suppress(FileNotFoundError), contextlib.closing(locks.LockFile(successor / LOCK)) as lock:
        if not lock.claim_everything():
            raise CacheLockedError(
                f"{target}: expected no other update, found one to another state of its dataset: wait, or stop it"
            )
        with durable.file_errors(successor):
            durable.rename(successor, successor.with_name(f"{successor.name}.{secrets.token_hex(4)}"))
        durable.sync_folder(target.parent)


def set_aside_by(target: Path) -> list[Path]:
    """Return the successors of a cache that were set aside."""
    pattern = re.compile(rf"{re.escape(successor_of(target).name)}\.[0-9a-f]{{8}}")
    return sorted(folder for folder in target.parent.iterdir() if pattern.fullmatch(folder.name))


def succeed(target: Path, is_as_it_was: Callable[[], bool]) -> bool:
    """Put the successor, which must be sealed, into the place of its cache, and remove that one.

    In one step, if the file system can exchange names. Otherwise a kill in between leaves no cache at `target`, which
    `recover` repairs.

    Args:
        target: the cache.
        is_as_it_was: returns whether the cache is as it was when the successor was begun.

    Returns:
        False while another process has one of the two open for writing. True if another process did it before.

    Raises:
        CacheExistsError, CacheLockedError: the cache has changed, or something else took its place.
    """
    successor = successor_of(target)
    with contextlib.ExitStack() as stack:
        try:
            lock = locks.LockFile(successor / LOCK)
        except FileNotFoundError:
            return True
        stack.callback(lock.close)
        if not lock.claim_everything():
            return False
        try:
            _lock_out(target, stack)
        except CacheLockedError:
            return False
        if not is_as_it_was():
            raise CacheLockedError(
                f"{target}: expected the cache that the update began with, found another one, or more rows: run the"
                " same command again, which updates these, too"
            )
        for stale in successor.glob(f"*{durable.TEMPORARY}"):
            durable.unlink(stale)
        _swap(target, successor)
    return True


def remove_successors(target: Path, *, sealed_only: bool = False) -> None:
    """Remove abandoned folders, and the successors of a cache that nobody makes any more, or only the sealed ones."""
    for folder in (successor_of(target), *set_aside_by(target)):
        if not folder.exists() or (sealed_only and not (folder / MANIFEST).exists()):
            continue
        with contextlib.suppress(FileNotFoundError), contextlib.closing(locks.LockFile(folder / LOCK)) as lock:
            if lock.claim_everything():
                doomed = _sibling(target)
                with durable.file_errors(folder):
                    durable.rename(folder, doomed)
                _remove(doomed)
    _remove_abandoned(target)
    _remove_abandoned(successor_of(target))


def _make_draft(target: Path, stack: contextlib.ExitStack) -> Path:
    """Make a folder next to `target`, locked, so that nobody takes it for an abandoned one."""
    while True:
        draft = _sibling(target)
        with durable.file_errors(draft):
            draft.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another creation found it before it was locked, and removed it
            stack.callback(locks.LockFile(draft / LOCK).close)
            return draft


def _fill(
    draft: Path,
    header: Header,
    episode_lengths: NDArray[np.int64],
    identities: NDArray[np.uint64] | None,
    feature_basis: NDArray[np.float32] | None,
) -> None:
    with durable.file_errors(draft):
        create_arrays(draft, header, episode_lengths, identities, feature_basis)
    names = (*header.metadata(), *header.chunks())
    files: Files = {name: Stored.of((draft / name).read_bytes()) for name in names}
    durable.write_file(draft / JOURNAL, [begin_line(header.layout, header.fingerprint, files)])
    durable.sync_tree(draft, locked=LOCK)


def _place(target: Path, draft: Path) -> bool:
    """Give the draft its name; return False if that is taken."""
    try:
        with durable.file_errors(target):
            durable.rename(draft, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    durable.sync_folder(target.parent)
    return True


def _swap(target: Path, draft: Path) -> None:
    """Put the draft into the place of the cache at `target`, in one step if the file system can; remove the old one.

    If it cannot, a kill between the two steps leaves no cache at `target`: the next creation removes both folders.
    """
    old = _sibling(target)
    with durable.file_errors(target):
        if durable.exchange(draft, target):
            durable.rename(draft, old)
        else:
            durable.rename(target, old)
            try:
                durable.rename(draft, target)
            except BaseException:
                durable.rename(old, target)
                raise
    durable.sync_folder(target.parent)
    _remove(old)


def _lock_out(target: Path, stack: contextlib.ExitStack) -> None:
    """Lock everybody out of the cache that is to be replaced."""
    require_cache(target, "a cache to replace", "--overwrite removes caches only; choose another --output")
    lock = locks.LockFile(target / LOCK)
    stack.callback(lock.close)
    if not lock.claim_everything():
        raise CacheLockedError(
            f"{target}: expected a cache that nobody writes, found one in use: wait, or stop the other run"
        )


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{_DRAFT}")


def _remove(folder: Path) -> None:
    """Remove a folder that this process has locked: the lock last, so that a removal that was killed is repeated."""
    with durable.file_errors(folder):
        for entry in folder.iterdir():
            if entry.name == LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                durable.remove_tree(entry)
            else:
                durable.unlink(entry)
        try:
            durable.remove_tree(folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # another process made a new lock in it, and removes it now
                raise


def _remove_abandoned(target: Path) -> None:
    """Remove the folders that killed creations of this cache left next to it.

    Whoever works in such a folder has its lock file open. One without a lock file is about to be locked by its creator,
    which makes another when it finds it gone, or was left by a removal that was killed.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(_DRAFT)}")
    for folder in target.parent.iterdir():
        if not pattern.fullmatch(folder.name) or folder.is_symlink():
            continue
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:  # another process removed it
            lock = locks.LockFile(folder / LOCK)
            stack.callback(lock.close)
            if lock.claim_everything():
                _remove(folder)


def require_cache(folder: Path, expected: str, remedy: str) -> None:
    """Refuse a folder that holds something else than a cache.

    Raises:
        CacheExistsError: it does.
    """
    if not is_cache(folder):
        raise CacheExistsError(f"{folder}: expected {expected}, found something else: {remedy}")


def is_cache(folder: Path) -> bool:
    """Return whether a folder's root group says that it is a cache, of whatever version and in whatever state."""
    try:
        return isinstance(json.loads((folder / GROUP).read_bytes())["attributes"]["geomcache"], dict)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return False


def matching_header(folder: Path, wanted: Header) -> Header:
    """Read the header of the cache in a folder and compare it with that of this run.

    Raises:
        CacheExistsError: something else is there.
        CacheMismatchError: it was made with other settings.
        CacheFormatError, CacheCorruptError: it is malformed or damaged.
    """
    require_cache(folder, "a cache or nothing", "choose another --output")
    header = Header.read(folder)
    if header.codec != wanted.codec:
        raise _mismatch(folder, "codec", header.codec.name, wanted.codec.name, f"use --codec {header.codec.name}")
    stored, asked = ({"spec": each.spec.to_dict(), "dataset": each.dataset.to_dict()} for each in (header, wanted))
    for field, stored_value, asked_value in differences(stored, asked):
        if field not in _LABELS[wanted.schema_version]:
            raise _mismatch(folder, field, stored_value, asked_value, "use the same settings")
    return header


def _mismatch(folder: Path, field: str, stored: object, asked: object, remedy: str) -> CacheMismatchError:
    return CacheMismatchError(
        f"{folder}: {field}: the cache was made with {stored}, this run has {asked}: {remedy}, choose another --output,"
        " or replace the cache with --overwrite",
        field,
        stored,
        asked,
    )


def check_episodes(dataset: DatasetSpec, episode_lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the lengths of the episodes, [E], as little-endian int64.

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


def check_identities(dataset: DatasetSpec, identities: NDArray[np.uint64] | None) -> NDArray[np.uint64] | None:
    """Return the identities of the episodes, [E], as little-endian uint64; None for schema version 1.

    Raises:
        UserInputError: they are not the dataset's.
    """
    if dataset.identities_sha256 is None:
        return None
    values = np.ascontiguousarray(() if identities is None else identities, dtype="<u8")
    digest = sha256(values.tobytes()).hexdigest()
    if values.shape != (dataset.episodes,) or digest != dataset.identities_sha256:
        raise UserInputError(
            f"episode identities of {dataset.repo_id}: expected {dataset.episodes} with sha256"
            f" {dataset.identities_sha256}, got {values.size} with {digest}"
        )
    return values


def check_feature_basis(spec: GeometrySpec, basis: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """Return the basis of the features, [width, D], as little-endian float32; None for a cache without features.

    Raises:
        UserInputError: it is not the spec's.
    """
    if spec.feature is None:
        return None
    values = np.ascontiguousarray(() if basis is None else basis, dtype="<f4")
    digest = sha256(values.tobytes()).hexdigest()
    if values.shape != (spec.feature.width, spec.feature.dim) or digest != spec.feature.basis_sha256:
        raise UserInputError(
            f"feature basis: expected {[spec.feature.width, spec.feature.dim]} with sha256 {spec.feature.basis_sha256},"
            f" got {[*values.shape]} with {digest}"
        )
    return values


def check_rows(dataset: DatasetSpec, wanted: Iterable[tuple[int, int]]) -> Ranges:
    """Return ranges of rows, merged.

    Raises:
        UserInputError: they are empty, or not the dataset's.
    """
    rows = merge_ranges((int(start), int(stop)) for start, stop in wanted)
    if not rows or rows[0][0] < 0 or rows[-1][1] > dataset.frames:
        raise UserInputError(f"rows: expected some of 0 to {dataset.frames - 1}, got {rows!r:.80}")
    return rows
