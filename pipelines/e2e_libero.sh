#!/usr/bin/env bash
# From demonstrations to a solved task, on two CPU cores in 40 minutes: record a scripted expert in LIBERO,
# extract the geometry of its pictures into a cache, train a small Pi0 from the cache, and run that policy there with DA3
# online. Three times, from three training seeds.
#
#   make e2e-libero
#   SEEDS=1001 make e2e-libero        one seed; run with other seeds, the demonstrations and the cache are used again
#
# A stopped run resumes: run the same command again. OUT (outputs/e2e_libero) is deleted by hand.
#
# Two things are shown for each seed, each with a bound that leaves room for another processor's rounding:
#   1. The policy goes by its geometry. On every recorded frame, the error of the predicted actions grows when its
#      geometry is swapped between the views, missing, or that of another frame: at least LEAST_TIMES times.
#   2. Training and inference see the same: the policy solves at least LEAST_SOLVED of EPISODES episodes.
# A missed bound ends with exit code 1, after all seeds have run.
#
# What it does not show: that the policy generalises, or that geometry is needed. Episodes begin in initial states that
# demonstrations began in, and the object of this task stands at the same place in all 50. Pi0 is given the robot's state,
# which says where the hand is. DA3-SMALL has random weights: its maps have no meaning, and change almost entirely while
# the hand moves by two centimetres. Pi0.5, which had to see the hand in maps and pictures, learned the frames by heart
# and passed the object by.
set -euo pipefail
cd "$(dirname "$0")/.."

SEEDS="${SEEDS:-1000,1001,1002}"
TASK="${TASK:-8}"                  # of libero_object: pick up the chocolate pudding and place it in the basket
STATES="${STATES:-0:16}"           # that demonstrations may begin in; LIBERO has 50
DEMONSTRATIONS="${DEMONSTRATIONS:-12}"
EPISODES="${EPISODES:-10}"         # with geometry, from the states 0, 1, 2, ...
ABLATED="${ABLATED:-2}"            # without geometry, and with swapped views
STEPS="${STEPS:-1200}"
LEAST_SOLVED="${LEAST_SOLVED:-8}"
LEAST_TIMES="${LEAST_TIMES:-1.2}"  # the least that was seen is 1.39: benchmarks/RESULTS.md
OUT="${OUT:-outputs/e2e_libero}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
# By default glibc returns large blocks to the system after every step; keeping them saves a third of the time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=1073741824

BOLD="" PLAIN=""
if [[ -t 1 && -z "${NO_COLOR:-}" ]]; then BOLD=$'\033[1m' PLAIN=$'\033[0m'; fi
stage() {
    printf '\n%s== %s%s (%d s since the start)\n' "$BOLD" "$*" "$PLAIN" "$SECONDS"
}

# once NAME FOLDER COMMAND...: unless it was done before. What a stopped command left in FOLDER is removed.
once() {
    local name=$1 folder=$2
    shift 2
    if [[ -e "$OUT/done/$name" ]]; then
        echo "done before"
        return
    fi
    rm -rf "${OUT:?}/$folder"
    "$@"
    touch "$OUT/done/$name"
}

# shellcheck disable=SC2329  # `once` calls it
record() {
    python pipelines/record_expert.py --task "$TASK" --states "$STATES" --count "$DEMONSTRATIONS" \
        --noise 0.25 --output "$OUT/demonstrations" 2>"$OUT/record.log" || { tail -n 1 "$OUT/record.log" >&2; exit 1; }
}

