"""Caches in a dataset repository, through huggingface_hub's own client and a server that speaks the Hub's protocol."""

import pickle
from hashlib import sha256
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

import geomcache
from geomcache.cache.store import GeometryStore
from geomcache.errors import (
    CacheCorruptError,
    CacheExistsError,
    CacheNotFoundError,
    ConnectionFailedError,
    RemoteError,
    UserInputError,
)
from geomcache.sharing import limits
from geomcache.sharing.fetching_store import FetchingGeometryStore, open_for_training
from geomcache.sharing.open import open_remote
from geomcache.sharing.pull import pull
from geomcache.sharing.push import UNSEALED, push
from geomcache.sharing.remote_store import RemoteGeometryStore
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
    with pytest.raises(ConnectionFailedError, match=ADDRESS):
        push(path, ADDRESS, private=True)
    hub.wire.mend()
    assert "manifest.json" not in files_there(hub)
    assert push(path, ADDRESS, private=True).files == FILES + CONTROL
    repository = hub.hub.repositories["me/made-up"]
    assert repository.private
    assert files_there(hub) == contents(path)
    history = [repository.trees[commit].keys() for commit in repository.branches["main"]]
    # the seal is the last but one commit: then what is noted of an unfinished push goes
    assert ["manifest.json" in tree for tree in history] == [False] * (len(history) - 2) + [True] * 2
    assert history[-1] == history[-2] - {UNSEALED}
    assert b"geomcache train --cache hf://datasets/me/made-up" in repository.files()["README.md"]
    asked = " ".join(hub.hub.requests)
    for part in ("/api/repos/create", "/preupload/main", "/lfs/objects/batch", "PUT /lfs/", "/commit/main", "/tree/"):
        assert part in asked

    before = len(history)
    assert push(path, ADDRESS, verify=True).sent == 0
    assert len(repository.branches["main"]) == before

    hub.wire.cut_after(40_000)
    with pytest.raises(ConnectionFailedError, match=ADDRESS):
        pull(ADDRESS, target)
    assert not target.exists()
    hub.wire.mend()
    report = pull("hf://me/made-up", target)
    assert 0 < report.fetched < FILES
    assert contents(target) == contents(path)
    assert_reads(target, list(range(90)))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["here.zarr", "there.zarr"]
    assert not any(secret in line for secret in (TOKEN, "secret-of-the-link") for line in said)


def test_a_passing_failure_is_tried_again(tmp_path: Path, hub: HubHere) -> None:
    push(make_small_store(tmp_path / "here.zarr"), ADDRESS)
    hub.hub.failing = [503]
    assert pull(ADDRESS, tmp_path / "there.zarr", episodes="0").frames == 32


def test_a_revision_is_a_branch_and_is_pinned(tmp_path: Path, hub: HubHere) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    push(path, ADDRESS, revision="second")
    assert files_there(hub) == {}
    assert files_there(hub, "second") == contents(path)
    pull(f"{ADDRESS}@second", tmp_path / "there.zarr")
    assert contents(tmp_path / "there.zarr") == contents(path)
    place = open_remote(ADDRESS, "second")
    place.listing()
    hub.hub.repositories["me/made-up"].commit("second", {})
    assert place.fetch("zarr.json", 1 << 20, tmp_path / "copy")
    assert (tmp_path / "copy" / "zarr.json").read_bytes() == (path / "zarr.json").read_bytes()
    with pytest.raises(RemoteError, match=f"{ADDRESS}@third"):
        pull(ADDRESS, tmp_path / "none.zarr", revision="third")


def test_a_file_that_is_not_the_manifests_is_refused_by_name(tmp_path: Path, hub: HubHere) -> None:
    push(make_small_store(tmp_path / "here.zarr"), ADDRESS)
    repository = hub.hub.repositories["me/made-up"]
    name = f"{RAY}/c.1.0.0.0"
    content = repository.files()[name]
    repository.commit("main", repository.files() | {name: content[::-1]})
    with pytest.raises(
        CacheCorruptError, match=rf"{ADDRESS}/{name}: .* {len(content)} .*{sha256(content).hexdigest()}"
    ):
        pull(ADDRESS, tmp_path / "there.zarr")
    repository.commit("main", repository.files() | {name: content + b"more"})
    with pytest.raises(CacheCorruptError, match=rf"{ADDRESS}/{name}: .* {len(content)} "):
        pull(ADDRESS, tmp_path / "there.zarr")
    assert push(tmp_path / "here.zarr", ADDRESS).sent == 1
    assert files_there(hub) == contents(tmp_path / "here.zarr")


