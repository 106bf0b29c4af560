"""A small Hub on loopback: the part of the Hugging Face Hub's protocol that huggingface_hub speaks for a dataset.

Files of models are downloaded from it too; their repositories are put into `Hub.repositories` by a test.

    repositories   POST /api/repos/create    GET /api/datasets/ID[/revision/REV]    POST /api/datasets/ID/branch/NAME
                   GET /api/datasets/ID/refs
    files          GET /api/datasets/ID/tree/REV    HEAD, GET /datasets/ID/resolve/REV/PATH  (large ones by redirect)
    commits        POST .../preupload/REV    POST ID.git/info/lfs/objects/batch    PUT, POST /lfs/OID
                   POST /api/validate-yaml   POST /api/datasets/ID/commit/REV

Not in it: Xet, which the real Hub offers beside LFS; multipart uploads; pages of long listings; rate limits.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

from tests.support.servers import Wire

TOKEN = "hf_made_up_for_tests"
_LARGE = 2048  # bytes from which a file goes by LFS, as do files of the Hub's own list of suffixes


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": []})
    """By branch: its commits, the first without files."""
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By commit: path -> content."""

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        number = len(self.trees)
        oid = hashlib.sha1(f"{branch} {number}".encode()).hexdigest()
        self.trees[oid] = tree
        self.branches[branch].append(oid)
        return oid

    def find(self, revision: str) -> str | None:
        return (
            self.branches[revision][-1] if revision in self.branches else revision if revision in self.trees else None
        )

    def files(self, revision: str = "main") -> dict[str, bytes]:
        oid = self.find(revision)
        assert oid is not None
        return self.trees[oid]