# shellcheck disable=SC2329  # `once` calls it
train() { # SEED
    # Chunks are short and a part of each is acted on: what is seen corrects the hand every four steps. Padded action
    # dimensions would stay noise in a model trained from scratch. There is one task: of its text eight bytes are read.
    python pipelines/train_with_average.py --cache "$OUT/cache.zarr" --average "$OUT/$1/policy" \
        --dataset.repo_id=geomcache/demonstrations --dataset.root="$OUT/demonstrations" \
        --policy.type=pi0_geometry --policy.model_size=small --policy.device=cpu --policy.image_resolution='[56,56]' \
        --policy.chunk_size=8 --policy.n_action_steps=4 --policy.max_action_dim=7 --policy.max_state_dim=8 \
        --policy.tokenizer_max_length=8 \
        --policy.geom_target_hw='[4,4]' --policy.geom_init_alpha=0.5 --policy.geom_lr_scale=1 \
        --policy.optimizer_lr=1e-3 --policy.scheduler_warmup_steps=50 --policy.scheduler_decay_steps="$STEPS" \
        --policy.scheduler_decay_lr=1e-5 \
        --steps="$STEPS" --batch_size=16 --num_workers=1 --seed="$1" --log_freq=100 --save_freq="$STEPS" \
        --output_dir="$OUT/$1/train" 2>&1 | tee "$OUT/train-$1.log" | grep --line-buffered -E 'step:|Error' |
        sed -uE 's/.*(step:)/\1/'
}

mkdir -p "$OUT/done"
settings="task $TASK, $DEMONSTRATIONS demonstrations from states $STATES, steps $STEPS, episodes $EPISODES and $ABLATED"
if [[ "$(cat "$OUT/settings" 2>/dev/null || echo "$settings")" != "$settings" ]]; then
    echo "e2e_libero.sh: $OUT: expected a run of $settings, found one of $(cat "$OUT/settings"): delete it, or name another in OUT" >&2
    exit 2
fi
echo "$settings" >"$OUT/settings"

stage "$DEMONSTRATIONS demonstrations of a scripted expert"
once demonstrations demonstrations record

stage "A DA3-SMALL folder with seeded random weights"
once da3 da3-small-random python pipelines/make_random_da3.py --output "$OUT/da3-small-random"

stage "Stage one: their geometry into a cache"
once cache cache.zarr geomcache extract --model "$OUT/da3-small-random" --dataset geomcache/demonstrations \
    --root "$OUT/demonstrations" --process-res 56 --output "$OUT/cache.zarr"

missed=0
# bounded FILE COMMAND...: whose output goes to FILE too. Exit code 1 is a missed bound: the other seeds run on.
bounded() {
    local file=$1 code=0
    shift
    "$@" 2>"$file.log" | tee "$file" | grep -v '^\[info\]' || code=${PIPESTATUS[0]}
    if [[ $code -gt 1 ]]; then
        tail -n 3 "$file.log" >&2
        exit "$code"
    elif [[ $code -eq 1 ]]; then
        tail -n 1 "$file.log" >&2
        missed=1
    fi
}

for seed in ${SEEDS//,/ }; do
    stage "Seed $seed, stage two: $STEPS steps from the cache"
    once "train-$seed" "$seed" train "$seed"
    stage "Seed $seed: actions on every recorded frame, with right and with wrong geometry"
    bounded "$OUT/errors-$seed.txt" python pipelines/action_errors.py --policy "$OUT/$seed/policy" \
        --cache "$OUT/cache.zarr" --root "$OUT/demonstrations" --output "$OUT/errors-$seed.csv" --at-least "$LEAST_TIMES"
    stage "Seed $seed: closed loop, DA3 online, encoded anew every 4 steps"
    bounded "$OUT/eval-$seed.txt" python pipelines/evaluate_ablations.py --policy "$OUT/$seed/policy" \
        --output "$OUT/$seed/eval" --episodes "$EPISODES" --ablated "$ABLATED" --at-least "$LEAST_SOLVED" \
        --env.task=libero_object --env.task_ids="[$TASK]" --env.episode_length=160 --eval.batch_size=2 --seed=1000
done

stage "All seeds"
for seed in ${SEEDS//,/ }; do
    printf 'seed %s\n' "$seed"
    sed -n '/^geometry/,$p' "$OUT/errors-$seed.txt"
    sed -n '/^-- success/,$p' "$OUT/eval-$seed.txt"
done
printf '\n%d s in all; videos under %s\n' "$SECONDS" "$OUT/SEED/eval"
exit "$missed"
