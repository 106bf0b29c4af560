"""A sealed cache that stays where it is: frames are read over the network, through zarr-python alone.

For a look at some frames. Training pulls the cache first: it reads every frame, in any order, again and again.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, override

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.inventory import named_as
from geomcache.cache.layout import CHECKSUMS, crc32c
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheCorruptError, GeomcacheError, RemoteError, one_line
from geomcache.geometry import Geometry
from geomcache.progress import Say, silent
from geomcache.sharing.base import HUB_SCHEME, Patience, without_secrets
from geomcache.sharing.open import open_remote
from geomcache.sharing.pull import look

METADATA_LIMIT = 16 << 20  # bytes of a metadata file


class RemoteGeometryStore(GeometryStore):
    """A cache elsewhere, for reading. As `GeometryStore`, but slow: each read asks the place for what it needs.

    Control files, metadata and episode table are copied to a temporary folder and compared with their hashes. Maps are
    compared with the table of checksums, as local ones are.

    Attributes:
        address: where it is.
    """

    address: str

    @classmethod
    @override
    def open(cls, path: str | Path, *, say: Say = silent) -> Self:
        """Open the sealed cache at an address.

        Args:
            path: ``hf://datasets/owner/name``, or an address that fsspec knows.
            say: hears of attempts that failed.

        Raises:
            CacheNotFoundError, CacheIncompleteError, CacheFormatError, CacheCorruptError: there is no whole cache.
            RemoteError: the place refuses, or the connection fails again and again.
        """
        folder = Path(tempfile.mkdtemp(prefix="geomcache-"))
        try:
            with open_remote(str(path)) as remote, named_as(folder, remote.address):
                insist = Patience(say)
                inventory, _ = look(remote, folder, insist)
                for name in inventory.header.metadata():
                    content = insist(lambda name=name: remote.read(name, METADATA_LIMIT))  # type: ignore[misc]
                    if content is not None:  # a file that is missing is named by the check below
                        (folder / name).parent.mkdir(parents=True, exist_ok=True)
                        (folder / name).write_bytes(content)
                store = cls._read(folder)
                # The Hub's has its revision resolved; another may have credentials in it, which are not for messages.
                store.address = remote.address if str(path).startswith(HUB_SCHEME) else str(path)
        except BaseException:
            shutil.rmtree(folder)
            raise
        weakref.finalize(store, shutil.rmtree, folder)
        return store

    @override
    def batch(self, indices: Any) -> Geometry:
        try:
            return self.batch_plain(indices)
        except (OSError, ValueError) as error:  # drivers' and zarr's
            if isinstance(error, GeomcacheError):
                raise
            raise RemoteError(f"{without_secrets(self.address)}: cannot be read: {one_line(error)}") from error

    @override
    def _zarr_store(self) -> Any:
        from fsspec.core import url_to_fs
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
        from zarr.storage import FsspecStore

        # Drivers that are asynchronous themselves would leave their connections open in zarr's event loop.
        driver, folder = url_to_fs(self.address)
        return FsspecStore(AsyncFileSystemWrapper(driver, asynchronous=True), path=folder, read_only=True)

    @override
    def _check_plain(self, arrays: Mapping[str, Any], rows: NDArray[np.int64], maps: dict[str, NDArray[Any]]) -> None:
        table = arrays[CHECKSUMS]
        checksums = table.oindex[rows]  # [n, arrays]
        for column, name in enumerate(table.attrs["columns"]):
            for row, map_, checksum in zip(rows.tolist(), maps[name], checksums[:, column].tolist(), strict=True):
                if (found := crc32c(map_.astype("<f2").tobytes())) != checksum:
                    raise CacheCorruptError(
                        f"{without_secrets(self.address)}/{name}: {self._name(row)}: expected checksum {checksum:08x},"
                        f" found {found:08x}: the file is damaged, or of another cache; push the cache again"
                    )

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.address,)
