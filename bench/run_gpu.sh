#!/bin/sh
# Everything that waits for a GPU, on any CUDA machine, from a checkout: build, tests, parity, benches, plots.
#
#   bench/run_gpu.sh [folder]        results: the folder, else $OUT, else bench/results/gpu
#
# PYTHON picks the interpreter (torch with CUDA, triton, torchrl and tensordict must be there). SECONDS_LEFT is
# how long it may take (default 520): suites that do not fit are left for the next call, which goes on where this
# one stopped (what is recorded for the same code is not measured again). Nothing here stops at a failure: what
# failed says so in its log, and in the exit status.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
RESULTS=${1:-${OUT:-bench/results/gpu}}
END=$(($(date +%s) + ${SECONDS_LEFT:-520}))
mkdir -p "$RESULTS"
failed=0

left() { echo $((END - $(date +%s))); }

# step NAME SECONDS COMMAND...: with its output in a log; not again if it went well before, for the same commit.
step() {
  name=$1 limit=$2
  shift 2
  mark="$RESULTS/$name.done"
  state=$(git rev-parse HEAD 2>/dev/null || date +%s) # without git nothing counts as done
  state="$state $(git diff HEAD 2>/dev/null | cksum)"
  [ -f "$mark" ] && [ "$(cat "$mark")" = "$state" ] && { echo "$name: done before"; return; }
  [ "$(left)" -lt 20 ] && { echo "$name: no time left"; failed=1; return; }
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  echo "$name: at most $limit s"
  if timeout "$limit" "$@" >"$RESULTS/$name.log" 2>&1; then
    echo "$state" >"$mark"
  else
    echo "$name: exit status $?, see $RESULTS/$name.log"
    failed=1
  fi
  tail -n 3 "$RESULTS/$name.log"
}

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
  { echo "no CUDA device is visible to $PYTHON"; exit 1; }
step build 120 "$PYTHON" -m pip install --no-build-isolation --no-deps --quiet -e .
step doctor 60 "$PYTHON" -m fastwm doctor
step tests 150 "$PYTHON" -m pytest -m gpu -q tests
for suite in mlp rssm tdmpc2 rssm_v3 mbpo; do
  batches="1 64 1024 16384"
  [ "$suite" = mlp ] && batches="$batches 131072"
  # Parity comes first in each configuration: who is red gets no number.
  # shellcheck disable=SC2086
  step "bench-$suite" 200 "$PYTHON" -m fastwm bench --device cuda --suite "$suite" --horizon 15 \
    --batch $batches --seconds 3 --rounds 5 25 --results "$RESULTS"
done
step world-model-loss 60 "$PYTHON" bench/world_model_loss.py --device cuda --batch 256 --batch 16384 \
  --rounds 50 --results "$RESULTS/world_model_loss.jsonl"
# racecheck sees shared memory; a tile's scratch is global, whose barriers the tests watch in the interpreter.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -x \
      tests/kernels/test_on_a_gpu.py -k sanitized
  done
else
  echo "compute-sanitizer is not here: not run"
fi
exit $failed
