"""The folder next to PATH that a pull fills before it becomes PATH: this user's own, and one process's at a time.

Its name can be predicted, so that an interrupted pull is resumed, and others may be able to write in the parent folder.
So it is used only if this user made it, links in it are refused, and nothing but a pull's own files is ever removed.
"""

import contextlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Set
from pathlib import Path

from geomcache.cache import durable, locks
from geomcache.cache.header import GROUP, LOCK
from geomcache.cache.manifest import JOURNAL, MANIFEST
from geomcache.errors import CacheExistsError
from geomcache.waits import waiting

logger = logging.getLogger(__name__)

_SUFFIX = ".geomcache-pull"
_CLAIM = 1 << 41  # a byte of its lock file, far behind those that writers use
_LOCK_POLL_S = 1.0
_CONTROL = {name + suffix for name in (GROUP, JOURNAL, MANIFEST) for suffix in ("", durable.TEMPORARY)}

sleep = time.sleep


def draft_of(target: Path) -> Path:
    """Return the folder that a pull to `target` fills."""
    return target.with_name(f".{target.name}{_SUFFIX}")


@contextlib.contextmanager
def claimed(draft: Path) -> Iterator[None]:
    """Make the folder, or take over an interrupted pull's; wait while another process has it.

    Raises:
        CacheExistsError: something else is there, or another user's folder.
    """
    if (lock := _try_to_claim(draft)) is None:
        logger.info("%s: another process is pulling into it: waiting", draft)
        with waiting(f"{draft}: waiting for another process that pulls into it: if it was stopped, end it"):
            while (lock := _try_to_claim(draft)) is None:
                sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        lock.close()


def _try_to_claim(draft: Path) -> locks.LockFile | None:
    with durable.file_errors(draft):
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.mkdir()
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                _check_own(draft)
    with contextlib.suppress(FileNotFoundError):  # the other process has just renamed the folder
        lock = locks.LockFile(draft / LOCK)
        if lock.claim(_CLAIM) and (draft / LOCK).exists():
            return lock
        lock.close()
    return None


def _check_own(draft: Path) -> None:
    status = draft.lstat()
    with tempfile.TemporaryDirectory(prefix=draft.name, dir=draft.parent) as own:
        user = os.lstat(own).st_uid  # what this file system makes of this user: not always the process's id
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user:
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "a folder" if stat.S_ISDIR(status.st_mode) else "a file"
        raise CacheExistsError(
            f"{draft}: expected nothing, or the folder of an interrupted pull of yours (user {user}), found {kind} of"
            f" user {status.st_uid}: remove it, or choose another path"
        )
    if (draft / LOCK).is_symlink():
        raise _foreign(draft, LOCK)


def _foreign(draft: Path, name: str) -> CacheExistsError:
    return CacheExistsError(
        f"{draft}: expected only files of this cache, found {name}: a pull of another cache was interrupted, or"
        " something else wrote here; remove the folder, or choose another path"
    )


def files_in(draft: Path, known: Set[str]) -> set[str]:
    """Return the names of the files that an interrupted pull left in its claimed folder.

    `known` are the names of all files that a pull of this cache makes, besides the control files.

    Raises:
        CacheExistsError: it holds something else. Nothing is removed then.
    """
    names: set[str] = set()
    links: set[str] = set()
    for parent, folders, files in os.walk(draft):  # links are listed, and not followed
        prefix = Path(parent).relative_to(draft)
        links |= {str(prefix / name) for name in (*folders, *files) if Path(parent, name).is_symlink()}
        names |= {str(prefix / name) for name in files}
    names.discard(LOCK)
    if unknown := sorted(links | (names - known - _CONTROL)):
        raise _foreign(draft, unknown[0])
    return names


def remove_empty(draft: Path) -> None:
    """Remove a folder that nothing was put into."""
    durable.unlink(draft / LOCK)
    with contextlib.suppress(OSError):  # an interrupted pull's, to be resumed
        draft.rmdir()
