"""Addresses in messages have no secrets, whatever they are made of."""

import pytest

from geomcache.errors import RemoteError, UserInputError
from geomcache.sharing.address import is_remote, public_address, without_secrets
from geomcache.sharing.base import remote_errors
from geomcache.sharing.open import open_remote


def test_an_address_is_told_from_a_path() -> None:
    assert all(is_remote(text) for text in ("s3://b/c", "hf://a/b", "gs+x://b", "simplecache::https://h/x"))
    assert not any(is_remote(text) for text in ("cache.zarr", "/data/a:b", "C:\\caches", "./s3:/b", "9://b", "a::b"))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("hf://datasets/owner/name@main", "hf://datasets/owner/name@main"),
        ("http://host:8080/name.zarr", "http://host:8080/name.zarr"),
        ("s3://id:secret@host/bucket", "s3://host/bucket"),
        ("ftp://alice:p@ss@host/x", "ftp://host/x"),
        ("ftp://alice:p%40ss@host:21/x", "ftp://host:21/x"),
        ("smb://domain;user:pa ss@host/x", "smb://host/x"),
        ("https://host/x?sig=abc def", "https://host/x"),
        ("http://host/x#token=abc", "http://host/x"),
        ("https://host:443/x?sig=ab@cd&b=1", "https://..."),
        ("sftp://bob:se/cret@host/x", "sftp://..."),
        ("sftp://bob:12/cret@host/x", "sftp://..."),
        ("sftp://alice:p@ss/word@host/x", "sftp://..."),
        ("sftp://bob:se?cret@host/x", "sftp://..."),
        ("sftp://bob:12#cret@host/x", "sftp://..."),
        ("simplecache::https://u:p@host/x?token=1", "simplecache::https://host/x"),
        ("/data/cache.zarr", "/data/cache.zarr"),
    ],
)
def test_an_address_is_shown_without_credentials(address: str, shown: str) -> None:
    assert public_address(address) == shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://id:secret@host/bucket: no", "s3://host/bucket: no"),
        ("(GET https://host/file?X-Signature=secret&b=1)", "(GET https://host/file)"),
        ("s3://bucket/a@b: what? no", "s3://bucket/a@b: what? no"),
        ("error at 'https://h/x?X-Amz-Signature=abc&b=1', more", "error at 'https://h/x', more"),
    ],
)
def test_messages_have_no_secrets(text: str, expected: str) -> None:
    assert without_secrets(text) == expected


def test_what_a_driver_repeats_of_an_address_is_taken_out() -> None:
    url = "sftp://bob:se%2Fcret@host/x?token=of-mine"
    for text in (f"cannot open {url}", "login of bob with se/cret failed", "se%2Fcret", "GET /x?token=of-mine"):
        shown = without_secrets(text, url)
        assert not any(secret in shown for secret in ("cret", "of-mine")), shown
        with pytest.raises(RemoteError) as raised, remote_errors("sftp://host/x", url):
            raise OSError(text)
        assert not any(secret in str(raised.value) for secret in ("cret", "of-mine")), raised.value


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("sftp://bob:se/cret@host/x", ("se", "cret")),
        ("sftp://bob:p@ss/word@host/x", ("p@ss", "word")),
        ("simplecache::https://u:secret@host/x", ("secret",)),
        ("hf://user:secret@owner/name", ("secret",)),
    ],
)
def test_an_address_that_no_driver_reads_as_meant_is_refused(address: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserInputError) as raised:
        open_remote(address)
    shown = str(raised.value).partition(": expected")[0]
    assert shown.startswith(address.partition("://")[0])
    assert not any(part in shown for part in parts)
