"""Stage one under faults, with the real encoder on random weights: memory runs out, workers and ranks die."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.da3.encoder import DA3Encoder, PendingGeometry
from geomcache.errors import EncoderMemoryError, WorkerDiedError
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.run import extract
from geomcache.geometry import Views
from geomcache.pipeline.workers import ForkServer
from tests.faults.common import Figure
from tests.support.da3 import assert_one_step
from tests.support.datasets import make_dataset
from tests.support.logs import logged_lines

FRAMES = 40


@pytest.fixture(scope="module")
def options(random_da3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractOptions:
    root = tmp_path_factory.mktemp("faults") / "dataset"
    make_dataset(root, (20, 20))
    return ExtractOptions(
        model=str(random_da3_folder),
        dataset="geomcache/test",
        root=root,
        output=root.with_name("cache.zarr"),
        process_res=28,
        grid="native",
        batch_size=8,
        num_workers=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def reference(options: ExtractOptions) -> Path:
    return extract(options).path


def assert_same_rows(path: Path, reference: Path) -> None:
    store, expected = GeometryStore.open(path), GeometryStore.open(reference)
    assert store.rows == expected.rows == ((0, FRAMES),)
    assert store.sealed
    rows = np.arange(FRAMES)
    for (_, ours), (_, theirs) in zip(store.batch(rows).items(), expected.batch(rows).items(), strict=True):
        assert_one_step(ours, theirs)


def cpu_error() -> RuntimeError:
    """What torch's allocator says on a CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    return caught.value


@pytest.mark.parametrize("views", ["joint", "independent"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), cpu_error()])
def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, views: Views
) -> None:
    plain = extract(replace(options, output=tmp_path / "plain.zarr", views=views)).path
    launch, sizes = DA3Encoder.launch, []

    def limited(self: DA3Encoder, inputs: torch.Tensor | list[torch.Tensor]) -> PendingGeometry:
        size = len(inputs[0]) if isinstance(inputs, list) else len(inputs)
        if size > 3:
            raise error
        sizes.append(size)
        return launch(self, inputs)

    monkeypatch.setattr(DA3Encoder, "launch", limited)
    with logged_lines() as lines:
        report = extract(replace(options, output=tmp_path / "cache.zarr", views=views))
    assert [re.findall(r"\d+", line) for line in lines if "memory" in line] == [["8", "4"], ["4", "2"]]
    assert sizes == [2] * 20  # logged once, and remembered
    assert report.frames == FRAMES
    assert_same_rows(report.path, plain)


def test_memory_for_not_even_one_frame_is_told(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: DA3Encoder, inputs: torch.Tensor) -> PendingGeometry:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DA3Encoder, "launch", never)
    with pytest.raises(EncoderMemoryError, match="^cpu: .*da3-small at 28 px") as caught:
        extract(replace(options, output=tmp_path / "cache.zarr"))
    assert "\n" not in str(caught.value)
    assert GeometryStore.open(tmp_path / "cache.zarr").frames_present == 0


def test_another_error_of_the_network_is_not_taken_for_that(
    options: ExtractOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: DA3Encoder, inputs: torch.Tensor) -> PendingGeometry:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(DA3Encoder, "launch", wrong)
    with pytest.raises(RuntimeError, match="^mat1 and mat2"):
        extract(replace(options, output=tmp_path / "cache.zarr"))


