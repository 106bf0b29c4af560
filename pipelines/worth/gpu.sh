#!/usr/bin/env bash
# The experiment on one GPU within 8 minutes: gpu.sh [FOLDER]
#
# Runs the stages of worth.sh side by side, each with a time limit; what is cut off does not stop the rest. FOLDER
# (outputs/worth/gpu) gets the results, small files alone. Needs what worth.sh needs, or the two archives of a machine
# without a registry, unpacked into one folder that PYTHONPATH names (gpu_pack.sh).
#
#   0 s     is EGL there? otherwise OSMesa
#   20 s    demonstrations, then their recordings, with 16 simulators
#   130 s   every arm learns, from as many seeds as fit; DA3 with random weights first encodes its own arms' frames
#           as soon as the first seed of an arm is learned: closed loop, on the processor next to the learners
#   460 s   tables, plots
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
out=$(realpath -m "${1:-outputs/worth/gpu}")
mkdir -p "$out"
export SIZE="${SIZE:-gpu}" WORK="${WORK:-$out/work}" PYTHON="${PYTHON:-python3}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export LIBERO_CONFIG_PATH="$WORK/libero" NUMBA_CACHE_DIR="$WORK/numba" OMP_NUM_THREADS=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
limit=${LIMIT_S:-470}       # of everything, in seconds
cores=${CORES:-16}
end=$(($(date +%s) + limit))
mkdir -p "$WORK/logs"

log() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: with a log, a limit and a line in the summary
step() {
    local name=$1 seconds=$2 began=$SECONDS code
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$WORK/logs/$name.log" 2>&1
    code=$?
    log "$name: exit $code after $((SECONDS - began)) s of $seconds"
    if [[ $code -ne 0 ]]; then tail -n 5 "$WORK/logs/$name.log" | cut -c 1-300 | tee -a "$out/summary.txt"; fi
    return "$code"
}

look() { # whether a picture of a scene can be rendered
    "$PYTHON" - <<'PY'
import numpy as np, torch
from geomcache.simulator.environments import LiberoGeometry, make_environment
config = LiberoGeometry(task="libero_object", observation_height=64, observation_width=64, oracle_outputs="ray,depth", oracle_grid="8x8")
config.prepare()
environment = make_environment(config, "libero_object", 0, 0, 1)
observation, _ = environment.reset(seed=0)
pictures = list(observation["pixels"].values())
assert all(picture.std() > 10 for picture in pictures), [picture.std() for picture in pictures]
print("pictures", [round(float(picture.std()), 1) for picture in pictures], torch.cuda.is_available())
environment.close()
PY
}

export MUJOCO_GL="${MUJOCO_GL:-egl}"
export -f look
if ! step "look-$MUJOCO_GL" 60 bash -c look; then
    export MUJOCO_GL=osmesa LD_LIBRARY_PATH="${OSMESA_LIBRARIES:-}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    step look-osmesa 60 bash -c look || { log "no renderer works"; exit 1; }
    export STATES=0:2  # rendering is slower: half the demonstrations
fi
log "rendering with $MUJOCO_GL"

export PROCESSES=$cores
step demonstrate 100 pipelines/worth/worth.sh demonstrate || exit 1
step record 180 pipelines/worth/worth.sh record || log "some recordings are missing"

learners=()
learn() { # ARM: from as many seeds as fit
    ARMS=$1 LEARN_ARGS="${LEARN_ARGS:-} --until $((end - 25))" step "learn-$1" $((end - $(date +%s) - 15)) pipelines/worth/worth.sh learn
}
for arm in ${FIRST_ARMS:-none rays rays_depth other_rays rays_align rays_depth_align blind}; do
    learn "$arm" &
    learners+=($!)
done
{
    EXTRACTORS=${EXTRACTORS:-6} step extract 120 pipelines/worth/worth.sh extract
    for arm in ${LATE_ARMS:-random_da3}; do learn "$arm" & done
    wait
} &
learners+=($!)

closed() { # ARM: as soon as its first seed is learned
    until [[ -e "$WORK/open_loop/$1.0.csv" ]]; do
        if [[ $(date +%s) -ge $((end - 60)) ]]; then log "closed $1: not learned in time"; return; fi
        sleep 1
    done
    CLOSED_ARMS=$1 EVALUATORS=${EVALUATORS:-4} step "closed-$1" $((end - $(date +%s) - 12)) pipelines/worth/worth.sh closed
}
for arm in none rays rays_depth; do
    closed "$arm" &
    learners+=($!)
done
wait "${learners[@]}"

step report 40 pipelines/worth/worth.sh report
cat "$WORK"/open_loop/*.csv 2>/dev/null | awk 'NR == 1 || !/^arm,/' >"$out/open_loop.csv"
for arm in none rays rays_depth; do cp "$WORK/closed/$arm.csv" "$out/closed_$arm.csv" 2>/dev/null; done
cp "$WORK"/report/*.png "$WORK"/report/*.md "$out/" 2>/dev/null
tail -n 200 "$WORK"/logs/*.log 2>/dev/null | cut -c 1-300 >"$out/logs.txt"
log "done"
cat "$out/summary.txt" "$WORK/report/open_loop.md" 2>/dev/null
