"""A remote that fsspec has a driver for: object stores (``s3://``, ``gs://``), file systems, memory."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from geomcache.cache import durable
from geomcache.cache.inventory import Stored
from geomcache.errors import CacheCorruptError, RemoteError
from geomcache.sharing.address import public_address, reason
from geomcache.sharing.base import Content, file_size, in_parallel, remote_errors

_BLOCK = 16 << 20  # bytes a request
_EXTRAS = {"s3": "geomcache[s3]", "s3a": "geomcache[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_OBJECT_STORES = {*_EXTRAS, "memory"}  # they have no folders; making one could make a bucket


class FsspecRemote:
    """A folder, or a prefix of an object store. Several threads may call its methods.

    All raise `RemoteError` where the remote refuses, and `ConnectionFailedError` where trying again may help.

    Attributes:
        address: for messages: without credentials.
        url: for fsspec: with them.
        on_hub: whether it is a repository of the Hub: shows a card, knows hashes of its files, commits atomically.
    """

    on_hub = False

    def __init__(self, url: str) -> None:
        """Find the driver.

        Raises:
            RemoteError: it is not installed, or refuses the address.
        """
        self.address = public_address(url)
        self._open_driver(url)

    def _open_driver(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url, scheme = url, url.partition("://")[0]
        try:
            self._fs, root = url_to_fs(url)
        except ImportError as error:
            package = _EXTRAS.get(scheme, f"that fsspec names ({reason(error, url)})")
            raise RemoteError(
                f"{self.address}: expected the package that speaks {scheme}://, found it missing: pip install"
                f" '{package}'"
            ) from error
        except ValueError as error:
            raise RemoteError(
                f"{self.address}: expected an address that fsspec can open ({reason(error, url)}): use one such as"
                " s3://bucket/name.zarr"
            ) from error
        self._root, self._has_folders = f"{root.rstrip('/')}/", scheme not in _OBJECT_STORES
        self._takes_ranges = scheme in _OBJECT_STORES  # a web server may answer with more than it was asked for

    def listing(self) -> dict[str, Stored]:
        """Return size and sha256 of every file, by name; the hash is empty where the remote does not know it."""
        with remote_errors(self.address, self.url):
            self._fs.invalidate_cache()
            entries = self._fs.find(self._root.rstrip("/"), detail=True)
        return {
            path.removeprefix(self._root): Stored(int(entry["size"]), self._sha256(entry))
            for path, entry in entries.items()
            if path.startswith(self._root)
        }

    @staticmethod
    def _sha256(_entry: Mapping[str, Any]) -> str:
        return ""

    def fetch(self, name: str, limit: int, folder: Path) -> bool:
        """Download a file to ``folder / name``, block by block: no driver's own way to get a file ends at a limit.

        Returns:
            False where the remote has none.

        Raises:
            CacheCorruptError: it has more than `limit` bytes; no more are taken.
        """
        where, target = f"{self.address}/{name}", folder / name
        with remote_errors(where, self.url):
            try:
                file = self._fs.open(self._root + name, "rb", block_size=_BLOCK)
            except FileNotFoundError:
                return False
        with durable.file_errors(target), file:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as copy:
                while copy.tell() <= limit:
                    with remote_errors(where, self.url):
                        block = file.read(min(_BLOCK, limit + 1 - copy.tell()))
                    if not block:
                        return True
                    copy.write(block)
        raise CacheCorruptError(
            f"{where}: expected at most {limit} bytes, found more: something else than `geomcache push` wrote it; push"
            " the cache again"
        )

    def fetch_whole(self, name: str, size: int, folder: Path) -> bool:
        """Download the first `size` bytes of a file to ``folder / name``: of a small one, in one request if possible.

        Returns:
            False where the remote has none.
        """
        if not self._takes_ranges or size > _BLOCK:
            return self.fetch(name, size, folder)
        where, target = f"{self.address}/{name}", folder / name
        with remote_errors(where, self.url):
            try:
                content = self._fs.cat_file(self._root + name, start=0, end=size)
            except FileNotFoundError:
                return False
        with durable.file_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return True

    def prepare(self, *, private: bool) -> None:
        """Make the remote ready for writing. A bucket has to exist.

        Raises:
            RemoteError: it was to be private, which is the bucket's own setting.
        """
        if private:
            raise RemoteError(
                f"{self.address}: --private: expected a repository of the Hub, found another remote, whose own settings"
                " say who may read: leave it out"
            )

    def put(self, files: Mapping[str, Content], done: Callable[[int], None]) -> None:
        """Write files, in any order; `done` is called with the bytes that have arrived."""

        def put_one(name: str) -> None:
            self._put(name, files[name])
            done(file_size(files[name]) or 0)

        in_parallel(put_one, files)

    def _put(self, name: str, content: Content) -> None:
        path = self._root + name
        with remote_errors(f"{self.address}/{name}", self.url):
            if self._has_folders:
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(content, bytes):
                self._fs.pipe_file(path, content)
            else:
                self._fs.put_file(str(content), path)

    def delete(self, names: Collection[str]) -> None:
        """Remove files."""

        def delete_one(name: str) -> None:
            with remote_errors(f"{self.address}/{name}", self.url), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._root + name)

        in_parallel(delete_one, names)
