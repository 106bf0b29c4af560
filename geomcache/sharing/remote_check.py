"""Verify a cache at an address: a shard at a time is on this disk, and never all of them."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import override

from geomcache.cache.check import CacheCheck
from geomcache.cache.header import Header
from geomcache.cache.layout import ShardFiles
from geomcache.cache.verify import VerifyReport, report_of
from geomcache.errors import CacheCorruptError
from geomcache.sharing.address import public_address
from geomcache.sharing.base import errors_name, in_parallel, retried
from geomcache.sharing.limits import MAX_TABLE_NBYTES, fetch_state
from geomcache.sharing.object_store import FsspecRemote
from geomcache.sharing.open import open_remote


def verify_address(address: str) -> VerifyReport:
    """Compare everything in a cache at an address with what was written, as `cache.verify` does on a disk.

    Raises:
        CacheNotFoundError, CacheIncompleteError, CacheFormatError, CacheCorruptError: there is no cache, or what
            describes it is damaged.
        RemoteError: the remote refuses, or the connection fails again and again.
    """
    remote, shown = open_remote(address), public_address(address)
    with tempfile.TemporaryDirectory(prefix="geomcache-") as name, errors_name(shown, Path(name)):
        folder = Path(name)
        fetch_state(remote, folder)
        check = _RemoteCheck(remote, folder)
        check.run()
    check.problems = [
        dataclasses.replace(problem, message=problem.message.replace(str(folder), shown)) for problem in check.problems
    ]
    remedy = (
        "to repair what can be repaired: remove the objects of shards that are named above, and run the extract command"
        " that made the cache again, which makes these shards again"
    )
    return report_of(check, shown, (remedy,) if any(problem.shard is not None for problem in check.problems) else ())


class _RemoteCheck(CacheCheck):
    """A check of a cache whose shards are at an address, and whose small files are in a folder."""

    def __init__(self, remote: FsspecRemote, folder: Path) -> None:
        super().__init__(folder)
        self._remote = remote

    @override
    def run(self, share: slice = slice(None)) -> None:
        in_parallel(lambda name: self._fetch(name, MAX_TABLE_NBYTES), [*Header.read(self.folder).chunks()])
        super().run(share)

    @override
    @contextlib.contextmanager
    def _present(self, names: Sequence[str], written: ShardFiles) -> Iterator[None]:
        sizes = dict(zip(names, written.sizes, strict=True))
        in_parallel(lambda name: self._fetch(name, sizes[name]), names)
        yield
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _fetch(self, name: str, limit: int) -> None:
        with contextlib.suppress(CacheCorruptError):  # it is longer, and so is what is here now: the check says so
            retried(lambda: self._remote.fetch(name, limit, self.folder))
