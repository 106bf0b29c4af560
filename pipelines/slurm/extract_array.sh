#!/usr/bin/env bash
# Stage one on a Slurm cluster: an array of independent jobs, one GPU each, on one shared cache.
#
#   sbatch pipelines/slurm/extract_array.sh --model DA3-LARGE-1.1 --dataset HuggingFaceVLA/libero --output /shared/libero.zarr
#   sbatch --array=0-63 pipelines/slurm/extract_array.sh --config /shared/libero.run.yaml
#
# Arguments after the script are passed to `geomcache extract`. Jobs need no ranks: each claims shards by POSIX locks on
# the cache's lock file until none is left, and the last one seals. So the array may have any size, and jobs may start at
# any time, die, be preempted or be added while others run: the claims of a dead job are free at once. If the array ends
# without a sealed cache, submit the same command again.
#
# The file system must support POSIX locks between machines (NFSv4, Lustre with -o flock, GPFS, CephFS,
# BeeGFS with tuneUseGlobalFileLocks do). Check it once, before the first run:   sbatch pipelines/slurm/check_locks.sh /shared
# Download model and dataset first, so that the jobs do not all ask the Hub at once:
#
#   geomcache extract --dry-run --model ... --dataset ...
#
#SBATCH --job-name=geomcache-extract
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=geomcache-extract-%A-%a.log
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "extract_array.sh: expected options of geomcache extract, got none: such as --model DA3-LARGE-1.1 --dataset ..." >&2
    exit 2
fi
for option in "$@"; do
    if [[ "$option" == --overwrite ]]; then
        echo "extract_array.sh: --overwrite: each job would remove what the others made: remove the old cache first" >&2
        exit 2
    fi
done

echo "task ${SLURM_ARRAY_TASK_ID:-0} of job ${SLURM_ARRAY_JOB_ID:-none} on $(hostname)"
# srun passes the signals of the time limit and of preemption to geomcache, which then drops its unfinished shard.
exec srun --ntasks=1 --kill-on-bad-exit=1 geomcache extract "$@"
