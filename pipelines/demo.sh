#!/usr/bin/env bash
# The main job on three short episodes that ship with the repository, in about a minute on two CPU cores.
#
#   make demo                    DA3-SMALL with random weights, made here: shows that everything works, not what DA3 sees
#   make demo MODEL=DA3-SMALL    the published weights, from the Hugging Face Hub
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=outputs/demo
CACHE=$OUT/libero_object_demo.zarr
mkdir -p "$OUT"

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

MODEL=${MODEL:-}
if [ -z "$MODEL" ]; then
  MODEL=$OUT/da3-small-random
  step "A DA3-SMALL folder with seeded random weights"
  [ -f "$MODEL/model.safetensors" ] || python pipelines/make_random_da3.py --output "$MODEL"
  cat <<'NOTE'

  ************************************************************************
  *  RANDOM WEIGHTS: the geometry below means nothing. The real run is   *
  *      make demo MODEL=DA3-SMALL                                       *
  *  and for a whole dataset, on a GPU,                                  *
  *      geomcache extract --model DA3-LARGE \                           *
  *          --dataset HuggingFaceVLA/libero --output libero.zarr        *
  ************************************************************************
NOTE
fi

step "Stage one: DA3 once over every frame, into a cache"
geomcache extract --model "$MODEL" --dataset geomcache/libero_object_demo --root examples/libero_object_demo \
  --output "$CACHE" --process-res 112 --overwrite

step "The same command again: nothing is computed twice"
geomcache extract --model "$MODEL" --dataset geomcache/libero_object_demo --root examples/libero_object_demo \
  --output "$CACHE" --process-res 112

step "What is in the cache"
geomcache info "$CACHE"

step "What DA3 makes of one frame's two views"
geomcache probe --model "$MODEL" --image examples/front.png --image examples/wrist.png --output "$OUT" --process-res 252
