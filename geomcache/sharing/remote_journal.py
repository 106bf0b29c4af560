"""The journal of a cache that is made at an address: an object for each line, and what an address holds in which state.

Line N of the journal is the object `journal/N.json`, created only if there is none. When the cache is sealed, the lines
together become `journal.jsonl`, as in every cache, and the objects are removed. A cache that is extended has both: the
objects continue where `journal.jsonl` ends.

    zarr.json      manifest.json     lease/      the address holds
    ---------      -------------     ------      -----------------
    no             no                no          nothing
    any            no                yes         a cache that `extract` makes or made: run it again to finish it
    yes            yes               no          a sealed cache
    yes            yes               yes         a sealed cache, which a driver is about to extend, or has just sealed
    yes            no                no          what an interrupted `push` left
"""

import re
from collections.abc import Collection
from pathlib import Path

from geomcache.cache.header import GROUP
from geomcache.cache.inventory import CONTROL_LIMITS
from geomcache.cache.journal import decode_line
from geomcache.cache.manifest import JOURNAL, MANIFEST
from geomcache.errors import CacheCorruptError
from geomcache.sharing import lease
from geomcache.sharing.base import in_parallel, retried
from geomcache.sharing.object_store import FsspecRemote

FOLDER = "journal"
_LINE_NBYTES = 16 << 20
_NAME = re.compile(rf"{FOLDER}/(0|[1-9][0-9]*)\.json")


def line_name(number: int) -> str:
    """Return the name of the object that has this line."""
    return f"{FOLDER}/{number}.json"


def is_begun(names: Collection[str]) -> bool:
    """Return whether the names of the objects at an address are those of a cache that has a journal."""
    return GROUP in names and (JOURNAL in names or line_name(0) in names)


def is_unfinished(names: Collection[str]) -> bool:
    """Return whether the names are those of a cache that `extract` has not sealed."""
    return MANIFEST not in names and lease.newest({*names}) > 0


def fetch_journal(remote: FsspecRemote, names: Collection[str], folder: Path) -> int:
    """Put the journal of an address together, as ``journal.jsonl`` in a folder, and return how many lines it has.

    Args:
        remote: the address.
        names: of its objects.
        folder: has what this needs of the cache's other files already.

    Raises:
        CacheCorruptError: lines are missing.
        RemoteError: the remote refuses, or the connection fails.
    """
    path = folder / JOURNAL
    if JOURNAL in names:
        retried(lambda: remote.fetch(JOURNAL, CONTROL_LIMITS[JOURNAL], folder))
    else:
        path.write_bytes(b"")
    lines = path.read_bytes().splitlines(keepends=True)
    numbers = {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    new = sorted(number for number in numbers if number >= len(lines))
    if new != [*range(len(lines), len(lines) + len(new))]:
        raise CacheCorruptError(
            f"{remote.address}/{FOLDER}: expected lines {len(lines)} to {new[-1]}, found {len(new)} of them: objects"
            " were removed; make the cache again with `geomcache extract --overwrite`"
        )
    in_parallel(lambda number: retried(lambda: remote.fetch(line_name(number), _LINE_NBYTES, folder)), new)
    with path.open("ab") as file:
        for number in new:
            name = line_name(number)
            line = (folder / name).read_bytes()
            if decode_line(line) is None:
                raise CacheCorruptError(
                    f"{remote.address}/{name}: expected a line with its checksum, found other bytes: something else"
                    " wrote it; make the cache again with `geomcache extract --overwrite`"
                )
            file.write(line)
            (folder / name).unlink()
    if (folder / FOLDER).exists():
        (folder / FOLDER).rmdir()
    return len(lines) + len(new)
