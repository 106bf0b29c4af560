#!/usr/bin/env bash
# The main job on three short episodes that ship with the repository, in about a minute on two CPU cores.
#
#   make demo                    DA3-SMALL with random weights: shows that everything works, not what DA3 sees
#   make demo MODEL=DA3-SMALL    the published weights, from the Hugging Face Hub
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=outputs/demo
CACHE=$OUT/libero_object_demo.zarr
mkdir -p "$OUT"

BOLD="" PLAIN=""
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then BOLD=$'\033[1m' PLAIN=$'\033[0m'; fi
step() { printf '\n%s== %s%s\n' "$BOLD" "$*" "$PLAIN"; }

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
  *      geomcache extract --model DA3-LARGE-1.1 \                       *
  *          --dataset HuggingFaceVLA/libero --output libero.zarr        *
  ************************************************************************
NOTE
fi

step "Stage one: DA3 once over every frame, into a cache"
geomcache extract --model "$MODEL" --dataset geomcache/libero_object_demo --root examples/libero_object_demo \
  --output "$CACHE" --process-res 112 --overwrite

step "The same command again: nothing is left to do"
geomcache extract --model "$MODEL" --dataset geomcache/libero_object_demo --root examples/libero_object_demo \
  --output "$CACHE" --process-res 112

step "What is in the cache"
geomcache info "$CACHE"

step "What DA3 makes of one frame's two views"
geomcache probe --model "$MODEL" --image examples/front.png --image examples/wrist.png --output "$OUT" --process-res 252

step "Stage two: 20 steps of a small Pi0.5 with geometry tokens, from the cache, no DA3 in the loop"
rm -rf "$OUT/train"
if ! geomcache train --cache "$CACHE" \
  --dataset.repo_id=geomcache/libero_object_demo --dataset.root=examples/libero_object_demo --dataset.video_backend=pyav \
  --policy.model_size=small --policy.device=cpu --policy.image_resolution='[112,112]' --policy.geom_target_hw='[8,8]' \
  --policy.chunk_size=10 --policy.n_action_steps=10 --policy.max_action_dim=7 --policy.max_state_dim=8 \
  --policy.tokenizer_max_length=112 --policy.optimizer_lr=1e-3 --policy.scheduler_warmup_steps=5 \
  --steps=20 --batch_size=8 --num_workers=1 --log_freq=5 --save_freq=20 --output_dir="$OUT/train" \
  >"$OUT/train.log" 2>&1; then
  tail -n 30 "$OUT/train.log" >&2
  exit 1
fi
grep -o 'step:.*' "$OUT/train.log"
CHECKPOINT=$OUT/train/checkpoints/last/pretrained_model
ls "$CHECKPOINT"

step "Inference: one prediction of that checkpoint, DA3 online"
python pipelines/predict_once.py --policy "$CHECKPOINT" --cache "$CACHE" --root examples/libero_object_demo \
  2>"$OUT/predict.log" || { tail -n 30 "$OUT/predict.log" >&2; exit 1; }

step "Parity: cached frames, encoded again"
geomcache verify "$CACHE" --parity 8 --root examples/libero_object_demo --device cpu

cat <<NOTE

Files to look at: $OUT/probe.png, $OUT/train.log, $CACHE
NOTE
