"""A simulated Slurm: `sbatch`, `srun` and `scontrol` that run everything on this machine, at once."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.datasets import ROOT

# Reads options of the script, then of the command line, and runs a copy of the script in another folder, as Slurm does.
SBATCH = """
options=()
while [[ "$1" == --* ]]; do options+=("$1"); shift; done
script="$1"; shift
array=0-0 nodes=1
for option in $(sed -n 's/^#SBATCH //p' "$script") "${options[@]}"; do
    case "$option" in
        --array=*) array="${option#*=}" ;;
        --nodes=*) nodes="${option#*=}" ;;
    esac
done
spool="$(mktemp -d)"
cp "$script" "$spool/slurm_script"
export SLURM_JOB_ID=4711 SLURM_ARRAY_JOB_ID=4711 SLURM_SUBMIT_DIR="$PWD"
export SLURM_NNODES="$nodes" SLURM_JOB_NODELIST="gpu[1-$nodes]" SLURM_GPUS_ON_NODE=4
pids=()
for ((task = ${array%-*}; task <= ${array#*-}; task++)); do
    SLURM_ARRAY_TASK_ID=$task bash "$spool/slurm_script" "$@" >"task-$task.out" 2>"task-$task.err" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
rm -r "$spool"
exit "$status"
"""
SRUN = """
while [[ "$1" == --* ]]; do shift; done
pids=()
for ((node = 0; node < ${SLURM_NNODES:-1}; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""
SCONTROL = """
[[ "$1 $2" == "show hostnames" ]] || exit 1
echo gpu1
sleep 0.2 # a reader that exits after the first line is gone by now
echo gpu2
"""


def add_command(folder: Path, name: str, script: str) -> None:
    """Write a command into a folder on PATH."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text("#!/usr/bin/env bash\nset -u\n" + script)
    file.chmod(0o755)


def sbatch(folder: Path, *arguments: object, timeout: float = 250) -> int:
    """Submit a recipe in a folder, wait for its tasks, and return the worst exit code.

    What the tasks print is in task-N.out and task-N.err in the folder.
    """
    tools = folder / "bin"
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        add_command(tools, name, script)
    if not (folder / "pipelines").exists():
        (folder / "pipelines").symlink_to(ROOT / "pipelines")
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        ["sbatch", *map(str, arguments)],
        executable=tools / "sbatch",
        cwd=folder,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):  # no task outlives its test
            os.killpg(process.pid, signal.SIGKILL)
