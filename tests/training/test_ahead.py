"""Training from an address: the same order, items and losses as from the local cache."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from lerobot.datasets import EpisodeAwareSampler, LeRobotDatasetMetadata

from geomcache.sharing.fetching_store import FetchingGeometryStore, open_for_training
from geomcache.sharing.push import push
from geomcache.training import trainer as training
from geomcache.training.ahead import looking_ahead
from tests.support.training import make_cache, make_dataset, make_spec, options, run_training

ADDRESS = "memory://made-up.zarr"


@pytest.fixture
def meta(tmp_path: Path) -> LeRobotDatasetMetadata:
    return make_dataset(tmp_path / "data", (15, 14, 16))


@pytest.fixture
def fetched(
    meta: LeRobotDatasetMetadata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FetchingGeometryStore]:
    """The cache at an address, open; the local one is next to the dataset."""
    monkeypatch.setenv("GEOMCACHE_HOME", str(tmp_path / "home"))
    push(make_cache(tmp_path / "cache.zarr", meta, make_spec(meta)), ADDRESS)
    store = open_for_training(ADDRESS, 10**9)
    assert isinstance(store, FetchingGeometryStore)
    yield store
    store.close()
    fsspec.filesystem("memory").store.clear()


def test_looking_ahead_changes_no_position(fetched: FetchingGeometryStore) -> None:
    relative = {row: position for position, row in enumerate(range(15, 45))}  # a dataset of the last two episodes
    arguments = ([0, 15, 29], [15, 29, 45])
    for given in ({}, {"episode_indices_to_use": [1, 2], "absolute_to_relative_idx": relative}):
        ours = looking_ahead(EpisodeAwareSampler, fetched)(*arguments, shuffle=True, seed=3, **given)
        theirs = EpisodeAwareSampler(*arguments, shuffle=True, seed=3, **given)
        for _ in range(2):
            assert list(ours) == list(theirs)
        assert ours.state_dict() == theirs.state_dict()


def test_a_run_from_an_address_is_the_run_from_the_cache(
    meta: LeRobotDatasetMetadata, fetched: FetchingGeometryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = run_training(tmp_path / "cache.zarr", options(meta, tmp_path / "local"))
    train = training.train
    monkeypatch.setattr(training, "train", lambda cache, args: train(ADDRESS, args, store=fetched))
    there = run_training(tmp_path / "none.zarr", options(meta, tmp_path / "there"))
    assert fetched.local.fetched > 0
    assert [step.loss for step in there] == [step.loss for step in local]
    for ours, theirs in zip(there, local, strict=True):
        for key in ("index", "observation.geometry.ray", "observation.geometry.ray_conf"):
            assert torch.equal(ours.batch[key], theirs.batch[key]), key
