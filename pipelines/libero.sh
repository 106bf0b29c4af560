#!/usr/bin/env bash
# LIBERO, start to end: geometry of every frame (stage one), Pi0.5 with geometry (stage two), success rates.
#
#   pipelines/libero.sh                     all three, on one GPU
#   pipelines/libero.sh extract             one of them: extract, train or evaluate
#   GPUS=8 pipelines/libero.sh              on the eight GPUs of this machine
#   MODE=align pipelines/libero.sh          no geometry tokens: a loss while training, and no DA3 when it acts
#   MODE=align TARGET=feature pipelines/libero.sh    the same with DA3's features as what the loss aligns to
#
# On several machines that share a file system, the same command on each, with its own MACHINE_RANK:
#
#   GPUS=16 MACHINES=2 MACHINE_RANK=0 MAIN_IP=10.0.0.1 pipelines/libero.sh
#   GPUS=16 MACHINES=2 MACHINE_RANK=1 MAIN_IP=10.0.0.1 pipelines/libero.sh
#
# Start the script again to resume where it stopped. The cache needs about 10 GB of disk in addition to the dataset, with
# TARGET=feature 38 GB; evaluation needs `geomcache[libero]`.
set -euo pipefail

# ---- settings; the environment overrides them ------------------------------------------------------------------------

DATASET="${DATASET:-HuggingFaceVLA/libero}"             # 1,693 episodes, 273,465 frames, two cameras of 256x256
MODEL="${MODEL:-DA3-LARGE-1.1}"                         # CC BY-NC 4.0; DA3-BASE is Apache-2.0
BASE_POLICY="${BASE_POLICY:-lerobot/pi05_libero_base}"  # plain Pi0.5; what geometry adds to it starts fresh
MODE="${MODE:-prefix}"                                  # or align, both: docs/alignment.md
TARGET="${TARGET:-geometry}"                            # or feature: what align and both align to
[[ "$MODE" == prefix ]] && name=geometry || name="$MODE"  # each mode resumes a run of its own
case "$TARGET" in
    geometry) cache=libero.zarr outputs=ray,ray_conf grid=patch ;;
    feature) cache=libero_feature.zarr outputs=ray,ray_conf,feature grid=16x16 name="${name}_feature" ;;
    *)
        echo "libero.sh: expected TARGET=geometry or feature, got '$TARGET'" >&2
        exit 2
        ;;
esac
CACHE="${CACHE:-$cache}"
OUTPUT="${OUTPUT:-outputs/pi05_$name}"
STEPS="${STEPS:-2000}"
BATCH_SIZE="${BATCH_SIZE:-8}"                           # for each GPU: with GPUS=8 a step sees 64 frames
SUITE="${SUITE:-libero_10}"                             # or libero_spatial, libero_object, libero_goal
N_EPISODES="${N_EPISODES:-10}"                          # for each task

GPUS="${GPUS:-1}"                                       # on all machines together
MACHINES="${MACHINES:-1}"
MACHINE_RANK="${MACHINE_RANK:-0}"                       # this machine's number, from 0
MAIN_IP="${MAIN_IP:-127.0.0.1}"                         # address of machine 0
MAIN_PORT="${MAIN_PORT:-29500}"

# ---- stages ----------------------------------------------------------------------------------------------------------

# Run geomcache on one GPU, or one process on each GPU of each machine.
run() {
    if [[ "$GPUS" == 1 ]]; then
        geomcache "$@"
    else
        accelerate launch --multi_gpu --num_processes="$GPUS" --num_machines="$MACHINES" \
            --machine_rank="$MACHINE_RANK" --main_process_ip="$MAIN_IP" --main_process_port="$MAIN_PORT" \
            --mixed_precision=no --dynamo_backend=no -m geomcache "$@"
    fi
}

# Stage one. The two cameras of a frame are views of one scene, with 36x36 cells each: 9.9 GB; with features, 16x16 cells
# of which take 128 numbers: 38 GB. The processes share the work shard by shard.
extract() {
    run extract --model "$MODEL" --dataset "$DATASET" --output "$CACHE" --views joint --process-res 504 \
        --outputs "$outputs" --grid "$grid"
}

# Stage two: LeRobot's trainer. Autocast follows --policy.dtype.
train() {
    local last="$OUTPUT/checkpoints/last/pretrained_model/train_config.json"
    if [[ -e "$last" ]]; then
        run train --cache "$CACHE" --resume=true --config_path="$last"
    else
        run train --cache "$CACHE" --dataset.repo_id="$DATASET" \
            --policy.pretrained_path="$BASE_POLICY" --policy.geom_mode="$MODE" --policy.geom_align_target="$TARGET" \
            --policy.dtype=bfloat16 --policy.gradient_checkpointing=true \
            --steps="$STEPS" --batch_size="$BATCH_SIZE" --log_freq=20 --save_freq=500 --output_dir="$OUTPUT"
    fi
}

# Closed loop. With tokens, DA3 runs online, once for each new chunk of actions. Cameras have 256x256 pixels as in the dataset:
# `geomcache eval` takes the size from the checkpoint.
evaluate() {
    if [[ "$MACHINE_RANK" == 0 ]]; then
        geomcache eval --policy "$OUTPUT/checkpoints/last/pretrained_model" --env.task="$SUITE" \
            --eval.n_episodes="$N_EPISODES" --eval.batch_size=1 --output_dir="$OUTPUT/eval/$SUITE"
    fi
}

for stage in "${@:-all}"; do
    case "$stage" in
        extract | train | evaluate) "$stage" ;;
        all)
            extract
            train
            evaluate
            ;;
        *)
            echo "libero.sh: expected extract, train, evaluate or all, got '$stage'" >&2
            exit 2
            ;;
    esac
done
