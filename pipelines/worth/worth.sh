#!/usr/bin/env bash
# Does geometry help a small policy whose camera moves? One command a stage; start any of them again to resume.
#
#   pipelines/worth/worth.sh                   all stages, in the size for two CPU cores
#   pipelines/worth/worth.sh demonstrate       one of them: demonstrate, record, extract, learn, closed, report
#   SIZE=closed pipelines/worth/worth.sh       the closed loop on two CPU cores, with demonstrations and a policy of its own
#   SIZE=smoke pipelines/worth/worth.sh        all stages in some minutes: that they run, not an answer
#   SIZE=gpu pipelines/worth/worth.sh          on a GPU; `gpu.sh` runs the stages side by side
#
#   demonstrate   scripted demonstrations of libero_object, with a disturbed arm            WORK/demonstrations
#   record        replayed under 12 trained and 12 other cameras of LIBERO-Plus, true geometry   WORK/recorded, frames
#   extract       the same frames through DA3 with random weights, a control                WORK/recorded/*.da3.zarr
#   learn         each arm from each seed, and its errors on held-out demonstrations        WORK/policies, open_loop
#   closed        success of three arms on variants of LIBERO-Plus                          WORK/closed
#   report        tables with intervals, a plot, geomcache compare                          WORK/report
#
# Needs geomcache[libero,libero-assets,libero-plus]. docs/worth.md says what is compared, and what was found.
set -euo pipefail
self=$(realpath "$0")
cd "$(dirname "$0")/../.."

SIZE="${SIZE:-cpu}"
stages="demonstrate record extract learn closed report"
case "$SIZE" in
    smoke)
        defaults="POLICY=pi05_geometry TEXT=116 LEARNERS=2 TASKS=0:1 STATES=1:3 EVERY=12 PICTURE=56 DA3=56
            TOKENS=4 CHUNK=8 STEPS=12 BATCH=4 SEEDS=0,1 MEASURE_EVERY=16 VARIANTS=1 EPISODE=12 EVALUATORS=1"
        export ARMS="${ARMS:-none rays_depth other_rays random_da3 rays_align blind none_no_hand rays_no_hand}"
        export CLOSED_ARMS="${CLOSED_ARMS:-none rays_depth}"
        ;;
    cpu)
        stages="demonstrate record extract learn report"
        defaults="POLICY=pi05_geometry TEXT=116 LEARNERS=2 EXTRACTORS=2 TASKS=2:6 STATES=0:3 EVERY=1 PICTURE=56
            DA3=56 TOKENS=4 CHUNK=8 STEPS=500 BATCH=16 SEEDS=0,1,2 MEASURE_EVERY=8 VARIANTS=30 EPISODE=150"
        ;;
    closed)
        stages="demonstrate record learn closed report"
        defaults="POLICY=pi0_geometry TEXT=16 LEARNERS=2 TASKS=6,8 STATES=0:12 EVERY=3 PICTURE=56 DA3=56 TOKENS=4
            CHUNK=8 STEPS=2500 BATCH=16 SEEDS=0 MEASURE_EVERY=8 VARIANTS=30 EPISODE=150"
        export ARMS="${ARMS:-none rays rays_depth blind}" CLOSED_ARMS="${CLOSED_ARMS:-none rays rays_depth blind}"
        ;;
    gpu)
        defaults="POLICY=pi0_geometry TEXT=16 TASKS=1,6,8 STATES=0:12 EVERY=3 PICTURE=112 DA3=112 TOKENS=8
            CHUNK=16 STEPS=1200 BATCH=48 SEEDS=0,1,2 MEASURE_EVERY=6 VARIANTS=36 EPISODE=150"
        ;;
    *) echo "worth.sh: SIZE: expected smoke, cpu, closed or gpu, got '$SIZE'" >&2; exit 2 ;;
esac
for setting in $defaults; do
    name="${setting%%=*}"
    export "$name=${!name:-${setting#*=}}"  # the environment overrides
done
export WORK="${WORK:-outputs/worth/$SIZE}"
export PROCESSES="${PROCESSES:-2}"           # of simulators
export LEARNERS="${LEARNERS:-1}"             # arms that are trained at once
export ARMS="${ARMS:-}"                      # names, separated by spaces; all of design.py that see both cameras
export LEARN_ARGS="${LEARN_ARGS:-}"          # further options of learn.py
export PYTHON="${PYTHON:-python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
export NUMBA_CACHE_DIR="${NUMBA_CACHE_DIR:-$WORK/numba}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
worth=pipelines/worth
mkdir -p "$WORK/logs"

stage() {
    printf '== %s (%d s since the start)\n' "$*" "$SECONDS"
}

demonstrate() {
    if [[ -e "$WORK/demonstrations/meta/info.json" ]]; then return; fi
    rm -rf "$WORK/demonstrations" "$WORK/demonstrations.draft"
    "$PYTHON" $worth/demonstrate.py --output "$WORK/demonstrations.draft" --tasks "$TASKS" --states "$STATES" \
        --processes "$PROCESSES" 2>"$WORK/logs/demonstrate.log" | grep -v '^\[info\]' ||
        { tail -n 3 "$WORK/logs/demonstrate.log"; return 1; }
    mv "$WORK/demonstrations.draft" "$WORK/demonstrations"
}

parts() {
    "$PYTHON" $worth/design.py parts --demonstrations "$WORK/demonstrations" --every "$EVERY" | grep -E '^(train|test)_'
}

record() {
    mkdir -p "$WORK/recorded" "$WORK/frames"
    parts >"$WORK/parts.txt" 2>"$WORK/logs/parts.log" || { tail -n 3 "$WORK/logs/parts.log"; return 1; }
    xargs -P "$PROCESSES" -L 1 "$self" record-one <"$WORK/parts.txt"
}