@dataclass
class Hub:
    """What the server holds, and what was asked of it."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Of LFS, by sha256."""
    requests: list[str] = field(default_factory=list)
    """Method and path."""
    failing: list[int] = field(default_factory=list)
    """Status codes that the next downloads answer with."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    guard: threading.Lock

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        with self.guard:
            self.hub.requests.append(f"{self.command} {path}")
            for pattern, method in self.ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    getattr(self, method)(*match.groups(), body=body, query=parse_qs(url.query))
                    return
        self._send(404, {"error": f"no such endpoint: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - http.server's names

    ROUTES = (
        (r"POST /api/repos/create", "_create"),
        (r"POST /api/validate-yaml", "_validate"),
        (r"GET /api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", "_info"),
        (r"GET /api/datasets/([^/]+/[^/]+)/refs", "_refs"),
        (r"GET /api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", "_tree"),
        (r"POST /api/datasets/([^/]+/[^/]+)/branch/(.+)", "_branch"),
        (r"POST /api/datasets/([^/]+/[^/]+)/preupload/(.+)", "_preupload"),
        (r"POST /api/datasets/([^/]+/[^/]+)/commit/(.+)", "_commit"),
        (r"POST /datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "_batch"),
        (r"PUT /lfs/([0-9a-f]{64})", "_upload"),
        (r"POST /lfs/([0-9a-f]{64})", "_verify"),
        (r"(?:GET|HEAD) /lfs/([0-9a-f]{64})", "_download"),
        (r"(?:GET|HEAD) /(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "_resolve"),
    )

    def _create(self, body: bytes, query: Any) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
        elif name in self.hub.repositories:
            self._send(409, {"error": "You already created this dataset repo", "url": self._url(f"datasets/{name}")})
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            repository = self.hub.repositories[name] = Repository(private=bool(private))
            repository.commit("main", {".gitattributes": b"*.bin filter=lfs\n"})
            self._send(200, {"url": self._url(f"datasets/{name}"), "name": name})

    def _validate(self, body: bytes, query: Any) -> None:
        good = json.loads(body)["content"].startswith("---\n")
        self._send(200 if good else 400, {"errors": [], "warnings": []})

    def _info(self, name: str, revision: str | None, body: bytes, query: Any) -> None:
        if (found := self._find(name, revision or "main")) is not None:
            repository, oid = found
            self._send(200, {"id": name, "sha": oid, "private": repository.private, "siblings": []})

    def _refs(self, name: str, body: bytes, query: Any) -> None:
        if (found := self._find(name, "main")) is not None:
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1]}
                for branch, commits in found[0].branches.items()
            ]
            self._send(200, {"branches": branches, "tags": [], "converts": []})

    def _tree(self, name: str, revision: str, folder: str | None, body: bytes, query: Any) -> None:
        if (found := self._find(name, revision)) is not None:
            begin = "" if folder is None else f"{folder}/"
            files = {path: content for path, content in found[0].trees[found[1]].items() if path.startswith(begin)}
            self._send(200, [self._entry(path, content) for path, content in sorted(files.items())])

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
        if len(content) >= _LARGE:
            digest = hashlib.sha256(content).hexdigest()
            entry |= {
                "oid": _git_oid(digest.encode()),
                "lfs": {"oid": digest, "size": len(content), "pointerSize": 130},
            }
        return entry

    def _branch(self, name: str, branch: str, body: bytes, query: Any) -> None:
        if (found := self._find(name, "main")) is not None:
            repository, oid = found
            if branch in repository.branches:
                self._send(409, {"error": "Reference already exists"})
            else:
                repository.branches[branch] = [oid]
                self._send(200, {})

    def _preupload(self, name: str, revision: str, body: bytes, query: Any) -> None:
        if (found := self._find(name, revision, write=True)) is not None:
            there = found[0].trees[found[1]]
            self._send(
                200,
                {
                    "files": [
                        {
                            "path": each["path"],
                            "uploadMode": "lfs" if each["size"] >= _LARGE else "regular",
                            "shouldIgnore": False,
                            "oid": _git_oid(there[each["path"]]) if each["path"] in there else None,
                        }
                        for each in json.loads(body)["files"]
                    ]
                },
            )

    def _batch(self, name: str, body: bytes, query: Any) -> None:
        if self._find(name, "main", write=True) is None:
            return
        objects = []
        for each in json.loads(body)["objects"]:
            href = self._url(f"lfs/{each['oid']}")
            wanted = {"actions": {"upload": {"href": href}, "verify": {"href": href}}}
            objects.append(each | ({} if each["oid"] in self.hub.objects else wanted))
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, body: bytes, query: Any) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.hub.objects[oid] = body
        self._send(200 if good else 422, {})

    def _verify(self, oid: str, body: bytes, query: Any) -> None:
        good = len(self.hub.objects.get(oid, b"")) == json.loads(body)["size"]
        self._send(200 if good else 404, {})

    def _commit(self, name: str, revision: str, body: bytes, query: Any) -> None:
        if (found := self._find(name, revision, write=True)) is None:
            return
        repository, oid = found
        tree = dict(repository.trees[oid])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
        new = repository.commit(revision, tree)
        self._send(200, {"commitUrl": self._url(f"datasets/{name}/commit/{new}"), "commitOid": new})

    def _resolve(self, name: str, revision: str, path: str, body: bytes, query: Any) -> None:
        if (found := self._find(name, revision)) is None:
            return
        repository, oid = found
        content = repository.trees[oid].get(path)
        if self.hub.failing and self.command == "GET":
            self._send(self.hub.failing.pop(), {"error": "made to fail"})
        elif content is None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        elif len(content) < _LARGE:
            self._send(200, content, {"X-Repo-Commit": oid, "ETag": f'"{_git_oid(content)}"'})
        else:
            digest = hashlib.sha256(content).hexdigest()
            self.hub.objects[digest] = content
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": oid}
            elsewhere = self._url(f"lfs/{digest}?signature=secret-of-the-link").replace("127.0.0.1", "localhost")
            self._send(302, b"", linked | {"Location": elsewhere})

    def _download(self, oid: str, body: bytes, query: Any) -> None:
        self._send(200, self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _find(self, name: str, revision: str, *, write: bool = False) -> tuple[Repository, str] | None:
        """Repository and commit; answers itself where they are not to be had."""
        repository = self.hub.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or ((repository.private or write) and not known):
            status = 404 if known else 401
            self._send(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        oid = repository.find(revision)
        if oid is None:
            self._send(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, oid

    def _url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked and status == 200 and self.command == "GET":
            status, data = 206, data[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class HubHere:
    """The server and the wire to it."""

    hub: Hub
    wire: Wire


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubHere]:
    """A Hub that huggingface_hub asks, with a token that may write. Without Xet, so that files go by LFS."""
    held = Hub()
    handler = type("Handler", (_Handler,), {"hub": held, "guard": threading.RLock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wire = Wire(server.server_address[1])
    for name, value in {
        "ENDPOINT": f"http://127.0.0.1:{wire.port}",
        "HUGGINGFACE_CO_URL_TEMPLATE": f"http://127.0.0.1:{wire.port}" + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # between attempts of its own
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda _seconds: None))
    huggingface_hub.close_session()
    yield HubHere(held, wire)
    huggingface_hub.close_session()
    wire.close()
    server.shutdown()
    server.server_close()
