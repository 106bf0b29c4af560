"""A cache that stays remote: frames are read over the network, through zarr-python alone.

For a look at some frames. Training fetches whole shards instead: it reads every frame, in any order, again and again.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, override

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.layout import CHECKSUMS, Table, crc32c
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheCorruptError, GeomcacheError, MissingFrameError, RemoteError
from geomcache.geometry import Geometry
from geomcache.sharing.address import is_remote, public_address, reason
from geomcache.sharing.base import errors_name
from geomcache.sharing.limits import fetch_state
from geomcache.sharing.open import open_remote
from geomcache.waits import waiting


def open_store(cache: str | Path) -> GeometryStore:
    """Open a cache for reading, by its path or its address. Raises what `geomcache.open` raises."""
    return RemoteGeometryStore.open(cache) if is_remote(str(cache)) else GeometryStore.open(cache)


class RemoteGeometryStore(GeometryStore):
    """A remote cache, for reading. As `GeometryStore`, but slow: each read asks the remote for what it needs.

    Control files, metadata and episode table are copied to a temporary folder and compared with their hashes. Maps are
    compared with the table of checksums, as local ones are. A repository of the Hub is read, and pickled, at the commit
    that it had when it was opened.

    Attributes:
        address: of the remote, without credentials; on the Hub with the commit.
    """

    address: str
    _url: str

    @classmethod
    @override
    def open(cls, path: str | Path) -> Self:
        """Open the cache at an address: ``hf://datasets/owner/name``, or one that fsspec knows.

        One that `geomcache extract` has not finished is opened with the frames that it has now.

        Raises:
            CacheNotFoundError, CacheIncompleteError, CacheFormatError, CacheCorruptError: there is no cache.
            RemoteError: the remote refuses, or the connection fails again and again.
        """
        folder = Path(tempfile.mkdtemp(prefix="geomcache-"))
        try:
            remote = open_remote(str(path))
            fetch_state(remote, folder)
            with errors_name(remote.address, folder):
                store = cls._read(folder)
            store._url, store.address = remote.url, public_address(remote.url)
        except BaseException:
            shutil.rmtree(folder)
            raise
        weakref.finalize(store, shutil.rmtree, folder)
        return store

    @override
    def batch(self, indices: Any) -> Geometry:
        try:
            with waiting(f"{self.address}: waiting for frames", group="remote"):
                return self.batch_plain(indices)
        except (OSError, ValueError) as error:  # drivers' and zarr's
            if isinstance(error, GeomcacheError):
                raise
            raise RemoteError(f"{self.address}: cannot be read: {reason(error, self._url)}") from error

    @override
    def _zarr_store(self) -> Any:
        from fsspec.core import url_to_fs
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
        from zarr.storage import FsspecStore

        # Drivers that are asynchronous themselves would leave their connections open in zarr's event loop.
        driver, folder = url_to_fs(self._url)
        return FsspecStore(AsyncFileSystemWrapper(driver, asynchronous=True), path=folder, read_only=True)

    @override
    def _check_plain(self, arrays: Mapping[str, Any], rows: NDArray[np.int64], maps: dict[str, NDArray[Any]]) -> None:
        table = arrays[CHECKSUMS]
        checksums = table.oindex[rows]  # [n, arrays]
        for column, name in enumerate(table.attrs["columns"]):
            for row, map_, expected in zip(rows.tolist(), maps[name], checksums[:, column].tolist(), strict=True):
                checksum = crc32c(map_.astype("<f2").tobytes())
                if checksum != expected:
                    raise CacheCorruptError(
                        f"{self.address}/{name}: {self._name(row)}: expected checksum {expected:08x}, found"
                        f" {checksum:08x}: the file is damaged, or of another cache; push the cache again"
                    )

    @override
    def _read_table(self, table: Table, rows: NDArray[np.int64]) -> NDArray[Any]:
        number, remote = self._layout.keys.index(table.key), open_remote(self._url)
        for shard in np.unique(rows // self.shard_frames).tolist():
            name, size = self._layout.files(shard)[number], self._contents.shards[shard].sizes[number]
            if not (self.path / name).exists():
                remote.fetch(name, size, self.path)  # the reader names a missing one
        try:
            return super()._read_table(table, rows)
        except CacheCorruptError as error:
            raise CacheCorruptError(
                f"{self.address}/{table.key}: expected what was pushed, found a damaged file: push the cache again"
            ) from error

    @override
    def _missing(self, row: int) -> MissingFrameError:
        return MissingFrameError(str(super()._missing(row)).replace(str(self.path), self.address))

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self._url,)