def test_a_decoding_worker_that_dies_is_one_line_and_the_next_run_goes_on(
    options: ExtractOptions, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()

    def wait_until_ready(server: ForkServer) -> bool:  # else these few frames are decoded before there is a worker
        server._starting.join()
        started.set()
        return True

    def kill_worker() -> None:
        started.wait()
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        children[0].kill()

    monkeypatch.setattr(ForkServer, "ready", property(wait_until_ready))
    thread = threading.Thread(target=kill_worker, daemon=True)
    thread.start()
    path = tmp_path / "cache.zarr"
    with pytest.raises(WorkerDiedError, match=r"SIGKILL.*--num-workers") as caught:
        extract(replace(options, output=path, num_workers=1))
    assert "\n" not in str(caught.value)
    thread.join()
    extract(replace(options, output=path))
    assert_same_rows(path, reference)


# The command with workers from the first batch on.
WITH_WORKERS = """
from geomcache.cli import main as cli
from geomcache.pipeline.workers import ForkServer
ForkServer.ready = property(lambda server: server._starting.join() or True)
if __name__ == "__main__":
    cli.main()
"""
SMALL_SHM = 'mount --make-rprivate / && mount -t tmpfs -o size=128k tmpfs /dev/shm && exec "$@"'
MAY_MOUNT = ["unshare", "-m", "bash", "-c", SMALL_SHM, "bash", "true"]


def may_mount() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(MAY_MOUNT, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="a mount namespace needs privileges")
def test_a_dev_shm_that_is_too_small_for_a_batch_does_not_matter(
    options: ExtractOptions, reference: Path, tmp_path: Path
) -> None:
    """As Docker's 64 MB at the GPU's default batch."""
    path, script = tmp_path / "cache.zarr", tmp_path / "with_workers.py"
    script.write_text(WITH_WORKERS)
    arguments = command(options, path)[2:]
    arguments[arguments.index("--num-workers") + 1] = "1"
    arguments[arguments.index("--batch-size") + 1] = "8"  # 0.3 MB
    done = subprocess.run(
        [*MAY_MOUNT[:-1], sys.executable, str(script), *arguments],
        env={**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "in this process" not in done.stderr  # the workers are not given up
    assert_same_rows(path, reference)


def command(options: ExtractOptions, output: Path) -> list[str]:
    return [
        *("-m", "geomcache", "extract", "--model", options.model, "--dataset", options.dataset),
        *("--root", str(options.root), "--output", str(output), "--process-res", str(options.process_res)),
        *("--grid", options.grid, "--batch-size", "2", "--num-workers", "0", "--device", "cpu"),
    ]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_closed_pipe_ends_the_run_without_a_traceback_and_loses_nothing(
    options: ExtractOptions, reference: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache.zarr"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *command(options, path)], stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False
    )
    os.close(write)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    extract(replace(options, output=path))
    assert_same_rows(path, reference)


@pytest.mark.slow
def test_a_real_extraction_killed_again_and_again_finishes(
    options: ExtractOptions, reference: Path, tmp_path: Path, figure: Figure
) -> None:
    path, there = tmp_path / "cache.zarr", [0]
    for at in (1, 17, 18, 5, 20):
        arguments = [sys.executable, "-c", KILLED_AT_FRAME, str(at), *command(options, path)[2:]]
        assert subprocess.run(arguments, env=ENVIRONMENT, timeout=240, check=False).returncode == -signal.SIGKILL
        there.append(GeometryStore.open(path).frames_present)
        assert there[-1] in range(there[-2], there[-2] + at, 16)  # whole shards of what was encoded
        if there[-1] == 32:
            break
    extract(replace(options, output=path))
    assert_same_rows(path, reference)
    assert verify(path).problems == ()
    figure(f"{len(there) - 1} kills, frames there after each {there[1:]}")


# SIGKILL in front of the n-th frame that this run encodes.
KILLED_AT_FRAME = """
import os, signal, sys
from geomcache.cli import main as cli
from geomcache.da3.encoder import DA3Encoder
at, sys.argv = int(sys.argv[1]), ["geomcache", *sys.argv[2:]]
launch, encoded = DA3Encoder.launch, 0
def counted(self, inputs):
    global encoded
    encoded += len(inputs)
    if encoded >= at:
        os.kill(os.getpid(), signal.SIGKILL)
    return launch(self, inputs)
DA3Encoder.launch = counted
cli.main()
"""


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_the_next_run_finishes(
    options: ExtractOptions, reference: Path, tmp_path: Path
) -> None:
    path, script = tmp_path / "cache.zarr", tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys\n"
        "from geomcache.cli import main as cli\n"
        "from geomcache.da3.encoder import DA3Encoder\n"
        "launch = DA3Encoder.launch\n"
        "def dies(self, inputs):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    signal.pause() if os.environ['RANK'] == '0' else None\n"
        "    return launch(self, inputs)\n"
        "DA3Encoder.launch = dies\n"
        "if __name__ == '__main__':\n"
        "    cli.main()\n"
    )
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    done = subprocess.run(
        [
            sys.executable,
            *launch,
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            script,
            *command(options, path)[2:],
        ],
        env={**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode != 0
    assert "geomcache: stopped by SIGTERM: " in done.stderr
    assert re.search(r"exitcode\s*:\s*-9", done.stderr)  # the launcher's own line has the reason
    extract(replace(options, output=path))
    assert_same_rows(path, reference)
