#!/usr/bin/env bash
# From a demonstration to a solved task, on two CPU cores in half an hour: record it again with this machine's assets,
# extract its geometry into a cache, train a small Pi0.5 from the cache, and run that policy in LIBERO with DA3 online,
# from the state where the demonstration began.
#
#   make e2e-libero
#
# A policy that overfits one demonstration must solve its task. If it fails in its own training scene, training and
# inference do not see the same geometry. The same weights are then evaluated without geometry tokens, and with the two
# views' geometry swapped: the difference shows how much the policy uses its geometry.
#
# DA3-SMALL has random weights: its maps have no meaning, but they differ from frame to frame.
set -euo pipefail
cd "$(dirname "$0")/.."

DEMONSTRATIONS="${DEMONSTRATIONS:-../shared/libero_object_mini}"
EPISODE=0   # of task 0 from initial state 0, 138 frames; the evaluation below begins there too
STEPS="${STEPS:-1600}"
SEEDS="${SEEDS:-1000,1001,1002}"
OUT="${OUT:-outputs/e2e_libero}"

if [[ ! -d "$DEMONSTRATIONS" ]]; then
    echo "e2e_libero.sh: $DEMONSTRATIONS: expected a folder of demonstrations, found none: name one in DEMONSTRATIONS" >&2
    exit 2
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
# By default glibc returns large blocks to the system after every step; keeping them saves a third of the time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=1073741824

BOLD="" PLAIN=""
if [[ -t 1 && -z "${NO_COLOR:-}" ]]; then BOLD=$'\033[1m' PLAIN=$'\033[0m'; fi
stage() {
    printf '\n%s== %s%s (%d s since the start)\n' "$BOLD" "$*" "$PLAIN" "$SECONDS"
}

rm -rf "$OUT"
mkdir -p "$OUT"

stage "The demonstration again, with the assets that the policy will act in"
python pipelines/record_demonstrations.py --demonstrations "$DEMONSTRATIONS" --episodes "$EPISODE" \
    --output "$OUT/demonstrations" --cache "$OUT/oracle.zarr" --outputs ray

stage "A DA3-SMALL folder with seeded random weights"
python pipelines/make_random_da3.py --output "$OUT/da3-small-random"

stage "Stage one: geometry of episode $EPISODE into a cache"
geomcache extract --model "$OUT/da3-small-random" --dataset geomcache/demonstrations \
    --root "$OUT/demonstrations" --process-res 112 --output "$OUT/cache.zarr"

stage "Stage two: $STEPS steps from the cache"
# A chunk is as long as the demonstration. Padded action dimensions would stay noise in a model trained from scratch.
python pipelines/train_with_average.py --cache "$OUT/cache.zarr" --average "$OUT/policy" \
    --dataset.repo_id=geomcache/demonstrations --dataset.root="$OUT/demonstrations" \
    --dataset.video_backend=pyav \
    --policy.model_size=small --policy.device=cpu --policy.image_resolution='[112,112]' \
    --policy.chunk_size=140 --policy.n_action_steps=70 --policy.max_action_dim=7 --policy.max_state_dim=8 \
    --policy.tokenizer_max_length=112 \
    --policy.geom_target_hw='[4,4]' --policy.geom_init_alpha=0.5 --policy.geom_lr_scale=1 \
    --policy.optimizer_lr=1e-3 --policy.scheduler_warmup_steps=50 --policy.scheduler_decay_steps="$STEPS" \
    --policy.scheduler_decay_lr=1e-5 \
    --steps="$STEPS" --batch_size=16 --num_workers=1 --seed=1000 --log_freq=100 --save_freq="$STEPS" \
    --output_dir="$OUT/train" 2>&1 | tee "$OUT/train.log" | grep --line-buffered -E 'step:|Error' | sed -E 's/.*(step:)/\1/'

stage "Closed loop: DA3 online, encoded anew every 70 steps"
python pipelines/evaluate_ablations.py --policy "$OUT/policy" --output "$OUT/eval" --seeds "$SEEDS" \
    --env.task=libero_object --env.task_ids='[0]' --eval.n_episodes=1 --eval.batch_size=1 2>"$OUT/eval.log" |
    tee "$OUT/eval.txt" | grep -v '^\[info\]'

printf '\n%d s in all; videos under %s\n' "$SECONDS" "$OUT/eval"
