"""A place that fsspec has a driver for: object stores (``s3://``, ``gs://``), file systems, memory."""

import contextlib
import errno
import secrets
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from geomcache.cache import durable
from geomcache.errors import ConnectionFailedError, RemoteError
from geomcache.sharing.base import LocalFile, Patience, RemoteFile, in_parallel, reason, without_secrets

_BLOCK = 8 << 20  # bytes a request
_EXTRAS = {"s3": "geomcache[s3]", "s3a": "geomcache[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_OBJECT_STORES = {*_EXTRAS, "memory"}  # they have no folders; making one could make a bucket
# What drivers raise beside OSError, by the module that has it. What is not loaded cannot have been raised.
_DRIVERS_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
_WITHOUT_ACCESS = (
    ("botocore.exceptions", "NoCredentialsError"),
    ("botocore.exceptions", "PartialCredentialsError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)
# Trying again changes nothing about these.
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
_LASTING_NUMBERS = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.EINVAL}


class FsspecRemote:
    """A folder, or what object stores have for it."""

    has_card = False

    def __init__(self, address: str) -> None:
        """Find the driver.

        Raises:
            RemoteError: it is not installed, or refuses the address.
        """
        from fsspec.core import url_to_fs

        self.address = without_secrets(address.rstrip("/"))
        scheme = address.partition("://")[0]
        try:
            self._fs, root = url_to_fs(address.rstrip("/"), **_options(scheme))
        except ImportError as error:
            package = _EXTRAS.get(scheme, f"that fsspec names ({reason(error)})")
            raise RemoteError(
                f"{self.address}: expected the package that speaks {scheme}://, found it missing: pip install"
                f" '{package}'"
            ) from error
        except ValueError as error:
            raise RemoteError(
                f"{self.address}: expected an address that fsspec can open ({reason(error)}): give such as"
                " s3://bucket/name.zarr"
            ) from error
        self._root = PurePosixPath(root)
        self._folders = scheme not in _OBJECT_STORES

    def listing(self) -> dict[str, RemoteFile]:
        """As of `Remote`."""
        with self._speaking(""):
            self._fs.invalidate_cache()
            found = self._fs.find(str(self._root), detail=True)
        paths = ((PurePosixPath(path), entry) for path, entry in found.items())
        return {
            str(path.relative_to(self._root)): RemoteFile(size=int(entry["size"]))
            for path, entry in paths
            if path != self._root and path.is_relative_to(self._root)
        }

    def read(self, name: str, limit: int) -> bytes | None:
        """As of `Remote`."""
        with self._speaking(name):
            try:
                with self._open(name) as file:
                    content: bytes = file.read(limit + 1)
            except FileNotFoundError:
                return None
        if len(content) > limit:
            raise RemoteError(f"{self.address}/{name}: expected at most {limit} bytes, found more: it is no cache's")
        return content

    def fetch(self, name: str, size: int, folder: Path) -> Path | None:
        """As of `Remote`."""
        with self._speaking(name):
            try:
                file = self._open(name)
            except FileNotFoundError:
                return None
        target = folder / f"{secrets.token_hex(8)}{durable.TEMPORARY}"
        left = size + 1  # one more, so that a longer file is told from a whole one
        with durable.file_errors(target), target.open("wb") as out, file:
            while left:
                with self._speaking(name):
                    block = file.read(min(_BLOCK, left))
                if not block:
                    break
                out.write(block)
                left -= len(block)
        return target

    def prepare(self, *, private: bool) -> None:
        """As of `Remote`; a bucket has to be there.

        Raises:
            RemoteError: it was to be private, which is the bucket's own setting.
        """
        if private:
            raise RemoteError(
                f"{self.address}: --private: expected a repository of the Hub, found another place: who may read there"
                " is that place's own setting; leave it out"
            )

    def put(self, files: Mapping[str, LocalFile], insist: Patience, done: Callable[[int], None]) -> None:
        """As of `Remote`: each file by itself, several at a time."""

        def one(name: str) -> None:
            insist(lambda: self._put(name, files[name].source))
            done(files[name].size)

        in_parallel(one, files)

    def delete(self, names: Collection[str]) -> None:
        """As of `Remote`."""

        def one(name: str) -> None:
            with self._speaking(name), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

        in_parallel(one, names)

    def _put(self, name: str, source: Path | bytes) -> None:
        path = self._path(name)
        with self._speaking(name):
            if self._folders:
                self._fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            if isinstance(source, bytes):
                self._fs.pipe_file(path, source)
            else:
                self._fs.put_file(str(source), path)

    def _path(self, name: str) -> str:
        return str(self._root / name)

    def _open(self, name: str) -> Any:
        return self._fs.open(self._path(name), "rb", block_size=_BLOCK)

    @contextlib.contextmanager
    def _speaking(self, name: str) -> Iterator[None]:
        """Turn what a driver raises into one line that says whether to try again."""
        where = f"{self.address}/{name}".rstrip("/")
        try:
            yield
        except _loaded(_DRIVERS_ERRORS, OSError) as error:
            if isinstance(error, _loaded(_WITHOUT_ACCESS, PermissionError)):
                raise RemoteError(
                    f"{where}: expected access, found none ({reason(error)}): log in as its driver wants it (S3: aws"
                    " configure, or AWS_PROFILE; Google: gcloud auth application-default login)"
                ) from error
            if isinstance(error, _LASTING) or (isinstance(error, OSError) and error.errno in _LASTING_NUMBERS):
                raise RemoteError(f"{where}: expected to use it, found that it refuses ({reason(error)})") from error
            raise ConnectionFailedError(
                f"{where}: expected an answer, found the connection failing ({reason(error)})"
            ) from error


def _options(scheme: str) -> dict[str, Any]:
    """What a driver is opened with. botocore's own attempts, which nobody is told of, would multiply with ours."""
    if scheme not in ("s3", "s3a"):
        return {}
    from fsspec.config import conf

    return {"config_kwargs": {"retries": {"max_attempts": 1}} | conf.get("s3", {}).get("config_kwargs", {})}


def _loaded(names: tuple[tuple[str, str], ...], *others: type[Exception]) -> tuple[type[Exception], ...]:
    return *others, *(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
