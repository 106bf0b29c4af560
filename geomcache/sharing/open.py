"""Open the remote that an address names."""

import contextlib
from collections.abc import Iterator

from geomcache.errors import UserInputError
from geomcache.sharing.base import HUB_SCHEME, Remote, is_remote, without_secrets


@contextlib.contextmanager
def open_remote(address: str, revision: str | None = None) -> Iterator[Remote]:
    """The place of this address. Nothing is asked of it yet.

    Raises:
        UserInputError: the address is none, or cannot have a revision.
        RemoteError: the package that speaks to such places is missing.
    """
    if not is_remote(address):
        raise UserInputError(
            f"{address}: expected an address such as hf://datasets/owner/name or s3://bucket/name.zarr, got a path: to"
            " copy a cache on this machine, copy its folder"
        )
    if address.startswith(HUB_SCHEME):
        from geomcache.sharing.hub import HubRemote

        with HubRemote.open(address, revision) as hub:
            yield hub
        return
    if revision is not None:
        raise UserInputError(
            f"--revision: expected none for {without_secrets(address)}, got {revision!r}: leave it out"
        )
    from geomcache.sharing.object_store import FsspecRemote

    yield FsspecRemote(address)
