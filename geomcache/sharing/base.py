"""What all that talks to a remote shares: parallel transfers, checks of files, errors as one line, a place for copies.

    hf://datasets/owner/name[@revision]   a dataset repository of the Hugging Face Hub: `hub`
    s3://  gs://  memory://  file://  ... any address that fsspec has a driver for: `object_store`

A remote holds files under the names that they have in the cache. Nothing here trusts it: names follow from the cache's
own layout, sizes are known before a byte is asked for, and content is compared with hashes (see `limits`). Passing
failures are tried again by the drivers themselves; what remains of them ends the command, which can be run again.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from geomcache.cache.inventory import Stored
from geomcache.errors import CacheError, ConnectionFailedError, GeomcacheError, RemoteError
from geomcache.progress import TransferBar
from geomcache.sharing.address import reason
from geomcache.waits import waiting

ATTEMPTS = 5  # at what a failing connection interrupts, on top of the driver's own
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0  # between them, on average doubled each time
PARALLEL_TRANSFERS = 8  # shards are small, and a distant store answers slowly
Content = Path | bytes
"""A file to be sent: its path, or what is in it."""

_HF_LOGIN = "run `hf auth login` with an account that may use it"
_DRIVER_LOGIN = (
    "log in as the driver wants it (S3: aws configure, or AWS_PROFILE; Google: gcloud auth application-default login)"
)
# By name of the class, so that no driver is imported for it.
_MEANINGS = {
    "OfflineModeIsEnabled": "expected the Hub, found HF_HUB_OFFLINE set: unset it",
    "GatedRepoError": "expected access, found that the Hub wants consent first: agree on the repository's page there,"
    f" and {_HF_LOGIN}",
    "RevisionNotFoundError": "expected this revision, found that the repository has none such: check its name",
    "RepositoryNotFoundError": "expected a dataset repository, found none that you may see: check the name; for a"
    f" private one {_HF_LOGIN}",
    "HFValidationError": "expected owner/name of a repository, found a name that the Hub does not take: check it",
    "NoCredentialsError": f"expected access, found no credentials: {_DRIVER_LOGIN}",
    "PartialCredentialsError": f"expected access, found incomplete credentials: {_DRIVER_LOGIN}",
    "GoogleAuthError": f"expected access, found none: {_DRIVER_LOGIN}",
    "PermissionError": f"expected access, found none: {_DRIVER_LOGIN}",
}
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
_LASTING_NUMBERS = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.EINVAL}
_BUGS = (TypeError, AttributeError, LookupError, NameError, AssertionError)  # nothing that a driver means to raise


@contextlib.contextmanager
def remote_errors(where: str, url: str = "") -> Iterator[None]:
    """Turn whatever a driver raises into one line without secrets, which says whether to try again.

    Every 30 s a line says that the driver is waited for; how long it tries is its own setting.

    Args:
        where: the file or folder, for the message.
        url: the address that the driver was opened with.

    Raises:
        RemoteError: the remote refuses.
        ConnectionFailedError: the same may succeed later.
    """
    try:
        with waiting(f"{where}: waiting for an answer", group="remote"):
            yield
    except (GeomcacheError, *_BUGS):
        raise
    except Exception as error:
        causes = [*_causes(error)]
        names = [base.__name__ for cause in causes for base in type(cause).__mro__]
        meaning = next((_MEANINGS[name] for name in names if name in _MEANINGS), None)
        status = next((status for cause in causes if (status := _status(cause)) is not None), None)
        why = reason(error, url)
        if meaning is not None:
            raise RemoteError(f"{where}: {meaning} ({why})") from error
        if status in (401, 403):
            raise RemoteError(f"{where}: expected access, found none: {_HF_LOGIN} ({why})") from error
        refused = status is not None and status >= 400 and status not in _PASSING_STATUS
        lasting = error.errno in _LASTING_NUMBERS if isinstance(error, OSError) else isinstance(error, ValueError)
        if refused or lasting or isinstance(error, _LASTING):
            raise RemoteError(f"{where}: expected to use it, found a refusal ({why})") from error
        raise ConnectionFailedError(
            f"{where}: expected an answer, found the connection failing ({why}): run the same command again to resume"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


@contextlib.contextmanager
def errors_name(address: str, folder: Path) -> Iterator[None]:
    """Let errors about the temporary copy in `folder` name the address that it was made from."""
    try:
        yield
    except CacheError as error:
        error.args = (str(error).replace(str(folder), address), *error.args[1:])
        raise


def retried[T](operation: Callable[[], T]) -> T:
    """Do it, again where the connection failed: five times at most. Only for what may be done twice.

    Raises:
        ConnectionFailedError: of the last attempt.
    """
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

    attempts = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=2 * FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        retry=retry_if_exception_type(ConnectionFailedError),
        reraise=True,
    )
    return attempts(operation)


def in_parallel[T](operation: Callable[[T], object], items: Iterable[T]) -> None:
    """Do it for all items, several at a time. The first failure cancels those that have not begun."""
    with ThreadPoolExecutor(PARALLEL_TRANSFERS, thread_name_prefix="transfer") as executor:
        try:
            for future in as_completed([executor.submit(operation, item) for item in items]):
                future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def damaged(folder: Path, files: Mapping[str, Stored]) -> set[str]:
    """Return the names of the files that are missing in a folder, or differ in size or sha256."""
    names = {name for name, stored in files.items() if file_size(folder / name) != stored.size}
    with TransferBar("check", sum(files[name].size for name in files.keys() - names)) as bar:

        def check(name: str) -> None:
            if Stored.of_file(folder / name) != files[name]:
                names.add(name)
            bar(files[name].size)

        in_parallel(check, files.keys() - names)
    return names


def file_size(content: Content) -> int | None:
    """Return the bytes of a file; None where there is none."""
    if isinstance(content, bytes):
        return len(content)
    try:
        return content.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def home() -> Path:
    """Return the folder of the copies: GEOMCACHE_HOME, otherwise one next to the Hub's own cache."""
    if given := os.environ.get("GEOMCACHE_HOME"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "geomcache"


@contextlib.contextmanager
def one_rank_logs() -> Iterator[None]:
    """Of many processes that use the same cache, let the first tell the user."""
    package = logging.getLogger("geomcache")
    level = package.level
    if os.environ.get("RANK", "0") != "0":
        package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)
