"""The options of ``geomcache serve``, checked before the policy is loaded."""

import importlib.util
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from geomcache.errors import UserInputError

ENCRYPTED = ("tls_cert", "tls_key", "tls_client_ca")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `geomcache serve` serves, and to whom.

    Raises:
        UserInputError: an option cannot be used, clients elsewhere would not have to prove who they are, or gRPC is
            not installed.
    """

    policy: Annotated[str, Option(help="A checkpoint, with geometry or plain: a folder or a Hub id.")]
    host: Annotated[str, Option(help="Address to listen on; other than this machine's own only with TLS.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Option(help="Port to listen on; 0 for any free one, which is printed.")] = 8080
    fps: Annotated[float, Option(help="The robot's steps per second: the actions' time stamps are so far apart.")] = (
        30.0
    )
    tls_cert: Annotated[Path | None, Option(help="The server's certificate, PEM.", metavar="FILE")] = None
    tls_key: Annotated[Path | None, Option(help="The key of the server's certificate, PEM.", metavar="FILE")] = None
    tls_client_ca: Annotated[
        Path | None, Option(help="Only clients with a certificate of this authority may connect, PEM.", metavar="FILE")
    ] = None
    lerobot_args: Annotated[
        list[str] | None, Argument(help="Options of the policy.", metavar="--policy.OPTION=VALUE", hidden=True)
    ] = None

    def __post_init__(self) -> None:
        if importlib.util.find_spec("grpc") is None:
            raise UserInputError(
                "serve: expected gRPC, it is not installed: install geomcache with it (pip install 'geomcache[serve]')"
            )
        if not 0 <= self.port <= 65535:
            raise UserInputError(f"--port: expected 0 to 65535, got {self.port}")
        if not 0 < self.fps <= 1000:
            raise UserInputError(f"--fps: expected a positive number up to 1000, got {self.fps:g}")
        given = [name for name in ENCRYPTED if getattr(self, name) is not None]
        missing = ", ".join(f"--{name.replace('_', '-')}" for name in ENCRYPTED if name not in given)
        if given and missing:
            raise UserInputError(f"{missing}: expected with --{given[0].replace('_', '-')}, got none: give all three")
        if not given and not _is_loopback(self.host):
            raise UserInputError(
                f"--host: expected 127.0.0.1 without TLS, got {self.host}: anyone who reaches the port could steer the"
                " robot: keep 127.0.0.1 and connect through `ssh -L`, or give --tls-cert, --tls-key and --tls-client-ca"
            )

    @property
    def encrypted(self) -> bool:
        """Whether clients connect over mutual TLS."""
        return self.tls_cert is not None

    @property
    def address(self) -> str:
        """Host and port, as gRPC takes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
