"""Run the recipes for a cluster, the scripts themselves, with a simulated Slurm and many processes."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from geomcache.cache.store import GeometryStore
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.run import extract
from pipelines.slurm import check_locks
from tests.support.da3 import assert_one_step
from tests.support.datasets import ROOT, make_dataset
from tests.support.slurm import add_command, sbatch

SLURM = Path("pipelines/slurm")
SCRIPTS = sorted(ROOT.glob("pipelines/**/*.sh"))
LENGTHS = (30, 27, 33)  # six shards
# Writes down the arguments that it was called with.
ACCELERATE = 'printf "%s\\0" "$@" >"accelerate-$SLURM_NODEID"\n'


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_shell_and_can_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five processes that each import torch
def test_the_jobs_of_an_array_share_one_cache(random_da3_folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "dataset", LENGTHS)
    options = ["--model", random_da3_folder, "--dataset", "geomcache/test", "--root", tmp_path / "dataset"]
    options += ["--process-res", "28", "--batch-size", "2", "--num-workers", "0", "--device", "cpu"]
    array = ["--array=0-2", SLURM / "extract_array.sh", *options, "--output", "shared.zarr"]
    code = sbatch(tmp_path, *array, timeout=900)
    said = [(tmp_path / f"task-{task}.out").read_text() for task in range(3)]
    assert code == 0, [(tmp_path / f"task-{task}.err").read_text() for task in range(3)]
    shares = [re.search(r"shared\.zarr: (\d+) frames, ", text) for text in said]
    assert all("task" in text for text in said)
    assert sum(int(share[1]) for share in shares if share is not None) == sum(LENGTHS)

    alone = ExtractOptions(
        model=str(random_da3_folder),
        dataset="geomcache/test",
        root=tmp_path / "dataset",
        process_res=28,
        num_workers=0,
        device="cpu",
        output=tmp_path / "alone.zarr",
    )
    extract(alone)
    shared, single = GeometryStore.open(tmp_path / "shared.zarr"), GeometryStore.open(tmp_path / "alone.zarr")
    assert shared.sealed
    assert shared.fingerprint == single.fingerprint
    rows = range(sum(LENGTHS))
    for (_, ours), (_, theirs) in zip(shared.batch([*rows]).items(), single.batch([*rows]).items(), strict=True):
        assert_one_step(ours, theirs)

    # Submitted again, by what the first run kept next to its cache.
    (tmp_path / "shared.run.yaml").rename(tmp_path / "again.yaml")
    assert sbatch(tmp_path, "--array=0-1", SLURM / "extract_array.sh", "--config", "again.yaml", timeout=900) == 0
    assert "complete, 90 frames; nothing to do" in (tmp_path / "task-1.out").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "part"),
    [
        ("extract_array.sh", [], "expected options of geomcache extract, got none"),
        ("extract_array.sh", ["--model", "x", "--overwrite"], "--overwrite"),
        ("train_multinode.sh", ["--cache", "x"], "expected --cache PATH and --output_dir=DIR"),
        ("check_locks.sh", [], "expected a folder"),
    ],
)
def test_a_recipe_refuses_in_one_line(tmp_path: Path, script: str, arguments: list[str], part: str) -> None:
    assert sbatch(tmp_path, "--array=0-0", SLURM / script, *arguments) == 2
    error = (tmp_path / "task-0.err").read_text()
    assert part in error
    assert error.startswith(f"{script}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("resumes", [False, True])
def test_training_starts_one_launcher_on_each_node(tmp_path: Path, resumes: bool) -> None:
    add_command(tmp_path / "bin", "accelerate", ACCELERATE)
    last = tmp_path / "out" / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    if resumes:
        last.parent.mkdir(parents=True)
        last.write_text(json.dumps({}))
    options = ["--cache", "a cache.zarr", f"--output_dir={tmp_path / 'out'}", "--steps=7"]
    code = sbatch(tmp_path, "--nodes=2", SLURM / "train_multinode.sh", *options)
    assert code == 0, (tmp_path / "task-0.err").read_text()
    for node in range(2):
        arguments = (tmp_path / f"accelerate-{node}").read_text().split("\0")[:-1]
        assert arguments.pop(0) == "launch"
        parsed = launch_command_parser().parse_args(arguments)  # accelerate's own
        assert (parsed.num_machines, parsed.machine_rank, parsed.num_processes) == (2, node, 8)
        assert (parsed.main_process_ip, parsed.main_process_port) == ("gpu1", 20000 + 4711)
        assert (parsed.module, parsed.training_script) == (True, "geomcache")
        cache = ["train", "--cache", "a cache.zarr"]
        resumed = [*cache, "--resume=true", f"--config_path={last}"]
        assert parsed.training_script_args == (resumed if resumes else ["train", *options])


def test_locks_between_two_tasks_are_seen(tmp_path: Path) -> None:
    code = sbatch(tmp_path, SLURM / "check_locks.sh", tmp_path)
    assert code == 0, (tmp_path / "task-0.err").read_text()
    assert "locks hold between machines" in (tmp_path / "task-0.out").read_text()
    assert not list(tmp_path.glob(".geomcache-locks*"))


def test_a_lock_that_keeps_nobody_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock, locked, tried = (tmp_path / name for name in ("lock", "locked", "tried"))
    lock.touch()
    locked.touch()
    assert check_locks.attempt(lock, locked, tried) == 1
    assert "keep this one out, it did not" in capsys.readouterr().err
    assert tried.exists()