record-one() { # NAME EPISODE CAMERAS
    if [[ -e "$WORK/frames/$1.npz" ]]; then return; fi
    rm -rf "$WORK/recorded/$1" "$WORK/recorded/$1.zarr"
    {
        "$PYTHON" pipelines/record_demonstrations.py --demonstrations "$WORK/demonstrations" --episodes "$2" \
            --cameras "$3" --output "$WORK/recorded/$1" --cache "$WORK/recorded/$1.zarr" --size "$PICTURE" \
            --outputs ray,depth --grid 8x8 --images &&
            "$PYTHON" $worth/frames.py --recorded "$WORK/recorded" --name "$1" --cameras "$3" --output "$WORK/frames"
    } >"$WORK/logs/record_$1.log" 2>&1 || { tail -n 3 "$WORK/logs/record_$1.log"; return 1; }
    echo "$1: recorded"
}

extract() {
    local model="$WORK/da3-small-random"
    if [[ ! -e "$model/model.safetensors" ]]; then "$PYTHON" pipelines/make_random_da3.py --output "$model"; fi
    # What was recorded, should a time limit have cut recording short.
    find "$WORK/frames" -name '*_??.npz' -printf '%f\n' | sort | cut -d . -f 1 | xargs -P "${EXTRACTORS:-1}" -L 1 "$self" extract-one
}

extract-one() { # NAME
    "$PYTHON" -m geomcache extract --model "$WORK/da3-small-random" --dataset "geomcache/$1" \
        --root "$WORK/recorded/$1" --output "$WORK/recorded/$1.da3.zarr" --process-res "$DA3" --grid "$((DA3 / 14))x$((DA3 / 14))" --engine eager \
        --num-workers 1 >"$WORK/logs/extract_$1.log" 2>&1 || { tail -n 3 "$WORK/logs/extract_$1.log"; return 1; }
}

learn() {
    local arms
    arms="${ARMS// /$'\n'}"
    if [[ -z "$arms" ]]; then arms=$("$PYTHON" $worth/design.py arms); fi
    xargs -P "$LEARNERS" -L 1 "$self" learn-one <<<"$arms"
}

learn-one() { # ARM
    # By default glibc returns large blocks to the system after every step; keeping them saves a tenth of a step's time.
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=1073741824
    # shellcheck disable=SC2086  # LEARN_ARGS are several options
    "$PYTHON" $worth/learn.py --arm "$1" --seeds "$SEEDS" --frames "$WORK/frames" --caches "$WORK/recorded" \
        --output "$WORK" --steps "$STEPS" --batch-size "$BATCH" --resolution "$PICTURE" --tokens "$TOKENS" \
        --chunk "$CHUNK" --every "$MEASURE_EVERY" --policy "$POLICY" --text "$TEXT" $LEARN_ARGS 2>&1 | tee "$WORK/logs/learn_$1.log" |
        { grep --line-buffered -E '(error|seed [0-9]+: |left out|Error)' || true; }
}

closed() {
    local numbers
    # shellcheck disable=SC2153  # set above, from the size
    numbers=$("$PYTHON" $worth/design.py variants --variants "$VARIANTS" --tasks "$TASKS" | tail -n 1)
    for arm in ${CLOSED_ARMS:-none rays rays_depth}; do
        # Processes with the same --results share the variants.
        seq "${EVALUATORS:-$PROCESSES}" | sed "s/^/$arm ${CLOSED_SEED:-0} $numbers /"
    done | xargs -P "$PROCESSES" -L 1 "$self" closed-one
}

closed-one() { # ARM SEED VARIANTS NUMBER
    "$PYTHON" -m geomcache eval --policy "$WORK/policies/$1/$2" --results "$WORK/closed/$1.csv" \
        --env.type=libero_plus_variants --env.task=libero_object --env.axis=camera --env.task_ids="$3" \
        --env.observation_height="$PICTURE" --env.observation_width="$PICTURE" --env.episode_length="$EPISODE" \
        --eval.n_episodes=1 --eval.batch_size=1 --seed=1000 --output_dir="$WORK/closed/$1.$4" \
        ${DEVICE:+--policy.device=$DEVICE} >"$WORK/logs/closed_$1_$4.log" 2>&1 ||
        { tail -n 3 "$WORK/logs/closed_$1_$4.log"; return 1; }
}

report() {
    "$PYTHON" $worth/redundancy.py --frames "$WORK/frames" --caches "$WORK/recorded" | tee "$WORK/redundancy.md"
    "$PYTHON" $worth/report.py --results "$WORK" --output "$WORK/report"
    local files sees
    for sees in "" _no_hand; do
        files=()
        for arm in none rays rays_depth blind; do
            if [[ -e "$WORK/closed/$arm$sees.csv" ]]; then files+=("$WORK/closed/$arm$sees.csv"); fi
        done
        if [[ ${#files[@]} -gt 1 ]]; then "$PYTHON" -m geomcache compare "${files[@]}" --output "$WORK/report/closed$sees"; fi
    done
}

case "${1:-all}" in
    record-one | extract-one | learn-one | closed-one)
        "$@"
        ;;
    all)
        for each in $stages; do
            stage "$each"
            "$each"
        done
        stage "done"
        ;;
    demonstrate | record | extract | learn | closed | report)
        for each in "$@"; do
            stage "$each"
            "$each"
        done
        stage "done"
        ;;
    *)
        echo "worth.sh: expected demonstrate, record, extract, learn, closed, report or all, got '$1'" >&2
        exit 2
        ;;
esac
