"""Byte-range locks: one writer per shard, and nobody in a cache that is being replaced."""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from geomcache.errors import CacheLockedError
from geomcache.waits import waiting

_JOURNAL_BYTE = 1 << 40  # of the lock file: far behind the shards' bytes
_USERS_BYTE = _JOURNAL_BYTE + 1
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_STOPPED = "if it was stopped, let it continue or end it; nothing is lost"


class _OpenLockFile:
    """The one descriptor of a lock file in this process.

    POSIX locks belong to the process and end with *any* descriptor of the file that it closes, and they do not keep
    out the process that holds them. So one descriptor serves all users, and `claims` keeps them apart.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.pid = os.getpid()  # a forked child inherits the descriptor, and none of the locks
        self.users = 0
        self.claims: set[int] = set()
        self.all_claimed = False
        self.claims_guard = threading.Lock()
        self.journal_guard = threading.Lock()


class LockFile:
    """POSIX byte-range locks on one file. The kernel releases them when their owner dies.

    Byte i is the claim of shard i; byte 2^40 is the journal's lock; byte 2^40 + 1 is shared by everybody who has the
    file open, so that `claim_everything` finds those who hold no claim at the moment.

    Raises:
        CacheLockedError: the file system offers no POSIX locks, or this process replaces the cache.
        FileNotFoundError: the folder does not exist, or was removed while it was waited for.
    """

    _open: ClassVar[dict[tuple[int, int], _OpenLockFile]] = {}  # by (device, inode)
    _open_guard = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mine: set[int] = set()
        while True:
            self._closed = False
            with self._open_guard:
                self._file = self._find()
                self._file.users += 1
            try:
                self._share()
                if self._is_current():
                    return
            except BaseException:
                self.close()
                raise
            self.close()  # the folder was replaced by another one meanwhile

    def _find(self) -> _OpenLockFile:
        with contextlib.suppress(FileNotFoundError):
            status = self.path.lstat()
            known = self._open.get((status.st_dev, status.st_ino))
            if known is not None and known.pid == os.getpid():
                return known
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        status = os.fstat(descriptor)
        file = self._open[status.st_dev, status.st_ino] = _OpenLockFile(descriptor)
        return file

    def _share(self) -> None:
        """Take the users' lock; waits while another process has claimed everything."""
        with self._file.claims_guard:
            if self._file.all_claimed:
                raise CacheLockedError(
                    f"{self.path}: expected a cache to open, found one that this process is replacing: open it after"
                    " that"
                )
            if not self._lockf(fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _USERS_BYTE):
                with waiting(f"{self.path}: waiting for another process, which replaces this cache: {_STOPPED}"):
                    self._lockf(fcntl.LOCK_SH, 1, _USERS_BYTE)

    def _is_current(self) -> bool:
        """Return whether the locked file still has the name that it was opened by."""
        try:
            named = self.path.lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._file.descriptor))

    def _lockf(self, operation: int, length: int, start: int) -> bool:
        if self._closed:
            raise ValueError(f"{self.path}: used after it was closed")
        if self._file.pid != os.getpid():
            raise CacheLockedError(
                f"{self.path}: expected its use in process {self._file.pid}, which opened it, found process"
                f" {os.getpid()}: locks do not pass to a forked child; open the cache there again"
            )
        try:
            fcntl.lockf(self._file.descriptor, operation, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in _WITHOUT_LOCKS:
                raise CacheLockedError(
                    f"{self.path}: expected a file system with POSIX locks, found none ({error.strerror}): write the"
                    " cache on a local disk, then copy it"
                ) from error
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return True

    def claim(self, shard: int) -> bool:
        """Take the claim of a shard and return True, or return False at once if anybody has it."""
        with self._file.claims_guard:
            if shard in self._file.claims or not self._lockf(fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard):
                return False
            self._file.claims.add(shard)
            self._mine.add(shard)
            return True

    def release(self, shard: int) -> None:
        """Give a claim back."""
        with self._file.claims_guard:
            self._mine.remove(shard)
            self._file.claims.remove(shard)
            self._lockf(fcntl.LOCK_UN, 1, shard)

    def holds(self, shard: int) -> bool:
        """Return whether this object took the claim of a shard."""
        return shard in self._mine

    def claim_everything(self) -> bool:
        """Take every lock of the file until `close` and return True, or return False if anybody else has it open."""
        with self._file.claims_guard:
            if self._file.users > 1 or not self._lockf(fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0):
                return False
            self._file.all_claimed = True
            return True

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the journal's lock; waits for it, and says so every 30 s."""
        with self._file.journal_guard:
            if not self._lockf(fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _JOURNAL_BYTE):
                # holding it takes milliseconds
                with waiting(f"{self.path}: waiting for another process, which holds its lock: {_STOPPED}"):
                    self._lockf(fcntl.LOCK_EX, 1, _JOURNAL_BYTE)
            try:
                yield
            finally:
                self._lockf(fcntl.LOCK_UN, 1, _JOURNAL_BYTE)

    def close(self) -> None:
        """Release this object's claims; the last user in the process closes the file."""
        if self._closed or self._file.pid != os.getpid():
            return
        for shard in tuple(self._mine):
            self.release(shard)
        self._closed = True
        with self._open_guard:
            self._file.users -= 1
            if self._file.users == 0:
                os.close(self._file.descriptor)
                self._open.pop(next(key for key, file in self._open.items() if file is self._file))


def _after_fork() -> None:
    """Give a forked child a guard of its own: a thread of its parent may have held the one that it inherited."""
    LockFile._open_guard = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
