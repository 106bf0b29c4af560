"""The recipe for datatrove: its ranks, here and as Slurm would start them, make the cache of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from geomcache.cache.store import GeometryStore
from geomcache.extraction.run import extract
from pipelines.slurm import extract_datatrove
from tests.faults.ray_cluster import demo_options, hashes
from tests.support.datasets import DEMO, ROOT
from tests.support.slurm import add_command

RECIPE = ROOT / "pipelines" / "slurm" / "extract_datatrove.py"
SHARDS = 24


def arguments(model: Path, output: Path) -> list[str]:
    """What `demo_options` asks for, as it is typed."""
    options = {"model": model, "dataset": "demo", "root": DEMO, "output": output, "process-res": 56, "batch-size": 4}
    options |= {"num-workers": 1, "device": "cpu"}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run(*options: object, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, options)], env=environment, text=True, capture_output=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_options_are_read_as_the_command_line_reads_them(tmp_path: Path) -> None:
    options = extract_datatrove.parse_options(arguments(tmp_path / "m", tmp_path / "o.zarr"))
    assert options == demo_options(tmp_path / "m", tmp_path / "o.zarr")
    with pytest.raises(SystemExit) as left:
        extract_datatrove.parse_options([*arguments(tmp_path, tmp_path), "--overwrite"])
    assert left.value.code == 2


@pytest.fixture(scope="module")
def reference(random_da3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract(demo_options(random_da3_folder, tmp_path_factory.mktemp("reference") / "cache.zarr")).path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_local_executor_makes_the_cache_of_one_process(
    reference: Path, random_da3_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "cache.zarr"
    recipe = (RECIPE, "--executor", "local", "--logs", tmp_path / "logs", "--tasks", 3, "--workers", 2, "--")
    run(*recipe, *arguments(random_da3_folder, output))
    (step,) = json.loads((tmp_path / "logs" / "stats.json").read_text())
    assert step["stats"]["shards"] == {"total": SHARDS, "n": 3, "mean": 8.0}  # all the same: no least and most
    assert hashes(output) == hashes(reference)
    assert "Not doing anything as all 3 tasks" in run(*recipe, *arguments(random_da3_folder, output))

    (tmp_path / "logs" / "completions" / "00001").unlink()  # as if that rank had failed
    (output / "observation.images.image" / "ray" / "c.9.0.0.0").unlink()
    run(*recipe, *arguments(random_da3_folder, output))
    assert hashes(output) == hashes(reference)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_slurm_executor_submits_an_array_whose_ranks_make_the_cache(
    reference: Path, random_da3_folder: Path, tmp_path: Path
) -> None:
    add_command(
        tmp_path / "bin", "sbatch", f'cat "${{@: -1}}" >>{tmp_path}/submitted\necho "Submitted batch job 4711"\n'
    )
    add_command(tmp_path / "bin", "scontrol", "echo gpu1\n")  # datatrove asks it for the names of an array's nodes
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    output, logs = tmp_path / "cache.zarr", tmp_path / "logs"
    recipe = (RECIPE, "--executor", "slurm", "--logs", logs, "--tasks", 2, "--workers", 1, "--partition", "gpu", "--")
    run(*recipe, *arguments(random_da3_folder, output), PATH=path)
    script = (tmp_path / "submitted").read_text()
    for line in ("#SBATCH --array=0-1%1", "#SBATCH --gpus=1", "#SBATCH --partition=gpu", "launch_pickled_pipeline"):
        assert line in script
    environment = {"PATH": path, "RUN_OFFSET": "0", "SLURM_NODELIST": "gpu1", "SLURM_CPUS_PER_TASK": "8"}
    environment |= {"SLURM_MEM_PER_CPU": "4096", "SLURM_GPUS_ON_NODE": "1"}
    for task in ("0", "1"):
        run(
            "-m",
            "datatrove.tools.launch_pickled_pipeline",
            logs / "executor.pik",
            SLURM_ARRAY_TASK_ID=task,
            **environment,
        )
    assert hashes(output) == hashes(reference)
    with GeometryStore.open(output) as store:
        assert store.sealed
