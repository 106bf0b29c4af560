"""Objects that are written whole and never replaced: what an extraction into an object store rests on.

`ConditionalRemote.create` writes an object only if there is none of this name (`If-None-Match: *` in S3,
`ifGenerationMatch=0` in Google's), and compares the checksum that the store reports with that of what was sent. If an
answer is lost on its way, the object is there already at the next try: one of the same content is this process's own.
"""

import base64
import contextlib
import os
import secrets
from collections.abc import Mapping
from hashlib import file_digest, md5
from pathlib import Path
from typing import Any

from geomcache.cache import durable
from geomcache.cache.inventory import Stored
from geomcache.errors import ConnectionFailedError, RemoteError
from geomcache.sharing.address import check_output
from geomcache.sharing.base import Content, file_size, remote_errors, retried
from geomcache.sharing.object_store import FsspecRemote

_WHOLE_NBYTES = 64 << 20  # up to here an object is sent in one request, whose answer has its checksum
_LIMIT_NBYTES = 1 << 20  # of the small objects that `read` reads
_LOCAL = ("file", "local")
_ATOMIC = {*_LOCAL, "memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl"}
_TAKEN_CODES = {"PreconditionFailed", "412"}


class ConditionalRemote(FsspecRemote):
    """An address at which objects are created. Several threads may call its methods.

    Attributes:
        is_atomic: whether the driver is known to create an object in one step, also next to others that do.
        checksums: what the store reported of the objects that were created, by name.
    """

    def __init__(self, address: str) -> None:
        """Find the driver. The address is not contacted yet.

        Raises:
            UserInputError: it cannot be used, or is one of the Hub, which has commits instead.
            RemoteError: the driver is not installed.
        """
        check_output(address)
        super().__init__(address.rstrip("/"))
        self._scheme = address.partition("://")[0]
        self.is_atomic = self._scheme in _ATOMIC
        self.checksums: dict[str, str] = {}

    def create(self, name: str, content: Content) -> bool:
        """Write an object whole, and compare what the store reports of it.

        Returns:
            False if there is one of this name with another content. It stays.

        Raises:
            RemoteError: the store refuses, or the connection fails again and again.
        """
        return retried(lambda: self._create(name, content))

    def replace(self, name: str, content: bytes) -> None:
        """Write an object whole, whatever is there."""
        retried(lambda: self._replace(name, content))

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object; None if there is none.

        Raises:
            RemoteError: it is large, the store refuses, or the connection fails again and again.
        """
        return retried(lambda: self._read(name))

    def sizes(self) -> dict[str, tuple[int, str]]:
        """Return bytes and checksum of every object, by name; the checksum is empty where the store reports none."""
        return retried(self._sizes)

    def names(self, prefix: str) -> set[str]:
        """Return the names of the objects below a prefix."""
        return retried(lambda: self._names(prefix))

    def remove(self, names: set[str]) -> None:
        """Remove objects."""
        retried(lambda: self.delete(names))

    def reported(self, entry: Mapping[str, Any]) -> str:
        """Return the checksum that a listing, or the answer to a write, has of an object; empty if it has none."""
        settings = entry.get("content_settings")  # of Azure's driver
        value = entry.get("md5Hash") or entry.get("ETag")
        if not value and isinstance(settings, Mapping) and settings.get("content_md5"):
            value = base64.b64encode(bytes(settings["content_md5"])).decode()
        return str(value or "").strip('"')

    def _create(self, name: str, content: Content) -> bool:
        with remote_errors(f"{self.address}/{name}", self.url):
            try:
                answer = self._send(self._root + name, content, mode="create")
            except Exception as error:
                if not _is_taken(error):
                    raise
                return self._holds(name, content)
            self._compare(name, content, answer)
        return True

    def _replace(self, name: str, content: bytes) -> None:
        with remote_errors(f"{self.address}/{name}", self.url):
            self._compare(name, content, self._send(self._root + name, content, mode="overwrite"))

    def _send(self, path: str, content: Content, mode: str) -> Any:
        if self._scheme in _LOCAL:
            return _write_local(Path(path), content, replace=mode != "create")
        if self._has_folders:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(content, Path):
            if (file_size(content) or 0) > _WHOLE_NBYTES:
                return self._fs.put_file(str(content), path, mode=mode)
            content = content.read_bytes()
        return self._fs.pipe_file(path, content, mode=mode)

    def _compare(self, name: str, content: Content, answer: object) -> None:
        """Compare what the store reports of an object that was just written; without a checksum, read it back."""
        entry = answer if isinstance(answer, Mapping) else self._info(name)
        checksum = self.reported(entry)
        size, digest = file_size(content), _md5(content)
        if entry.get("size", size) == size and checksum in (digest.hex(), base64.b64encode(digest).decode()):
            self.checksums[name] = checksum
            return
        if not self._holds(name, content):
            self._fs.rm_file(self._root + name)
            raise ConnectionFailedError(
                f"{self.address}/{name}: expected {size} bytes with md5 {digest.hex()}, found others in the store:"
                " removed; run the same command again to resume"
            )
        self.checksums[name] = checksum

    def _holds(self, name: str, content: Content) -> bool:
        """Read an object back and return whether it has this content."""
        path = self._root + name
        if self._info(name).get("size") != file_size(content):
            return False
        if isinstance(content, bytes):
            return bool(self._fs.cat_file(path) == content)
        with self._fs.open(path, "rb") as stored:
            return Stored.of_file(content) == Stored(file_size(content) or 0, file_digest(stored, "sha256").hexdigest())

    def _info(self, name: str) -> Mapping[str, Any]:
        self._fs.invalidate_cache()
        entry: Mapping[str, Any] = self._fs.info(self._root + name)
        return entry

    def _read(self, name: str) -> bytes | None:
        with remote_errors(f"{self.address}/{name}", self.url):
            try:
                content: bytes = self._fs.cat_file(self._root + name, start=0, end=_LIMIT_NBYTES)
            except FileNotFoundError:
                return None
        if len(content) >= _LIMIT_NBYTES:
            raise RemoteError(f"{self.address}/{name}: expected less than {_LIMIT_NBYTES} bytes, found more")
        return content

    def _sizes(self) -> dict[str, tuple[int, str]]:
        with remote_errors(self.address, self.url):
            self._fs.invalidate_cache()
            entries = self._fs.find(self._root.rstrip("/"), detail=True)
        return {
            path.removeprefix(self._root): (int(entry["size"]), self.reported(entry))
            for path, entry in entries.items()
            if path.startswith(self._root)
        }

    def _names(self, prefix: str) -> set[str]:
        with remote_errors(f"{self.address}/{prefix}", self.url):
            self._fs.invalidate_cache()
            paths = self._fs.find(self._root + prefix)
        return {path.removeprefix(self._root) for path in paths}


def _md5(content: Content) -> bytes:
    if isinstance(content, bytes):
        return md5(content, usedforsecurity=False).digest()
    with content.open("rb") as file:
        return file_digest(file, lambda: md5(usedforsecurity=False)).digest()


def _is_taken(error: BaseException | None) -> bool:
    """Return whether a driver says that an object of this name exists: some servers' answers only by their code."""
    while error is not None:
        if isinstance(error, FileExistsError):
            return True
        response = getattr(error, "response", None)
        if isinstance(response, Mapping) and response.get("Error", {}).get("Code") in _TAKEN_CODES:
            return True
        error = error.__cause__
    return False


def _write_local(path: Path, content: Content, *, replace: bool) -> None:
    """Write a file in one step: fsspec's driver for local files would show a part of it, and look before it writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{durable.TEMPORARY}")
    durable.write_file(draft, [content if isinstance(content, bytes) else content.read_bytes()])
    try:
        if replace:
            durable.rename(draft, path)
        else:
            os.link(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            durable.unlink(draft)
    durable.sync_folder(path.parent)
