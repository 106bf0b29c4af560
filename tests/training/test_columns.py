"""Items of a dataset whose pictures are stored in its rows: LeRobot's own, without decoding the chunk's pictures."""

import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from lerobot.datasets import LeRobotDataset

from geomcache.training.columns import read_columns_alone
from tests.support.training import CAMERAS, REPO_ID, make_cache, make_dataset, make_spec, options, run_training

CHUNK = 4
OVER_TIME = {"action": [step / 10 for step in range(CHUNK)], "observation.state": [-0.1, 0.0]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pens"
    make_dataset(folder)
    return folder


def decoded_pictures(dataset: Any, position: int) -> int:
    decode = datasets.Image.decode_example
    with mock.patch.object(datasets.Image, "decode_example", autospec=True, side_effect=decode) as counted:
        dataset[position]
    return counted.call_count


@pytest.mark.parametrize("over_time", [OVER_TIME, OVER_TIME | {CAMERAS[0]: [-0.1, 0.0]}, {"action": [0.0]}])
@pytest.mark.parametrize("episodes", [None, [0, 2]])
def test_items_stay_the_same(root: Path, over_time: dict[str, list[float]], episodes: list[int] | None) -> None:
    plain, alone = (LeRobotDataset(REPO_ID, root=root, episodes=episodes, delta_timestamps=over_time) for _ in range(2))
    read_columns_alone(alone)
    for position in range(len(plain)):
        expected, item = plain[position], alone[position]
        assert item.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(item[key], value) if isinstance(value, torch.Tensor) else item[key] == value, key


def test_only_the_items_own_pictures_are_decoded(root: Path) -> None:
    dataset = LeRobotDataset(REPO_ID, root=root, delta_timestamps=OVER_TIME)
    read_columns_alone(dataset)
    assert decoded_pictures(dataset, 2) == len(CAMERAS)
    assert decoded_pictures(pickle.loads(pickle.dumps(dataset)), 2) == len(CAMERAS)  # as a worker process gets it


def test_a_dataset_of_single_rows_is_left_as_it_is(root: Path) -> None:
    dataset = LeRobotDataset(REPO_ID, root=root)
    read_columns_alone(dataset)
    assert "_query_hf_dataset" not in vars(dataset.reader)
    assert decoded_pictures(dataset, 2) == len(CAMERAS)


def test_training_decodes_only_its_items_pictures_and_loses_nothing(tmp_path: Path) -> None:
    meta = make_dataset(tmp_path / "dataset")
    cache = make_cache(tmp_path / "cache.zarr", meta, make_spec(meta))

    def run(name: str) -> tuple[int, list[float]]:
        decode = datasets.Image.decode_example
        with mock.patch.object(datasets.Image, "decode_example", autospec=True, side_effect=decode) as counted:
            steps = run_training(cache, options(meta, tmp_path / name))
        return counted.call_count, [step.loss for step in steps]

    pictures, losses = run("alone")
    with mock.patch("geomcache.training.columns.read_columns_alone"):
        pictures_of_rows, losses_of_rows = run("rows")
    assert losses == losses_of_rows
    assert pictures_of_rows >= 2 * pictures  # LeRobot decodes those of a chunk of three, too
