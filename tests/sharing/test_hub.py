"""Caches in a dataset repository, through huggingface_hub's own client and a server that speaks the Hub's protocol."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from geomcache.errors import (
    CacheCorruptError,
    CacheExistsError,
    CacheNotFoundError,
    ConnectionFailedError,
    RemoteError,
    UserInputError,
)
from geomcache.sharing.open import open_remote
from geomcache.sharing.pull import pull
from geomcache.sharing.push import push
from tests.support.hub_server import TOKEN, HubHere, hub
from tests.support.sharing import CONTROL, FILES, RAY, assert_reads, contents, make_small_store, said

__all__ = ["hub", "said"]

# of huggingface_hub's upload by LFS, with httpx 0.28
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

ADDRESS = "hf://datasets/me/made-up"


def files_there(hub: HubHere, revision: str = "main") -> dict[str, bytes]:
    files = hub.hub.repositories["me/made-up"].files(revision)
    return {name: content for name, content in files.items() if name not in ("README.md", ".gitattributes")}


def test_pushed_and_pulled_with_the_connection_cut_once_each(tmp_path: Path, hub: HubHere, said: list[str]) -> None:
    path, target = make_small_store(tmp_path / "here.zarr"), tmp_path / "there.zarr"
    hub.wire.cut_after(2_500)
    with pytest.raises(ConnectionFailedError, match="the same command, given again, goes on from here"):
        push(path, ADDRESS, private=True, say=said.append)
    hub.wire.mend()
    assert "manifest.json" not in files_there(hub)
    assert push(path, ADDRESS, private=True, say=said.append).files == FILES + CONTROL
    repository = hub.hub.repositories["me/made-up"]
    assert repository.private
    assert files_there(hub) == contents(path)
    history = [repository.trees[commit].keys() for commit in repository.branches["main"]]
    assert ["manifest.json" in tree for tree in history] == [False] * (len(history) - 1) + [True]
    assert b"geomcache train --cache hf://datasets/me/made-up" in repository.files()["README.md"]
    asked = " ".join(hub.hub.requests)
    for part in ("/api/repos/create", "/preupload/main", "/lfs/objects/batch", "PUT /lfs/", "/commit/main", "/tree/"):
        assert part in asked

    before = len(history)
    assert push(path, ADDRESS, verify=True, say=said.append).sent == 0
    assert len(repository.branches["main"]) == before

    hub.wire.cut_after(40_000)
    with pytest.raises(ConnectionFailedError, match="the same command, given again, goes on from here"):
        pull(ADDRESS, target, say=said.append)
    assert not target.exists()
    hub.wire.mend()
    report = pull("hf://me/made-up", target, say=said.append)
    assert 0 < report.fetched < FILES
    assert contents(target) == contents(path)
    assert_reads(target, list(range(90)))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["here.zarr", "there.zarr"]
    assert not any(secret in line for secret in (TOKEN, "secret-of-the-link") for line in said)


def test_a_passing_failure_is_tried_again(tmp_path: Path, hub: HubHere, said: list[str]) -> None:
    push(make_small_store(tmp_path / "here.zarr"), ADDRESS, say=said.append)
    hub.hub.failing = [503]
    assert pull(ADDRESS, tmp_path / "there.zarr", episodes="0", say=said.append).frames == 32


def test_a_revision_is_a_branch_and_is_pinned(tmp_path: Path, hub: HubHere, said: list[str]) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    push(path, ADDRESS, revision="second", say=said.append)
    assert files_there(hub) == {}
    assert files_there(hub, "second") == contents(path)
    pull(f"{ADDRESS}@second", tmp_path / "there.zarr", say=said.append)
    assert contents(tmp_path / "there.zarr") == contents(path)
    with open_remote(ADDRESS, "second") as place:
        place.listing()
        repository = hub.hub.repositories["me/made-up"]
        repository.commit("second", {})
        assert place.read("zarr.json", 1 << 20) == (path / "zarr.json").read_bytes()
    with pytest.raises(RemoteError, match="expected this revision, found that the repository has none such"):
        pull(ADDRESS, tmp_path / "none.zarr", revision="third", say=said.append)


def test_a_file_that_is_not_the_manifests_is_refused_by_name(tmp_path: Path, hub: HubHere, said: list[str]) -> None:
    push(make_small_store(tmp_path / "here.zarr"), ADDRESS, say=said.append)
    repository = hub.hub.repositories["me/made-up"]
    name = f"{RAY}/c.1.0.0.0"
    content = repository.files()[name]
    repository.commit("main", repository.files() | {name: content[::-1]})
    with pytest.raises(CacheCorruptError, match=rf"{ADDRESS}/{name}: expected {len(content)} bytes with sha256"):
        pull(ADDRESS, tmp_path / "there.zarr", say=said.append)
    repository.commit("main", repository.files() | {name: content + b"more"})
    with pytest.raises(RemoteError, match=rf"{name}: expected {len(content)} bytes at most, found {len(content) + 4}"):
        pull(ADDRESS, tmp_path / "there.zarr", say=said.append)
    assert push(tmp_path / "here.zarr", ADDRESS, say=said.append).sent == 1
    assert files_there(hub) == contents(tmp_path / "here.zarr")


def test_another_cache_there_is_replaced_only_when_asked(tmp_path: Path, hub: HubHere, said: list[str]) -> None:
    whole = make_small_store(tmp_path / "whole.zarr")
    part = make_small_store(tmp_path / "part.zarr", [(0, 20)])
    push(whole, ADDRESS, say=said.append)
    with pytest.raises(CacheExistsError, match=r"expected no frames that .*part.zarr lacks, found 70"):
        push(part, ADDRESS, say=said.append)
    push(part, ADDRESS, overwrite=True, say=said.append)
    assert files_there(hub) == contents(part)


def test_a_private_repository_without_access_names_the_login(
    tmp_path: Path, hub: HubHere, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    push(path, ADDRESS, private=True, say=said.append)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    messages = []
    for attempt in (
        lambda: pull(ADDRESS, tmp_path / "there.zarr", say=said.append),
        lambda: push(path, ADDRESS, say=said.append),
        lambda: push(path, "hf://datasets/me/new", say=said.append),
    ):
        with pytest.raises(RemoteError, match="hf auth login") as raised:
            attempt()
        messages.append(str(raised.value))
    assert not any("\n" in message or "hf_of_somebody_else" in message for message in messages)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match="found HF_HUB_OFFLINE set: unset it"):
        pull(ADDRESS, tmp_path / "there.zarr", say=said.append)


def test_what_is_asked_wrongly_is_told(tmp_path: Path, hub: HubHere, said: list[str]) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    for address in ("hf://name", "hf://models/me/name/more", "hf://datasets/me/.."):
        with pytest.raises(UserInputError, match="hf://"):
            push(path, address, say=said.append)
    with pytest.raises(UserInputError, match="--revision: expected one, as"):
        pull(f"{ADDRESS}@one", tmp_path / "there.zarr", revision="two", say=said.append)
    push(path, ADDRESS, say=said.append)
    with pytest.raises(UserInputError, match="--private: expected a private repository, found a public one"):
        push(path, ADDRESS, private=True, say=said.append)
    hub.hub.repositories["me/made-up"].commit("main", {"README.md": b"nothing else"})
    with pytest.raises(CacheNotFoundError, match=r"expected a cache, found no zarr.json"):
        pull(ADDRESS, tmp_path / "there.zarr", say=said.append)
