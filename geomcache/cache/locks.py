"""Byte-range locks: one writer a shard."""

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from geomcache.errors import CacheLockedError

logger = logging.getLogger(__name__)

WAIT_LINE_S = 30.0  # between lines about a process that is waited for

_JOURNAL_BYTE = 1 << 40  # of the lock file: far behind the shards' bytes
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class _OpenLockFile:
    """The one descriptor of a lock file in this process.

    POSIX locks belong to the process and die with *any* descriptor of the file that it closes, and they do not keep
    out the process that holds them. So one descriptor serves all users, and `claims` keeps them apart.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.pid = os.getpid()  # a forked child inherits the descriptor, and none of the locks
        self.users = 0
        self.claims: set[int] = set()
        self.claims_guard = threading.Lock()
        self.journal_guard = threading.Lock()


class LockFile:
    """POSIX byte-range locks on one file: byte i is the claim of shard i, one byte far away the journal's lock.

    The kernel releases them when their owner dies, so that no lock outlives its process.

    Raises:
        CacheLockedError: the file system offers no POSIX locks.
    """

    _open: ClassVar[dict[tuple[int, int], _OpenLockFile]] = {}  # by (device, inode)
    _open_guard = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._closed = False
        self._mine: set[int] = set()
        with self._open_guard:
            self._file = self._find()
            self._file.users += 1
        try:
            with self.exclusive():  # shows at once whether there are locks at all
                pass
        except BaseException:
            self.close()
            raise

    def _find(self) -> _OpenLockFile:
        with contextlib.suppress(FileNotFoundError):
            found = self.path.stat()
            known = self._open.get((found.st_dev, found.st_ino))
            if known is not None and known.pid == os.getpid():
                return known
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        found = os.fstat(descriptor)
        file = self._open[found.st_dev, found.st_ino] = _OpenLockFile(descriptor)
        return file

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
        """Take the claim of a shard, at once or not at all: False where anybody has it."""
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
        """Whether the claim was taken here."""
        return shard in self._mine

    def claim_everything(self) -> bool:
        """Take every lock of the file, until `close`: False where anybody has one."""
        with self._file.claims_guard:
            return self._file.users == 1 and self._lockf(fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the journal's lock; waits for it, and says so every 30 s."""
        with self._file.journal_guard:
            if not self._lockf(fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _JOURNAL_BYTE):
                with self._logged_wait():
                    self._lockf(fcntl.LOCK_EX, 1, _JOURNAL_BYTE)
            try:
                yield
            finally:
                self._lockf(fcntl.LOCK_UN, 1, _JOURNAL_BYTE)

    @contextlib.contextmanager
    def _logged_wait(self) -> Iterator[None]:
        """Log every 30 s, from a thread, that this one waits: holding the lock takes milliseconds."""
        taken = threading.Event()

        def log() -> None:
            while not taken.wait(WAIT_LINE_S):
                logger.warning(
                    "%s: waiting for another process, which has held its lock for over %g s: if that process was"
                    " stopped, let it continue or end it; nothing is lost",
                    self.path,
                    WAIT_LINE_S,
                )

        threading.Thread(target=log, name="geomcache-lock", daemon=True).start()
        try:
            yield
        finally:
            taken.set()

    def close(self) -> None:
        """Release what is held here; the last user closes the file."""
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
