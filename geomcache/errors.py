"""Domain errors: what a user's mistake, a damaged file or a wrong pair looks like.

Each error also inherits the builtin that a caller would catch. A message is one line that names the thing, what was
expected, what was found, and what to do next; the command line prints it alone and leaves with exit code 2.
"""

import difflib
from collections.abc import Iterable

_CAMERA_PREFIX = "observation.images."  # LeRobot's, of most cameras; it would make all keys look alike


class GeomcacheError(Exception):
    """Base of all errors that geomcache raises on purpose."""


class UserInputError(GeomcacheError, ValueError):
    """An option or argument that cannot be used."""


class ModelError(GeomcacheError, ValueError):
    """A model that is unknown, a DA3 without ray head, or weights, DA3's or a policy's, that are missing or unfit."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """A DA3 model whose files cannot be had: no such folder, no such Hub id, or no way to the Hub."""


class GeometryError(GeomcacheError, ValueError):
    """Geometry, or images for it, of the wrong shape, dtype or content."""


class NonFiniteGeometryError(GeometryError):
    """The encoder gave NaN.

    Attributes:
        places: (batch position, view, output name) of every offending map.
    """

    def __init__(self, message: str, places: tuple[tuple[int, int, str], ...]) -> None:
        super().__init__(message)
        self.places = places


class EncoderMemoryError(GeomcacheError, MemoryError):
    """The encoder finds no memory, even for one frame at a time."""


class WorkerDiedError(GeomcacheError, RuntimeError):
    """A decoding process ended before its work did: killed, or crashed."""


class DatasetError(GeomcacheError, ValueError):
    """A dataset that is none, has another format version, or lacks what was asked for."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """A dataset folder or Hub dataset that is not there."""


class FrameDecodeError(DatasetError):
    """A frame that cannot be decoded, or whose time stamp is not the one asked for."""


class CacheError(GeomcacheError):
    """Base of everything that can be wrong with a cache."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """There is no cache at this path."""


class CacheExistsError(CacheError, FileExistsError):
    """The output path holds something else than the cache that was asked for."""


class CacheFormatError(CacheError, ValueError):
    """The path is no geomcache store, its metadata is malformed, or a newer version wrote it."""


class CacheMismatchError(CacheError, ValueError):
    """Cache and run differ in a field that must agree.

    Attributes:
        field: dotted name of the first field that differs, such as ``spec.process_res``.
        cached: its value in the cache.
        wanted: its value in the run.
    """

    def __init__(self, message: str, field: str, cached: object, wanted: object) -> None:
        super().__init__(message)
        self.field = field
        self.cached = cached
        self.wanted = wanted


class CacheIncompleteError(CacheError, RuntimeError):
    """The cache is not sealed, or lacks episodes that the run needs."""


class CacheCorruptError(CacheError, OSError):
    """Bytes on disk are not those that were written."""


class MissingFrameError(CacheError, LookupError):
    """A frame that is not in the cache. Missing rows are never read as zeros."""


class CacheLockedError(CacheError, OSError):
    """The file system offers no POSIX locks, or another process holds what this one needs."""


class OutOfSpaceError(CacheError, OSError):
    """The file system has, or will have, no room for the cache."""


class RemoteError(CacheError, OSError):
    """A place elsewhere (the Hub, an object store) that cannot be used, or refuses what was asked of it."""


class ConnectionFailedError(RemoteError, ConnectionError):
    """A transfer that failed on its way: the same, tried again later, may succeed."""


class SimulatorError(GeomcacheError, RuntimeError):
    """The simulator cannot be started: it, its assets, or a library that it renders with, is missing."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean X? ``, X the known name nearest to an unknown one in any case; nothing where none is near."""
    spellings = {each.removeprefix(_CAMERA_PREFIX).casefold(): each for each in known}
    near = difflib.get_close_matches(name.removeprefix(_CAMERA_PREFIX).casefold(), spellings, n=1)
    return f"did you mean {spellings[near[0]]}? " if near else ""


def one_line(error: BaseException) -> str:
    """Another library's error as part of a one-line message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
