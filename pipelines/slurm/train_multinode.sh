#!/usr/bin/env bash
# Stage two on several nodes of a Slurm cluster: one `accelerate launch` on each, one process for each GPU.
#
#   sbatch --nodes=2 pipelines/slurm/train_multinode.sh --cache /shared/libero.zarr --output_dir=/shared/pi05_geometry \
#       --dataset.repo_id=HuggingFaceVLA/libero --policy.pretrained_path=lerobot/pi05_libero_base \
#       --policy.dtype=bfloat16 --policy.gradient_checkpointing=true --steps=2000 --batch_size=8
#
# Arguments after the script are passed to `geomcache train`; --batch_size counts for each GPU. A job that is requeued, or
# submitted again with the same --output_dir, resumes from its last checkpoint with the options stored there. Every node
# reads the cache: put it on a shared file system or, faster, under the same path on each node's disk.
#
#SBATCH --job-name=geomcache-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=geomcache-train-%j.log
set -euo pipefail

CACHE="" OUTPUT_DIR=""
previous=""
for option in "$@"; do
    case "$previous" in
        --cache) CACHE="$option" ;;
        --output_dir) OUTPUT_DIR="$option" ;;
    esac
    case "$option" in
        --cache=*) CACHE="${option#*=}" ;;
        --output_dir=*) OUTPUT_DIR="${option#*=}" ;;
    esac
    previous="$option"
done
if [[ -z "$CACHE" || -z "$OUTPUT_DIR" ]]; then
    echo "train_multinode.sh: expected --cache PATH and --output_dir=DIR among the options, so that a requeued job resumes" >&2
    exit 2
fi

# Take the first line without `| head -n 1`: scontrol could be killed by SIGPIPE when head exits first.
HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MAIN_NODE="${HOSTS%%$'\n'*}"
export MAIN_PORT="${MAIN_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" # two jobs on one node need two ports
export GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"

LAST="$OUTPUT_DIR/checkpoints/last/pretrained_model/train_config.json"
if [[ -e "$LAST" ]]; then
    set -- --cache "$CACHE" --resume=true --config_path="$LAST"
fi

# SLURM_NODEID differs on each node, so it is expanded there and not here.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --multi_gpu --num_machines="$SLURM_NNODES" --machine_rank="$SLURM_NODEID" \
        --num_processes="$((SLURM_NNODES * GPUS_PER_NODE))" --main_process_ip="$MAIN_NODE" \
        --main_process_port="$MAIN_PORT" --mixed_precision=no --dynamo_backend=no \
        -m geomcache train "$@"
' train_multinode "$@"
