"""Errors that geomcache raises on purpose: for a user's mistake, a damaged file, or a cache and a run that do not fit.

Each error also inherits the builtin that a caller would catch. A message is one line that names the thing, what was
expected, what was found, and what to do next; the command line prints it alone and exits with code 2.

Errors pickle with their attributes: unpickling calls the class with the message alone, then restores the attributes, so
every other argument of a class has a default.
"""

import contextlib
import copyreg
import difflib
from collections.abc import Iterable, Iterator

_CAMERA_PREFIX = "observation.images."  # LeRobot's, of most cameras; it would make all keys look alike


class GeomcacheError(Exception):
    """Base of all errors that geomcache raises on purpose."""


class UserInputError(GeomcacheError, ValueError):
    """An option or argument that cannot be used."""


class ModelError(GeomcacheError, ValueError):
    """An unknown model, a DA3 without a ray head, or weights of a DA3 or policy that are missing or do not fit."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """A DA3 model without files: no such folder, no such Hub id, or no connection to the Hub."""


class GeometryError(GeomcacheError, ValueError):
    """Geometry, or images for it, of the wrong shape, dtype or content."""


class NonFiniteGeometryError(GeometryError):
    """Geometry with a value that is NaN or infinite.

    Attributes:
        places: (position in the batch, view, output) of every map with such a value.
    """

    def __init__(self, message: str, places: tuple[tuple[int, int, str], ...] = ()) -> None:
        super().__init__(message)
        self.places = places


class EncoderMemoryError(GeomcacheError, MemoryError):
    """Too little memory to encode even one frame at a time."""


class WorkerDiedError(GeomcacheError, RuntimeError):
    """A decoding process that was killed or crashed."""


class DatasetError(GeomcacheError, ValueError):
    """A dataset that is malformed, has another format version, or lacks what was asked for."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """A dataset folder or Hub dataset that does not exist."""


class FrameDecodeError(DatasetError):
    """A frame that cannot be decoded, or whose timestamp is not the one asked for."""


class CacheError(GeomcacheError):
    """Base of all errors about caches."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """A path without a cache."""


class CacheExistsError(CacheError, FileExistsError):
    """An output path that holds something other than the cache asked for."""


class CacheFormatError(CacheError, ValueError):
    """A path that is no cache, or a cache whose metadata is malformed or was written by a newer version."""


class CacheMismatchError(CacheError, ValueError):
    """A cache and a run that differ in a field in which they must agree.

    Attributes:
        field: dotted name of the first field that differs, such as ``spec.process_res``.
        cached: its value in the cache.
        wanted: its value in the run.
    """

    def __init__(self, message: str, field: str = "", cached: object = None, wanted: object = None) -> None:
        super().__init__(message)
        self.field = field
        self.cached = cached
        self.wanted = wanted


class CacheIncompleteError(CacheError, RuntimeError):
    """A cache that is not sealed, or lacks episodes that the run needs."""


class CacheCorruptError(CacheError, OSError):
    """Bytes on disk that differ from those that were written."""


class MissingFrameError(CacheError, LookupError):
    """A frame that the cache lacks. Missing rows are never read as zeros."""


class CacheLockedError(CacheError, OSError):
    """A lock that another process holds, or a file system without POSIX locks."""


class OutOfSpaceError(CacheError, OSError):
    """A file system without room for the cache."""


class RemoteError(CacheError, OSError):
    """A remote (the Hub, an object store) that cannot be used, or refuses a request."""


class ConnectionFailedError(RemoteError, ConnectionError):
    """A transfer that failed on its way, and may succeed when it is retried."""


class ClusterError(GeomcacheError, RuntimeError):
    """A cluster that cannot be reached, has no room, or lost too much of what it was given."""


class SimulatorError(GeomcacheError, RuntimeError):
    """A simulator that cannot be started: it, its assets, or its rendering library is missing."""


class RequestError(GeomcacheError, ValueError):
    """A robot client's message that is not one of LeRobot's, or does not fit the policy."""


class SessionError(GeomcacheError, RuntimeError):
    """A robot client's request out of turn: before its hello, or while another client is connected."""


class _ClassOfOneError(type):
    """A class made for one error: it pickles with the error, and a call of it, whatever the arguments, returns it."""

    error: GeomcacheError

    def __call__(cls, *_arguments: object, **_options: object) -> GeomcacheError:
        return cls.error


def _class_of(error: GeomcacheError) -> _ClassOfOneError:
    return _ClassOfOneError(type(error).__name__, (type(error),), {"error": error})


copyreg.pickle(_ClassOfOneError, lambda made: (_class_of, (made.error,)))


@contextlib.contextmanager
def errors_kept_whole() -> Iterator[None]:
    """Let an error of ours leave a worker process of torch's DataLoader with its message and attributes.

    torch sends an error's class, and its traceback as text, to the main process, and raises there what a call of the
    class with that text returns. So the class is replaced by one whose call returns the error itself.
    """
    try:
        yield
    except GeomcacheError as error:
        raise type.__call__(_class_of(error), *error.args) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean X? ``, where X is the known name that is most like this one, or nothing if none is."""
    spellings = {each.removeprefix(_CAMERA_PREFIX).casefold(): each for each in known}
    near = difflib.get_close_matches(name.removeprefix(_CAMERA_PREFIX).casefold(), spellings, n=1)
    return f"did you mean {spellings[near[0]]}? " if near else ""


def one_line(error: BaseException) -> str:
    """Return the message of another library's error as a part of a one-line message, cut off at 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
