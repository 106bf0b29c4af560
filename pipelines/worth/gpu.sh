#!/usr/bin/env bash
# The experiment on one GPU in 13 minutes: gpu.sh [FOLDER]
#
# Runs the stages of worth.sh side by side, each with a time limit; what is cut off does not stop the rest. FOLDER
# (outputs/worth/gpu) gets the results, small files alone. Needs what worth.sh needs, or the archives of a machine
# without a registry, unpacked into one folder that PYTHONPATH names (gpu_pack.sh).
#
#   0 s     is EGL there? otherwise OSMesa
#   30 s    demonstrations, then their recordings, each in a process of its own; the processor is what is short, so
#           that nothing runs next to them
#   380 s   the arms of GPU_ARMS learn, all at once, from as many seeds as fit: 100 to 155 s each
#           as soon as the first seed of an arm is learned: closed loop, on the processor next to the learners
#   740 s   tables, plots
#
# LIMIT_S is the whole time in seconds. Where a command may not last so long, start this with `setsid` and read
# FOLDER/summary.txt.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
out=$(realpath -m "${1:-outputs/worth/gpu}")
mkdir -p "$out"
export SIZE="${SIZE:-gpu}" WORK="${WORK:-$out/work}" PYTHON="${PYTHON:-python3}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export LIBERO_CONFIG_PATH="$WORK/libero" NUMBA_CACHE_DIR="$WORK/numba" OMP_NUM_THREADS=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
limit=${LIMIT_S:-780}       # of everything, in seconds
cores=${CORES:-16}
end=$(($(date +%s) + limit))
mkdir -p "$WORK/logs"

log() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: with a log, a limit and a line in the summary
step() {
    local name=$1 seconds=$(($2 * ${SLOWNESS:-1})) began=$SECONDS code
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$WORK/logs/$name.log" 2>&1
    code=$?
    log "$name: exit $code after $((SECONDS - began)) s of $seconds"
    if [[ $code -ne 0 ]]; then tail -n 5 "$WORK/logs/$name.log" | cut -c 1-300 | tee -a "$out/summary.txt"; fi
    return "$code"
}

look() { # render a scene, and say how fast
    "$PYTHON" - <<'PY'
import time

import numpy as np

from geomcache.simulator.environments import LiberoGeometry, make_environment

size = {"observation_height": 112, "observation_width": 112}
config = LiberoGeometry(task="libero_object", oracle_outputs="ray,depth", oracle_grid="8x8", **size)
config.prepare()
environment = make_environment(config, "libero_object", 0, 0, 1)
began = time.perf_counter()
observation, _ = environment.reset(seed=0)
built = time.perf_counter()
for _ in range(20):
    environment.step(np.zeros(7))
stepped = (time.perf_counter() - built) / 20
contrast = [float(picture.std()) for picture in observation["pixels"].values()]
assert min(contrast) > 10, f"pictures show nothing, deviations {contrast}"
print(f"contrast {contrast}, built in {built - began:.1f} s, a step {1000 * stepped:.0f} ms")
environment.close()
PY
}

# Libraries that a bare machine lacks, if this was unpacked from gpu_pack.sh's archive: LIBRARIES names its folder.
if [[ -n "${LIBRARIES:-}" ]]; then
    if ! ldconfig -p | grep libEGL.so.1 >/dev/null; then
        for package in "$LIBRARIES"/.gl/*.deb; do dpkg -x "$package" /; done
    fi
    ldconfig
    vendor=/usr/local/nvidia/share/glvnd/egl_vendor.d/10_nvidia.json  # where such a machine has NVIDIA's EGL
    if [[ -e "$vendor" ]]; then export __EGL_VENDOR_LIBRARY_FILENAMES="$vendor"; fi
fi
unset CUDA_VISIBLE_DEVICES  # robosuite takes EGL's device from it, and wants a number
export MUJOCO_GL="${MUJOCO_GL:-egl}" MUJOCO_EGL_DEVICE_ID=0
export -f look
if ! step "look-$MUJOCO_GL" 90 bash -c look; then
    export MUJOCO_GL=osmesa
    if [[ -n "${LIBRARIES:-}" ]]; then
        for library in "$LIBRARIES"/.osmesa/*; do
            if ! ldconfig -p | grep "$(basename "$library")" >/dev/null; then cp "$library" /usr/local/lib/; fi
        done
        ldconfig
    fi
    step look-osmesa 60 bash -c look || { log "no renderer works"; exit 1; }
    export STATES=0:3  # rendering is slower: fewer demonstrations, one of three held out
fi
log "rendering with $MUJOCO_GL: $(tail -n 1 "$WORK/logs/look-$MUJOCO_GL.log")"

export PROCESSES=$((2 * cores))  # they wait for the GPU in turns
step demonstrate 200 pipelines/worth/worth.sh demonstrate || exit 1
step record 300 pipelines/worth/worth.sh record || log "some recordings are missing"
"$PYTHON" pipelines/worth/redundancy.py --frames "$WORK/frames" --caches "$WORK/recorded" >"$WORK/redundancy.md" 2>&1 &

learners=()
learn() { # ARM: from as many seeds as fit
    ARMS=$1 LEARN_ARGS="${LEARN_ARGS:-} --until $((end - 55))" step "learn-$1" $((end - $(date +%s) - 45)) pipelines/worth/worth.sh learn
}
for arm in ${GPU_ARMS:-none rays rays_depth other_rays rays_align blind none_no_hand rays_no_hand rays_depth_no_hand other_rays_no_hand}; do
    learn "$arm" &
    learners+=($!)
done

closed() { # ARM: as soon as its first seed is learned
    until [[ -e "$WORK/open_loop/$1.0.csv" ]]; do
        if [[ $(date +%s) -ge $((end - 60)) ]]; then log "closed $1: not learned in time"; return; fi
        sleep 1
    done
    CLOSED_ARMS=$1 EVALUATORS=${EVALUATORS:-4} step "closed-$1" $((end - $(date +%s) - 42)) pipelines/worth/worth.sh closed
}
for arm in ${CLOSED_LOOP:-none_no_hand rays_no_hand rays_depth_no_hand}; do
    closed "$arm" &
    learners+=($!)
done
wait "${learners[@]}"

step report 40 pipelines/worth/worth.sh report
cat "$WORK"/open_loop/*.csv 2>/dev/null | awk 'NR == 1 || !/^arm,/' >"$out/open_loop.csv"
for file in "$WORK"/closed/*.csv*; do cp "$file" "$out/closed_$(basename "$file")"; done
tar czf "$out/report.tar.gz" -C "$WORK" report parts.txt redundancy.md 2>/dev/null
for file in "$WORK"/logs/*.log; do printf '\n===== %s\n' "$file"; tail -n 60 "$file" | cut -c 1-300; done >"$out/logs.txt"
log "done"
cat "$out/summary.txt" "$WORK/report/open_loop.md" 2>/dev/null
