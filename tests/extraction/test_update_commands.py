"""`geomcache update` as a command: two processes under accelerate, and a dataset that changes on the Hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache.store import GeometryStore
from tests.cli.test_as_typed import publish
from tests.support.datasets import make_dataset
from tests.support.hub_server import HubHere, hub

__all__ = ["hub"]  # a fixture
CAMERAS = {"observation.images.image": (56, 56), "observation.images.image2": (56, 56)}
LENGTHS = (20, 17, 23)
SETTINGS = ("--device", "cpu", "--num-workers", "0", "--batch-size", "4")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*arguments: str | Path, **environ: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def edit(root: Path, edited: Path) -> None:
    """Delete the second episode with LeRobot's own tool."""
    from lerobot.datasets import LeRobotDataset
    from lerobot.datasets.dataset_tools import delete_episodes

    delete_episodes(LeRobotDataset("geomcache/test", root=root), [1], output_dir=edited, repo_id="geomcache/test")


def assert_rows_of(cache: Path, earlier: Path, rows: list[int]) -> None:
    """Every row of a cache is the row that its pictures had in an earlier one, to the bit."""
    with GeometryStore.open(cache) as ours, GeometryStore.open(earlier) as theirs:
        assert ours.sealed
        assert ours.rows == ((0, len(rows)),)
        pairs = zip(ours.batch(np.arange(len(rows))).items(), theirs.batch(np.array(rows)).items(), strict=True)
        for (name, found), (_, expected) in pairs:
            assert np.array_equal(found, expected), name


def carried_and_encoded(lines: list[str]) -> tuple[int, int]:
    """What the processes say: "N frames carried over, ... in whole shards; M encoded", or "complete" without work."""
    told = [re.match(r"(\d+) frames carried over, .*; (\d+) encoded$", line) for line in lines]
    counts = [(int(match[1]), int(match[2])) for match in told if match]
    return sum(carried for carried, _ in counts), sum(encoded for _, encoded in counts)


def test_two_processes_under_accelerate_share_an_update(random_da3_folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "A", LENGTHS, CAMERAS)
    edit(tmp_path / "A", tmp_path / "edited")
    cache, earlier = tmp_path / "cache.zarr", tmp_path / "earlier.zarr"
    model = ("--model", random_da3_folder, "--dataset", "geomcache/test", "--process-res", "56", *SETTINGS)
    for path in (cache, earlier):
        run("-m", "geomcache", "extract", *model, "--root", tmp_path / "A", "--output", path)
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "geomcache")
    names = ("--dataset", "geomcache/test", "--root", tmp_path / "edited")
    lines = run(*launch, *plain, "update", cache, *names, *SETTINGS)
    assert carried_and_encoded(lines) == (43, 0)
    assert_rows_of(cache, earlier, [*range(20), *range(37, 60)])
    assert not list(tmp_path.glob(".*cache.zarr*"))  # nothing is left of the way there


def test_a_cache_follows_a_dataset_on_the_hub(hub: HubHere, random_da3_folder: Path, tmp_path: Path) -> None:
    name = "someone/robot"
    make_dataset(tmp_path / "A", LENGTHS, CAMERAS)
    edit(tmp_path / "A", tmp_path / "edited")
    publish(hub, name, tmp_path / "A")
    environ = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.wire.port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_LEROBOT_HOME": str(tmp_path / "lerobot"),
    }
    cache, earlier = tmp_path / "cache.zarr", tmp_path / "earlier.zarr"
    for path in (cache, earlier):
        options = ("--model", random_da3_folder, "--dataset", name, "--process-res", "56", "--output", path)
        run("-m", "geomcache", "extract", *options, *SETTINGS, **environ)
    repository = hub.hub.repositories[name]
    edited = {str(file.relative_to(tmp_path / "edited")): file for file in (tmp_path / "edited").rglob("*")}
    tree = {path: file.read_bytes() for path, file in edited.items() if file.is_file()}
    commit = repository.commit("main", tree)
    repository.branches["v3.0"] = repository.branches["main"]
    lines = run("-m", "geomcache", "update", cache, *SETTINGS, **environ)  # the dataset that the cache was made of
    assert any(line.startswith(f"dataset: {name}") for line in lines)
    assert_rows_of(cache, earlier, [*range(20), *range(37, 60)])
    with GeometryStore.open(cache) as store:
        assert store.dataset.revision == commit
    assert carried_and_encoded(lines) == (43, 0)
