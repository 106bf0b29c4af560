"""Open the remote that an address names."""

from geomcache.errors import UserInputError
from geomcache.sharing.address import HUB_SCHEME, check_address, public_address
from geomcache.sharing.object_store import FsspecRemote


def open_remote(address: str, revision: str | None = None) -> FsspecRemote:
    """Open a remote. It is not contacted yet.

    Raises:
        UserInputError: the address cannot be used, or cannot have a revision.
        RemoteError: the package that speaks to such remotes is missing.
    """
    check_address(address)
    if address.startswith(HUB_SCHEME):
        from geomcache.sharing.hub import HubRemote

        return HubRemote(address, revision)
    if revision is not None:
        raise UserInputError(f"--revision: expected none for {public_address(address)}, got {revision!r}: leave it out")
    return FsspecRemote(address.rstrip("/"))
