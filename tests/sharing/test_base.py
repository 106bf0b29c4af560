"""Trying again, doing many things at a time, and messages without secrets."""

import threading
from collections.abc import Callable

import pytest

from geomcache.errors import ConnectionFailedError, RemoteError
from geomcache.sharing import base as remote
from geomcache.sharing.base import IN_PARALLEL, Patience, in_parallel, is_remote, without_secrets


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(remote, "sleep", pauses.append)
    return pauses


def failing(times: int, error: Exception) -> Callable[[], int]:
    left = [times]

    def operation() -> int:
        if left[0]:
            left[0] -= 1
            raise error
        return 7

    return operation


def test_a_connection_error_is_tried_again_with_longer_waits(waits: list[float]) -> None:
    said: list[str] = []
    assert Patience(said.append)(failing(4, ConnectionFailedError("cut"))) == 7
    assert waits == [1, 2, 4, 8]
    assert said == [f"cut; attempt {n} of 5, again in {wait} s" for n, wait in ((1, 1), (2, 2), (3, 4), (4, 8))]
    with pytest.raises(ConnectionFailedError, match="cut; gave up after 5 attempts: the same command"):
        Patience(said.append)(failing(5, ConnectionFailedError("cut")))


def test_what_stays_is_not_tried_again(waits: list[float]) -> None:
    with pytest.raises(RemoteError, match="no such bucket"):
        Patience(print)(failing(1, RemoteError("no such bucket")))
    assert waits == []


def test_an_outage_that_threads_share_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    insist = Patience(said.append)
    together = threading.Barrier(IN_PARALLEL, timeout=30)
    monkeypatch.setattr(remote, "sleep", lambda _seconds: together.wait())  # until all have failed
    in_parallel(lambda number: insist(failing(1, ConnectionFailedError(f"cut {number}"))), range(IN_PARALLEL))
    assert len(said) == 1
    assert "attempt 1 of 5" in said[0]


def test_the_first_failure_stops_what_has_not_begun() -> None:
    begun: list[int] = []

    def operation(number: int) -> None:
        begun.append(number)
        raise RemoteError(f"{number}")

    with pytest.raises(RemoteError):
        in_parallel(operation, range(10_000))
    assert len(begun) < 10_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://id:secret@host/bucket: no", "s3://host/bucket: no"),
        ("(GET https://host/file?X-Signature=secret&b=1)", "(GET https://host/file)"),
        ("s3://bucket/a@b: what? no", "s3://bucket/a@b: what? no"),
    ],
)
def test_messages_have_no_secrets(text: str, expected: str) -> None:
    assert without_secrets(text) == expected


def test_an_address_is_told_from_a_path() -> None:
    assert [is_remote(text) for text in ("s3://b/c", "hf://a/b", "gs+x://b")] == [True] * 3
    assert not any(is_remote(text) for text in ("cache.zarr", "/data/a:b", "C:\\caches", "./s3:/b", "9://b"))
