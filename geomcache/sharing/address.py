"""Addresses of remotes: told from paths, and shown in messages without what would let others in."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from geomcache.errors import UserInputError, one_line

HUB_SCHEME = "hf://"
_HIDDEN = "..."  # shown instead of all behind the scheme, where a secret's end cannot be told


def is_remote(address: str) -> bool:
    """Return whether this is the address of a remote, such as ``s3://bucket/name``, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*://", address) is not None


def path_or_address(text: str) -> Path | str:
    """Return what was typed as a path, or as it is if it is the address of a remote."""
    return text if is_remote(text) else Path(text)


def public_address(address: str) -> str:
    """Return an address without user name, password, query and fragment.

    Where a raw ``@``, ``/`` or ``?`` in a password makes the parts ambiguous, only the scheme is left.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    parts = _split(rest)
    if parts is None:
        return f"{scheme}://{_HIDDEN}"
    return f"{scheme}://{parts.host}{parts.path}"


def check_address(address: str) -> None:
    """Refuse an address that no driver reads as it was meant, before a driver can repeat a part of it in an error.

    Raises:
        UserInputError: it is a path, a chain of addresses, or has credentials that are not percent-encoded.
    """
    shown = public_address(address)
    if not is_remote(address):
        raise UserInputError(
            f"{shown}: expected an address such as hf://datasets/owner/name or s3://bucket/name.zarr, got a path: to"
            " copy a cache on this machine, copy its folder"
        )
    if "::" in shown.partition("://")[0]:
        raise UserInputError(f"{shown}: expected one address, got a chain of them: leave out what is before '::'")
    if shown.endswith(f"://{_HIDDEN}"):
        raise UserInputError(
            f"{shown}: expected user and password percent-encoded (%40 for @, %2F for /), got an address whose parts"
            " cannot be told apart: encode them, or leave them to the driver's own configuration"
        )


def check_output(address: str) -> None:
    """Refuse an address at which no cache can be made shard by shard.

    Raises:
        UserInputError: as `check_address`, or it is one of the Hub, which has commits instead of conditional writes.
    """
    check_address(address)
    if address.startswith(HUB_SCHEME):
        raise UserInputError(
            f"output: expected a path, or the address of an object store, got {public_address(address)} on the Hub,"
            " which keeps every change for ever: extract to a path, then `geomcache push`"
        )


def without_secrets(text: str, address: str = "") -> str:
    """Return a message without credentials and signatures: those of any address in it, and those of `address`."""
    if address:
        text = text.replace(address, public_address(address))
        for secret in sorted(_secrets(address), key=len, reverse=True):
            text = text.replace(secret, "***")
    return re.sub(r"[A-Za-z][A-Za-z0-9+.:-]*://[^\s'\"()<>]+", lambda match: public_address(match[0]), text)


def reason(error: BaseException, address: str = "") -> str:
    """Return why a driver failed, as part of a one-line message."""
    return without_secrets(one_line(error.__cause__ or error), address)


@dataclass(frozen=True)
class _Parts:
    credentials: str
    host: str
    path: str
    query: str
    fragment: str


def _split(rest: str) -> _Parts | None:
    """Split what is behind ``://``; None where a raw character in a password makes the parts ambiguous."""
    try:
        parts = urlsplit(f"//{rest}")
        parts.port  # noqa: B018 - raises where the text behind ':' is no port: then it is a part of a password
    except ValueError:
        return None
    if ":" in parts.netloc and "@" in parts.path + parts.query + parts.fragment:
        return None
    credentials, _, host = parts.netloc.rpartition("@")
    return _Parts(credentials, host, parts.path, parts.query, parts.fragment)


def _secrets(address: str) -> set[str]:
    """Return the secret texts in an address, as they are written and decoded."""
    parts = _split(address.partition("://")[2])
    if parts is None:
        return set()
    secrets = {parts.credentials, parts.credentials.partition(":")[2], parts.query, parts.fragment} - {""}
    return secrets | {unquote(secret) for secret in secrets}
