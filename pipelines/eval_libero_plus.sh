#!/usr/bin/env bash
# Success rates of a checkpoint on variants of LIBERO-Plus, an episode of each.
#
#   make eval-libero-plus POLICY=outputs/pi05_geometry/checkpoints/last/pretrained_model
#   make eval-libero-plus POLICY=... AXIS=robot SUITE=libero_goal N=30
#   make eval-libero-plus POLICY=... N=all ARGS='--policy.use_geom_prefix=false' OUTPUT=outputs/without
#
# Axes: camera, robot, language, noise, layout_level. Suites: libero_spatial, libero_object, libero_goal, libero_10;
# separate several by commas. N variants of each suite are run, at equal distances in LIBERO-Plus's order; all: every one.
# OUTPUT/episodes.csv has a row for each episode: start it again to resume, or several times to share the work.
# `geomcache compare` compares two such files.
set -euo pipefail
cd "$(dirname "$0")/.."

POLICY="${POLICY:-}"
AXIS="${AXIS:-camera}"
SUITE="${SUITE:-libero_object}"
N="${N:-100}"
OUTPUT="${OUTPUT:-outputs/eval-plus/${SUITE//,/+}-$AXIS}"
ARGS="${ARGS:-}"

if [[ -z "$POLICY" ]]; then
    echo "eval_libero_plus.sh: POLICY: expected a checkpoint, got none: name one with POLICY=FOLDER" >&2
    exit 2
fi
sample=("--env.sample=$N")
if [[ "$N" == all ]]; then sample=(); fi
read -ra more <<<"$ARGS"
geomcache eval --policy "$POLICY" --env.type=libero_plus_variants --env.task="$SUITE" --env.axis="$AXIS" \
    ${sample[@]+"${sample[@]}"} --eval.n_episodes=1 --eval.batch_size=1 --output_dir="$OUTPUT" ${more[@]+"${more[@]}"}
