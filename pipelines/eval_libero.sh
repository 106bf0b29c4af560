#!/usr/bin/env bash
# Success rates of a checkpoint in LIBERO, with geometry encoded online.
#
#   make eval-libero                           the newest checkpoint under outputs/
#   make eval-libero POLICY=outputs/pi05_geometry/checkpoints/last/pretrained_model
#   make eval-libero POLICY=... SUITE=libero_object TASKS=0,1 N_EPISODES=1
#   make eval-libero POLICY=... ARGS='--policy.n_action_steps=10 --seed=7'     any option of lerobot-eval
#
# Suites: libero_spatial, libero_object, libero_goal, libero_10, libero_90; separate several by commas. LIBERO's assets
# come from the folder in LIBERO_ASSETS, otherwise from the extra libero-assets, which `make` installs. Rendering uses EGL
# on a GPU, otherwise OSMesa. OUTPUT/episodes.csv has a row for each episode: start it again to resume, or several times
# to share the work.
set -euo pipefail
cd "$(dirname "$0")/.."

POLICY="${POLICY:-}"
SUITE="${SUITE:-libero_10}"
TASKS="${TASKS:-}"            # numbers, such as 0,1; empty: all
N_EPISODES="${N_EPISODES:-10}" # for each task
OUTPUT="${OUTPUT:-outputs/eval/${SUITE//,/+}}"
ARGS="${ARGS:-}"

if [[ -z "$POLICY" ]]; then
    mkdir -p outputs
    # The link `last` is set when a checkpoint is complete.
    newest="$(find outputs -path '*/checkpoints/last' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-)"
    if [[ -z "$newest" ]]; then
        echo "eval_libero.sh: POLICY: expected a checkpoint under outputs/, found none: train one with \`geomcache train\`, or name one with POLICY=FOLDER" >&2
        exit 2
    fi
    POLICY="$(realpath --relative-to=. "$newest")/pretrained_model"
    echo "policy: $POLICY, the newest checkpoint under outputs/; choose another with POLICY=FOLDER"
fi

read -ra more <<<"$ARGS"
geomcache eval --policy "$POLICY" --env.type=libero --env.task="$SUITE" ${TASKS:+"--env.task_ids=[$TASKS]"} \
    --eval.n_episodes="$N_EPISODES" --eval.batch_size=1 --output_dir="$OUTPUT" ${more[@]+"${more[@]}"}