def test_another_cache_there_is_replaced_only_when_asked(tmp_path: Path, hub: HubHere) -> None:
    whole = make_small_store(tmp_path / "whole.zarr")
    part = make_small_store(tmp_path / "part.zarr", [(0, 20)])
    push(whole, ADDRESS)
    with pytest.raises(CacheExistsError, match=r"part.zarr .* 70: .*--overwrite"):
        push(part, ADDRESS)
    push(part, ADDRESS, overwrite=True)
    assert files_there(hub) == contents(part)


def test_a_private_repository_without_access_names_the_login(
    tmp_path: Path, hub: HubHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    push(path, ADDRESS, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    messages = []
    for attempt in (
        lambda: pull(ADDRESS, tmp_path / "there.zarr"),
        lambda: push(path, ADDRESS),
        lambda: push(path, "hf://datasets/me/new"),
    ):
        with pytest.raises(RemoteError, match="hf auth login") as raised:
            attempt()
        messages.append(str(raised.value))
    assert not any("\n" in message or "hf_of_somebody_else" in message for message in messages)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match="HF_HUB_OFFLINE"):
        pull(ADDRESS, tmp_path / "there.zarr")


def test_what_is_asked_wrongly_is_told(tmp_path: Path, hub: HubHere) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    for address in ("hf://name", "hf://models/me/name/more"):
        with pytest.raises(UserInputError, match=address):
            push(path, address)
    with pytest.raises(RemoteError, match=r"hf://datasets/me/\.\.: "):
        push(path, "hf://datasets/me/..")
    with pytest.raises(UserInputError, match=f"--revision: .*one.*{ADDRESS}@one.*two"):
        pull(f"{ADDRESS}@one", tmp_path / "there.zarr", revision="two")
    push(path, ADDRESS)
    with pytest.raises(UserInputError, match=f"{ADDRESS}: .*--private"):
        push(path, ADDRESS, private=True)
    hub.hub.repositories["me/made-up"].commit("main", {"README.md": b"nothing else"})
    with pytest.raises(CacheNotFoundError, match=rf"{ADDRESS}: .*zarr.json"):
        pull(ADDRESS, tmp_path / "there.zarr")


def test_a_cache_with_too_many_files_in_a_folder_is_refused_before_a_repository_is_made(
    tmp_path: Path, hub: HubHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    monkeypatch.setattr(limits, "HUB_FOLDER_ENTRIES", 8)  # seven folders, three control files and the card
    with pytest.raises(UserInputError, match=r"here.zarr: .* 8 .* 11"):
        push(path, ADDRESS)
    assert hub.hub.requests == []
    push(path, f"file://{tmp_path}/there.zarr")


def test_frames_are_read_at_the_commit_that_was_opened(tmp_path: Path, hub: HubHere) -> None:
    path = make_small_store(tmp_path / "here.zarr")
    push(path, ADDRESS)
    repository = hub.hub.repositories["me/made-up"]
    commit = repository.branches["main"][-1]
    remote = geomcache.open(ADDRESS)
    push(make_small_store(tmp_path / "other.zarr", shift=1000), ADDRESS)
    assert isinstance(remote, RemoteGeometryStore)
    assert remote.address == f"{ADDRESS}@{commit}"
    with GeometryStore.open(path) as local:
        for store in (remote, pickle.loads(pickle.dumps(remote))):
            np.testing.assert_array_equal(store.batch([3, 80]).ray, local.batch([3, 80]).ray)


def test_shards_of_the_hub_are_fetched_at_the_commit_that_was_opened(
    tmp_path: Path, hub: HubHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOMCACHE_HOME", str(tmp_path / "home"))
    path = make_small_store(tmp_path / "here.zarr")
    push(path, ADDRESS)
    store = open_for_training(ADDRESS, 10**9)
    push(make_small_store(tmp_path / "other.zarr", shift=7), ADDRESS, overwrite=True)
    rows = [80, 3, 45]
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.batch(rows).ray, GeometryStore.open(path).batch(rows).ray)
    assert isinstance(copy, FetchingGeometryStore)
    assert copy.local.fetched == 3
    assert copy.address.startswith(f"{ADDRESS}@")
