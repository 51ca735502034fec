#!/usr/bin/env bash
# All tests and benchmarks that need an NVIDIA GPU, and a short table last.
#
#   tests/run_on_gpu.sh [folder for JSON and pictures]
#
# Wants the package installed (or on PYTHONPATH) beside torch and pytest. SOAK_SECONDS sets the length of the random
# test, SANITIZER=1 adds compute-sanitizer over a reduced set, LAUNCH names a built bench `cuda_launch`
# (cargo bench --no-run --features cuda-pin --bench cuda_launch).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-$(mktemp -d)}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/tests/python:$PWD/tests/python/gpu
declare -A verdict
pytest=("$python" -m pytest -q --import-mode=importlib -p no:cacheprovider -c tests/python/gpu/pytest.ini
  --rootdir tests/python/gpu --confcutdir tests/python/gpu)

step() {
  local name=$1
  shift
  echo "== $name"
  if "$@" >"$out/$name.log" 2>&1; then verdict[$name]=passed; else verdict[$name]=FAILED; fi
  tail -n "${LINES_SHOWN:-5}" "$out/$name.log"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
step tests "${pytest[@]}" tests/python/gpu
# The allocator whose memory no peer can map by itself.
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTORCH_ALLOC_CONF=expandable_segments:True \
  step expandable "${pytest[@]}" tests/python/gpu -k "sum_in_rank_order and float16 or gathers and float16"
step soak "$python" tests/python/gpu/soak.py --seconds "${SOAK_SECONDS:-60}"
if [[ ${SANITIZER:-0} == 1 ]]; then
  for tool in memcheck racecheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "${pytest[@]}" tests/python/gpu/test_small_set.py
  done
fi
launch=()
if [[ -n ${LAUNCH:-} ]]; then
  "$LAUNCH" --bench >"$out/launch.json" && launch=(--launch "$out/launch.json")
fi
LINES_SHOWN=30 step bench "$python" benches/cuda.py --json "$out/cuda.json" "${launch[@]}"
echo
failed=0
for name in "${!verdict[@]}"; do
  printf '%-12s %s\n' "$name" "${verdict[$name]}"
  [[ ${verdict[$name]} == passed ]] || failed=1
done
exit $failed
