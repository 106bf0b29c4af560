"""The thread that writes shards: order, errors, and a line if it cannot go on."""

import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from geomcache.cache.signatures import Signatures
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.pipeline import writer_thread
from geomcache.pipeline.writer_thread import ShardWriterThread
from tests.support.logs import logged_lines


class Writer:
    """Keeps what is committed; waits in `commit` until it may go on."""

    def __init__(self) -> None:
        self.path, self.spec = Path("cache.zarr"), SimpleNamespace(camera_keys=("a", "b"))
        self.committed: list[tuple[int, Any]] = []
        self.signatures: list[Signatures] = []
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()
        self.error: Exception | None = None

    def commit(self, claim: Claim, maps: Any, signatures: Signatures) -> int:
        self.began.set()
        self.may_go_on.wait()
        if self.error is not None:
            raise self.error
        self.committed.append((claim.shard, maps))
        self.signatures.append(signatures)
        return 10


def maps(first: int, count: int) -> dict[str, Any]:
    """Of two views; every number is its row's, and 100 more in the second view."""
    rows = np.arange(first, first + count, dtype=np.float16)
    return {"ray_conf": np.stack([rows, rows + 100], axis=1)[:, :, None, None]}


def rows(first: int, count: int) -> tuple[dict[str, Any], Signatures]:
    """Their maps, and signatures whose numbers are the rows."""
    signatures = Signatures.empty(count, 2)
    signatures.hashes[:] = signatures.means[..., 0, 0, 0] = np.arange(first, first + count)[:, None]
    return maps(first, count), signatures


def thread(writer: Writer) -> ShardWriterThread:
    return ShardWriterThread(cast("StoreWriter", writer))


def test_batches_become_shards_of_each_camera() -> None:
    writer = Writer()
    with thread(writer) as writing:
        writing.expect(Claim(3, ((0, 2), (4, 7))))
        writing.expect(Claim(5, ((10, 12),)))
        for batch in (rows(0, 2), rows(4, 1), rows(5, 2), rows(10, 2)):
            writing.put(*batch)
    assert [shard for shard, _ in writer.committed] == [3, 5]
    first = writer.committed[0][1]
    assert first["a"]["ray_conf"].ravel().tolist() == [0, 1, 4, 5, 6]
    assert first["b"]["ray_conf"].ravel().tolist() == [100, 101, 104, 105, 106]
    assert [each.hashes[:, 1].tolist() for each in writer.signatures] == [[0, 1, 4, 5, 6], [10, 11]]
    assert [each.means[:, 1, 0, 0, 0].tolist() for each in writer.signatures] == [[0, 1, 4, 5, 6], [10, 11]]
    assert (writing.frames_written, writing.shards_written, writing.nbytes_written) == (7, 2, 20)


def test_an_error_of_the_thread_is_raised_in_the_callers() -> None:
    writer = Writer()
    writer.error = OSError(28, "No space left on device")

    def write() -> None:
        with thread(writer) as writing:
            writing.expect(Claim(0, ((0, 1),)))
            for row in range(100):
                writing.put(*rows(row, 1))

    with pytest.raises(OSError, match="No space left"):
        write()


def test_what_is_incomplete_is_dropped_with_the_callers_error() -> None:
    writer = Writer()

    def write() -> None:
        with thread(writer) as writing:
            writing.expect(Claim(0, ((0, 2),)))
            writing.put(*rows(0, 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert writer.committed == []


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_disk_that_is_waited_for_is_named(
    monkeypatch: pytest.MonkeyPatch, error: type[ZeroDivisionError] | None
) -> None:
    """At the end, and after an error elsewhere."""
    monkeypatch.setattr(writer_thread, "WAIT_LINE_S", 0.3)
    writer = Writer()
    writer.may_go_on.clear()
    threading.Timer(1.0, writer.may_go_on.set).start()
    with logged_lines() as lines, nullcontext() if error is None else pytest.raises(error), thread(writer) as writing:
        writing.expect(Claim(7, ((0, 1),)))
        writing.put(*rows(0, 1))
        assert writer.began.wait(10)
        if error is not None:
            raise error
    assert lines
    assert all(line.startswith("cache.zarr: ") and "shard 7" in line for line in lines)
    assert [shard for shard, _ in writer.committed] == [7]
