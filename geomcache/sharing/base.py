"""Places elsewhere that a cache can be pushed to and pulled from: what all have in common.

    hf://datasets/owner/name[@revision]   a dataset repository of the Hugging Face Hub: `remote_hub`
    s3://  gs://  memory://  file://  ... any address that fsspec has a driver for: `remote_fsspec`

A place holds files under the names that they have in the cache. Nothing here trusts it: names come from the cache's own
layout, sizes are known before a byte is asked for, and content is compared with hashes by whoever asked.
"""

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from threading import Event, Lock
from typing import Protocol

from geomcache.errors import ConnectionFailedError, one_line
from geomcache.progress import Say

ATTEMPTS = 5
FIRST_WAIT_S = 1.0  # doubled after each attempt
IN_PARALLEL = 8  # transfers at a time: shards are small, and a store far away answers slowly
HUB_SCHEME = "hf://"

sleep = time.sleep


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """A file of a cache that is here, to be pushed."""

    source: Path | bytes
    """Where it lies, or its content."""
    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "LocalFile":
        """Of content in memory."""
        return cls(source=content, size=len(content), sha256=sha256(content).hexdigest())


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """What a place says of one of its files."""

    size: int
    sha256: str | None = None
    """None where the place does not know."""
    git_oid: str | None = None
    """sha1 of git's blob, of files that the Hub keeps in git itself."""


class Remote(Protocol):
    """A place elsewhere. Its methods may be called from several threads.

    All raise `RemoteError` where the place refuses, and `ConnectionFailedError` where trying again may help.
    """

    address: str
    """For messages: without credentials, and with the revision where there are any."""
    has_card: bool
    """Whether people look at the place in a browser, and a README.md belongs there."""

    def listing(self) -> dict[str, RemoteFile]:
        """Every file there, by name. Empty where there is none, or no such place yet."""

    def read(self, name: str, limit: int) -> bytes | None:
        """Content of a small file; None where it is not there. More than `limit` bytes are refused."""

    def fetch(self, name: str, size: int, folder: Path) -> Path | None:
        """Bring a file into a folder on this machine; where it lies, or None where the place has none.

        At most one byte more than `size` is taken.
        """

    def prepare(self, *, private: bool) -> None:
        """See that the place can be written to, and make it where that is usual."""

    def put(self, files: Mapping[str, LocalFile], insist: "Patience", done: Callable[[int], None]) -> None:
        """Write files, in any order; `done` hears of bytes that are there."""

    def delete(self, names: Collection[str]) -> None:
        """Remove files."""


def is_remote(address: str) -> bool:
    """Whether this names a place elsewhere, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", address) is not None


class Patience:
    """Tries again after connection errors: five times, with longer waits. The threads of a transfer share one.

    Each attempt is told, and an outage that many threads meet is told once.
    """

    def __init__(self, say: Say) -> None:
        self.say = say
        self._told, self._guard = 0, Lock()

    def __call__[T](self, operation: Callable[[], T]) -> T:
        """What an operation gives in the end.

        Raises:
            ConnectionFailedError: all attempts failed.
        """
        for attempt in range(1, ATTEMPTS):
            try:
                result = operation()
            except ConnectionFailedError as error:
                pause = FIRST_WAIT_S * 2 ** (attempt - 1)
                self._tell(attempt, f"{error}; attempt {attempt} of {ATTEMPTS}, again in {pause:.0f} s")
                sleep(pause)
            else:
                self._told = 0
                return result
        try:
            return operation()
        except ConnectionFailedError as error:
            raise ConnectionFailedError(
                f"{error}; gave up after {ATTEMPTS} attempts: the same command, given again, goes on from here"
            ) from error

    def _tell(self, attempt: int, line: str) -> None:
        with self._guard:
            if attempt > self._told:
                self._told = attempt
                self.say(line)


def in_parallel[T](operation: Callable[[T], object], items: Iterable[T]) -> None:
    """Do it for all items, several at a time. The first that fails stops those that have not begun."""
    failed = Event()

    def unless_failed(item: T) -> None:
        if failed.is_set():
            return
        try:
            operation(item)
        except BaseException:
            failed.set()
            raise

    executor = ThreadPoolExecutor(IN_PARALLEL, thread_name_prefix="transfer")
    try:
        futures = [executor.submit(unless_failed, item) for item in items]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def hash_file(path: Path) -> tuple[int, str]:
    """Bytes and sha256, hexadecimal, of a file."""
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def without_secrets(text: str) -> str:
    """A message without what may let others in: user names and passwords, and the queries of signed addresses."""
    text = re.sub(r"://[^/@\s]*@", "://", text)
    return re.sub(r"(://[^\s?]+)\?[^\s'\")]+", r"\1", text)


def reason(error: BaseException) -> str:
    """Why a driver failed, as part of a one-line message."""
    return without_secrets(one_line(error.__cause__ or error))
