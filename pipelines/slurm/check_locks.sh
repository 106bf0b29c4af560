#!/usr/bin/env bash
# Check that a folder's file system supports POSIX locks between machines, which jobs that share a cache rely on.
#
#   sbatch pipelines/slurm/check_locks.sh FOLDER      the verdict is in geomcache-locks-JOB.log
#
#SBATCH --job-name=geomcache-locks
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:05:00
#SBATCH --output=geomcache-locks-%j.log
set -euo pipefail

if [[ $# -ne 1 ]]; then
    echo "check_locks.sh: expected a folder on the shared file system, got $# arguments" >&2
    exit 2
fi
# sbatch runs a copy of this script in another folder; submit it from the root of the repository.
exec srun --kill-on-bad-exit=1 python "${SLURM_SUBMIT_DIR:-.}/pipelines/slurm/check_locks.py" "$1"
