"""Identities of episodes: what LeRobot's own tools keep of them when they merge datasets."""

import json
from pathlib import Path

import numpy as np
import pytest

from geomcache.frames.compare import find_differences
from geomcache.frames.source import describe_dataset, episode_identities, episode_lengths
from tests.support.datasets import make_dataset

KEYS = ["observation.images.image", "observation.images.image2"]


@pytest.mark.parametrize("video", [False, True])
def test_datasets_merged_in_another_order_are_told_apart(tmp_path: Path, video: bool) -> None:
    """Their lengths, names and aggregated statistics are the same, and so was all that version 1 compared."""
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.datasets.aggregate import aggregate_datasets

    parts = [tmp_path / "a", tmp_path / "b"]
    for seed, part in enumerate(parts):
        make_dataset(part, (5,), video=video, seed=10 * seed)
    metas = []
    for name, order in (("ab", parts), ("ba", parts[::-1])):
        aggregate_datasets([part.name for part in order], "me/merged", roots=order, aggr_root=tmp_path / name)
        metas.append(LeRobotDatasetMetadata("me/merged", root=tmp_path / name))
    first, second = (json.loads((tmp_path / name / "meta/stats.json").read_text()) for name in ("ab", "ba"))
    assert all(first[key] == second[key] for key in KEYS)
    versions = [[describe_dataset(meta, KEYS, schema_version=version) for meta in metas] for version in (1, 2)]
    assert versions[0][0] == versions[0][1]  # what version 1 compared
    assert versions[1][0] != versions[1][1]
    cached, current = ((episode_lengths(meta), episode_identities(meta, KEYS)) for meta in metas)
    assert cached[1].all()
    assert len(set(cached[1].tolist())) == 2
    np.testing.assert_array_equal(cached[1], current[1][::-1])
    differences = find_differences(cached, current, np.arange(2))
    assert (differences.order.tolist(), differences.rows) == ([0, 1], 10)


def test_an_identity_is_of_the_cameras_the_length_and_the_pictures(tmp_path: Path) -> None:
    from lerobot.datasets import LeRobotDatasetMetadata

    make_dataset(tmp_path / "data", (5, 4, 4))
    meta = LeRobotDatasetMetadata("test", root=tmp_path / "data")
    identities = episode_identities(meta, KEYS)
    assert len({0, *identities.tolist()}) == 4
    assert not np.isin(identities, episode_identities(meta, KEYS[:1])).any()
    assert not np.isin(identities, episode_identities(meta, KEYS[::-1])).any()  # the first view is the reference
