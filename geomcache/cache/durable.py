"""The file operations of writing, in one place: durable and atomic.

What geomcache changes in a cache goes through the primitives at the top (the exception is zarr's creation of metadata,
in a temporary folder that is synchronised as a whole). A test that injects faults replaces them here.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import GeomcacheError, OutOfSpaceError

TEMPORARY = ".tmp"  # ends the name of every file that is not yet in its place

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h
_WITHOUT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_WITHOUT_LINKS = {
    *(errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP),
}


def open_file(path: Path, flags: int) -> int:
    """Return a descriptor for writing a file, opened with ``O_WRONLY`` and `flags`. Links are not followed."""
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)


def write(descriptor: int, data: memoryview) -> int:
    """Write some of the bytes and return how many."""
    return os.write(descriptor, data)


def fsync(descriptor: int) -> None:
    """Make a file's content, or a folder's names, durable."""
    os.fsync(descriptor)


def truncate(descriptor: int, length: int) -> None:
    """Cut a file off."""
    os.ftruncate(descriptor, length)


def rename(source: Path, target: Path) -> None:
    """Move a file or folder to its place. A file there is replaced; a folder there that is not empty is an OSError."""
    source.rename(target)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders at once. Return False if the system or file system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _WITHOUT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def link(source: Path, target: Path) -> bool:
    """Give a file a second name. Return False if the file system cannot, or the file has as many as it can have."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno in _WITHOUT_LINKS:
            return False
        raise
    return True


def unlink(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a folder with everything in it; links are not followed."""
    shutil.rmtree(path)


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """Return Linux's system call of this name; None where the C library has none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError without one, and turn a full disk into its own error.

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
                " again to resume"
            ) from error
        if error.filename is None and error.errno is not None:  # another library's may have a text alone
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def synchronised(descriptor: int) -> Iterator[int]:
    """Yield a descriptor; make durable what was done with it, and close it in any case."""
    try:
        yield descriptor
        fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | NDArray[np.uint8]) -> None:
    """Write all bytes, in as many writes as it takes."""
    rest = memoryview(data).cast("B")
    while rest:
        written = write(descriptor, rest)
        if written == 0:
            raise OSError(errno.EIO, "a write of nothing")
        rest = rest[written:]


def write_file(path: Path, parts: Iterable[bytes | NDArray[np.uint8]]) -> tuple[int, bytes]:
    """Write a new file and make its content durable, though not its name; return its size and sha256.

    A file or link of this name is removed first: it is stale, or somebody planted it.
    """
    digest, nbytes = hashlib.sha256(), 0
    with file_errors(path), synchronised(_create(path)) as descriptor:
        for part in parts:
            digest.update(part)
            write_all(descriptor, part)
            nbytes += memoryview(part).nbytes
    return nbytes, digest.digest()


def link_or_copy(source: Path, target: Path) -> None:
    """Make a file of the same content: a second name of the same one where the file system can, otherwise a copy.

    A file or link of the target's name is removed first. A copy is durable, though not its name.
    """
    with file_errors(target), contextlib.suppress(FileNotFoundError):
        unlink(target)
    with file_errors(target):
        if source.is_symlink() or not link(source, target):
            write_file(target, [source.read_bytes()])


def _create(path: Path) -> int:
    """Create a file that was not there, which no link can lead elsewhere, and return a descriptor for writing."""
    try:
        return open_file(path, os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        unlink(path)
        return open_file(path, os.O_CREAT | os.O_EXCL)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    with file_errors(path), synchronised(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)):
        pass


def sync_tree(path: Path, *, locked: str) -> None:
    """Make a whole folder durable except the file `locked`: closing a second descriptor would end its locks."""
    for folder, _, names in os.walk(path):
        for name in sorted({*names} - {locked}):
            file = Path(folder, name)
            with file_errors(file), synchronised(open_file(file, 0)):
                pass
        sync_folder(Path(folder))


def temporary(path: Path) -> Path:
    """Return the name that a file has until its content is complete."""
    return path.with_name(path.name + TEMPORARY)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file: also after a crash it has its old content or the new one."""
    write_file(temporary(path), [content])
    with file_errors(path):
        rename(temporary(path), path)
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new, empty file to be written by its name, which replaces `path` when the block ends well.

    For writers that take a path, such as Pillow's and PyAV's: the new file has the suffix of `path`. It is removed when
    the block fails. It is not synchronised to the disk.
    """
    draft = path.with_name(f".{path.stem}{TEMPORARY}{path.suffix}")
    with file_errors(path):
        os.close(_create(draft))
        try:
            yield draft
            rename(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):  # what failed is raised
                unlink(draft)
            raise
