"""Servers on loopback that stand for what is elsewhere: S3 by moto, and a way to it that can be cut."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from importlib import import_module

import pytest


class Wire:
    """A way to a server: a port that passes everything on until so many bytes have come back, then breaks for good.

    What a broken cable looks like to a client: connections end in the middle, and new ones end at once.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._left: int | None = None
        self._once = False
        self._guard = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0
        """Connections that were broken."""
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, nbytes: int, *, once: bool = False) -> None:
        """Break once the server has sent so many bytes more: for good, or that one connection alone."""
        with self._guard:
            self._left, self._once = nbytes, once

    def mend(self) -> None:
        """Pass everything on again."""
        with self._guard:
            self._left = None

    def close(self) -> None:
        self._listener.close()
        with self._guard:
            for each in self._sockets:
                each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._guard:
            broken = self._left is not None and self._left <= 0
            self.cuts += broken
        if broken:
            client.close()
            return
        server = socket.create_connection(("127.0.0.1", self._upstream))
        with self._guard:
            self._sockets |= {client, server}
        forth = threading.Thread(target=self._pass_on, args=(client, server, False), daemon=True)
        forth.start()
        self._pass_on(server, client, True)
        forth.join()
        for each in (client, server):
            each.close()
        with self._guard:
            self._sockets -= {client, server}

    def _pass_on(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(4096):
                with self._guard:
                    if self._left is not None:
                        if counted:
                            block, self._left = block[: max(0, self._left)], self._left - len(block)
                        if self._left <= 0:
                            self.cuts += 1
                            if self._once:
                                self._left = None
                            with contextlib.suppress(OSError):
                                target.sendall(block)
                            break
                target.sendall(block)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def s3_wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """An S3 server with the bucket ``bucket``, which s3fs finds by its environment, behind a wire."""
    import fsspec.config
    from moto.server import ThreadedMotoServer

    s3fs = import_module("s3fs").S3FileSystem  # neither has types
    new_session = import_module("botocore.session").get_session

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    wire = Wire(server.get_host_and_port()[1])
    url = f"http://127.0.0.1:{wire.port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "made-up-id",
        "AWS_SECRET_ACCESS_KEY": "made-up-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_CONFIG_FILE": "nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    # one attempt each of botocore and s3fs, so that a connection that was cut for good is told at once
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"max_attempts": 0}}})
    monkeypatch.setattr(s3fs, "retries", 1)
    s3fs.clear_instance_cache()
    client = new_session().create_client("s3", endpoint_url=f"http://127.0.0.1:{wire.port}")
    client.create_bucket(Bucket="bucket")
    client.close()
    yield wire
    s3fs.clear_instance_cache()
    wire.close()
    server.stop()
