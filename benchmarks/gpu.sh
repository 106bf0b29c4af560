#!/usr/bin/env bash
# Measure what only a GPU can tell, in under 9 minutes on one H100: gpu.sh [FOLDER]
#
#   weights   DA3-LARGE with random weights, for all of the others
#   parity    how far numbers move with batch size, engine, dtype and device, and with what is wrong
#   forward   the encoder alone, eager and compiled, 1 to 32 frames
#   extract   the whole of stage one, about a minute of it, with each engine
#   infer     a chunk of actions with each engine and each target grid
#   train     a training step, batches of 8 and 32, target grids of 14x14 to 4x4
#   modes     a training step with tokens, with the alignment loss, and with both; only with STEPS=modes
#   verify    `geomcache extract` and `geomcache verify --parity`, as a user runs them
#
# Each step has a time limit of its own; one that fails or is cut off does not stop the others. FOLDER (outputs/gpu) gets
# log.txt, tables.jsonl with all tables, and summary.txt. STEPS="forward train" runs some of the steps.
# DA3=FOLDER takes that model instead of making one. SMALL=1 runs small sizes on a CPU, to see that nothing fails for
# silly reasons. Unpacked without an installation
# (PYTHONPATH, no registry), the script runs as well: PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=$(realpath -m "${1:-outputs/gpu}")
mkdir -p "$out"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export GEOMCACHE_BENCH_JSON="$out/tables.jsonl" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0

# step NAME SECONDS COMMAND...: with a log, a limit and a line in the summary
step() {
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  case " weights ${STEPS:-parity forward extract infer train verify} " in *" ${name%%-*} "*) ;; *) return 0 ;; esac
  timeout --signal=TERM --kill-after=10 "$limit" "$@" >"$work/log" 2>&1
  code=$?
  { printf '\n===== %s: %s\n' "$name" "$*"; tail -c 100000 "$work/log"; } >>"$out/log.txt"
  [ "$code" -eq 0 ] || failed=1
  printf '%-16s exit %3d  %4d s of %d\n' "$name" "$code" "$((SECONDS - began))" "$limit" | tee -a "$out/summary.txt"
}

bench() { # bench NAME SECONDS SCRIPT ARGUMENTS...
  local name=$1 limit=$2 script=$3
  shift 3
  step "$name" "$limit" "$python" "benchmarks/$script.py" "$@"
}

da3=${DA3:-$work/da3}
make_weights=(pipelines/make_random_da3.py --output "$da3")
demo=examples/libero_object_demo
if [ -n "${SMALL:-}" ]; then
  preset=da3-small res=56
  [ -e "$da3" ] || step weights 90 "$python" "${make_weights[@]}" --name "$preset"
  bench parity 300 bench_parity --da3 "$da3" --process-res 112 --frames 3 --device cpu --no-compile
  bench forward 120 bench_forward --da3 "$da3" --process-res $res --frames 1,2 --compiled "" --repeats 1
  bench extract-eager 120 bench_extract --model "$da3" --process-res $res --frames 200 --batch-size 4 \
    --num-workers 1 --root "$demo" --repeats 1 --no-memory
  bench infer 120 bench_infer --da3 "$da3" --process-res $res --cameras 2 --target-hw 4,2 --repeats 1
  bench train-8 180 bench_train --da3 "$da3" --process-res 70 --batch-size 2 --steps 2 --rounds 1 --target-hw 4,2 \
    --no-memory
  bench modes 400 bench_train --modes --da3 "$da3" --process-res 70 --batch-size 2 --steps 2 --rounds 1 --target-hw 14,7 \
    --no-memory
else
  preset=da3-large res=504
  [ -e "$da3" ] || step weights 90 "$python" "${make_weights[@]}" --name "$preset" --device cuda
  [ -e "$da3/model.safetensors" ] || step weights-cpu 120 "$python" "${make_weights[@]}" --name "$preset"
  bench parity 130 bench_parity --da3 "$da3"
  bench forward 120 bench_forward --da3 "$da3"
  bench extract-compiled 120 bench_extract --model "$da3" --engine compiled --root "$demo" --repeat-dataset 12 \
    --frames 4500 --repeats 1 --no-memory
  bench extract-eager 90 bench_extract --model "$da3" --engine eager --root "$demo" --repeat-dataset 6 \
    --frames 2200 --repeats 1 --no-memory
  bench infer 100 bench_infer --da3 "$da3" --cameras 2 --engines eager,compiled --target-hw 14,10,7,4 --repeats 8
  bench train-8 140 bench_train --da3 "$da3" --batch-size 8 --steps 4 --rounds 2 --target-hw 14,10,7,4
  bench train-32 140 bench_train --da3 "$da3" --batch-size 32 --steps 2 --rounds 1 --target-hw 14,7
  bench modes 240 bench_train --modes --da3 "$da3" --batch-size 32 --steps 2 --rounds 2 --target-hw 14,7
fi
cache=$work/verify.zarr
step verify-extract 90 "$python" -m geomcache extract --model "$da3" --dataset demo --root "$demo" --episodes 0 \
  --process-res $res --output "$cache"
step verify-parity 90 "$python" -m geomcache verify "$cache" --parity 16 --root "$demo"
cat "$out/summary.txt"
exit $failed
