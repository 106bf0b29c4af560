"""File operations of writing, in one place: durable, atomic, locked.

What geomcache changes in a cache goes through the primitives at the top (zarr's own creation of metadata, in a
temporary folder that is synchronised as a whole, is the exception). A test that injects faults replaces them here.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import GeomcacheError, OutOfSpaceError

TEMPORARY = ".tmp"  # ends the name of every file that is not yet in its place


def open_file(path: Path, flags: int) -> int:
    """A descriptor for writing, `flags` beside ``O_WRONLY``."""
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o666)


def write(descriptor: int, data: memoryview) -> int:
    """Some of the bytes; how many."""
    return os.write(descriptor, data)


def fsync(descriptor: int) -> None:
    """Down to the disk."""
    os.fsync(descriptor)


def truncate(descriptor: int, length: int) -> None:
    """Cut the file off."""
    os.ftruncate(descriptor, length)


def rename(source: Path, target: Path) -> None:
    """Put a file or folder into its place. Replaces a file; a folder that holds something is an OSError."""
    source.rename(target)


def unlink(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it; links are not followed."""
    shutil.rmtree(path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a failing file operation the file's name, and a full disk its own error.

    Raises:
        OutOfSpaceError: no space, or no quota, is left.
    """
    try:
        yield
    except GeomcacheError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpaceError(
                f"{path}: expected room for it, found none ({error.strerror}): free some, then run the same command"
                " again; it continues after the last shard that was committed"
            ) from error
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_all(descriptor: int, data: bytes | NDArray[np.uint8]) -> None:
    """All bytes, in as many writes as it takes."""
    rest = memoryview(data).cast("B")
    while rest:
        written = write(descriptor, rest)
        if written == 0:
            raise OSError(errno.EIO, "a write of nothing")
        rest = rest[written:]


def write_file(path: Path, parts: Sequence[bytes | NDArray[np.uint8]]) -> tuple[int, bytes]:
    """A new file, durable but for its name; the bytes and sha256 of its content."""
    digest, nbytes = hashlib.sha256(), 0
    with naming(path):
        descriptor = open_file(path, os.O_CREAT | os.O_TRUNC)
        try:
            for part in parts:
                digest.update(part)
                write_all(descriptor, part)
                nbytes += memoryview(part).nbytes
            fsync(descriptor)
        finally:
            os.close(descriptor)
    return nbytes, digest.digest()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(path: Path, *, locked: str) -> None:
    """Make a whole folder durable, but for the file `locked`: its locks would end with a second descriptor's."""
    for folder, _, names in os.walk(path):
        for name in sorted({*names} - {locked}):
            file = Path(folder, name)
            with naming(file):
                descriptor = open_file(file, 0)
                try:
                    fsync(descriptor)
                finally:
                    os.close(descriptor)
        sync_folder(Path(folder))


def temporary(path: Path) -> Path:
    """Where the content of a file is written before it is renamed."""
    return path.with_name(path.name + TEMPORARY)


def replace_file(path: Path, content: bytes) -> None:
    """Old content or new content, also after a crash."""
    write_file(temporary(path), [content])
    with naming(path):
        rename(temporary(path), path)
    sync_folder(path.parent)
