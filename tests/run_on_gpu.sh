#!/usr/bin/env bash
# All tests and benchmarks that need an NVIDIA GPU, and a short table last. With several GPUs ranks are on all of
# them too; with one they share it, and what needs two is skipped with the reason.
#
#   tests/run_on_gpu.sh [folder for logs, JSON and pictures]
#
# Wants the package installed (or on PYTHONPATH) beside torch and pytest. By default it takes some 20 minutes.
#   STEPS          which of: tests models expandable async soak memcheck racecheck bench truth loading tune links
#                  steps architectures; all but the sanitizer's, loading, tune, links and architectures if not said
#   SOAK_SECONDS   length of the random test (45)
#   BENCH_SECONDS  the measurements take no longer (150)
#   SANITIZER=1    adds compute-sanitizer over a reduced set (memcheck, racecheck)
#   LAUNCH         a built bench `cuda_launch` (cargo bench --no-run --features cuda-pin --bench cuda_launch)
#   PYTHON         the interpreter (python3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-$(mktemp -d)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
steps=${STEPS:-tests models expandable async soak bench truth steps}
[[ ${SANITIZER:-0} == 1 ]] && steps+=" memcheck racecheck"
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/tests/python:$PWD/tests/python/gpu
# NVLink multicast is not needed, and a program that ends badly while it uses it can harm the whole server.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
names=()
declare -A verdict seconds
pytest=("$python" -m pytest -q --import-mode=importlib -p no:cacheprovider -c tests/python/gpu/pytest.ini
  --rootdir tests/python/gpu --confcutdir tests/python/gpu)

# step NAME LIMIT COMMAND...: runs it for no longer than so many seconds.
step() {
  local name=$1 limit=$2 code started=$SECONDS
  shift 2
  echo "== $name"
  timeout --kill-after=15 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  names+=("$name")
  seconds[$name]=$((SECONDS - started))
  case $code in
    0) verdict[$name]=passed ;;
    124 | 137) verdict[$name]="FAILED: not done in $limit s" ;;
    *) verdict[$name]="FAILED ($code)" ;;
  esac
  tail -n "${LINES_SHOWN:-5}" "$out/$name.log"
}

wants() { [[ " $steps " == *" $1 "* ]]; }

# An allocator whose memory no peer can map by itself.
with_allocator() {
  local name=$1 setting=$2
  PYTORCH_CUDA_ALLOC_CONF=$setting PYTORCH_ALLOC_CONF=$setting step "$name" 120 "${pytest[@]}" \
    tests/python/gpu -k "(proved and float16 and not context) or test_graphs or test_small_set"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
nvidia-smi topo -m 2>/dev/null | sed -n '/GPU0/p;/GPU1/p'
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 1
echo "$gpus GPU(s)"
((gpus > 0)) || { echo 'no GPU that torch can use: nothing to run' >&2; exit 1; }
mapfile -t devices < <(for ((i = 0; i < gpus; i++)); do echo "cuda:$i"; done)

models=(tests/python/gpu/test_{models,plans,captured,products,uneven,command}_on_gpu.py)
wants tests && step tests 360 "${pytest[@]}" -rf --durations=10 "${models[@]/#/--ignore=}" tests/python/gpu
# With several GPUs most of them run twice.
wants models && step models $((gpus > 1 ? 900 : 600)) "${pytest[@]}" -rf --durations=10 "${models[@]}"
wants expandable && with_allocator expandable expandable_segments:True
wants async && with_allocator async backend:cudaMallocAsync
soak=${SOAK_SECONDS:-45}
wants soak && step soak $((soak + 90)) "$python" tests/python/gpu/soak.py --seconds "$soak" --devices "${devices[@]}"
for tool in memcheck racecheck; do
  wants "$tool" && step "$tool" 300 compute-sanitizer --tool "$tool" --error-exitcode 9 "${pytest[@]}" \
    tests/python/gpu/test_small_set.py
done
if wants bench; then
  launch=()
  if [[ -n ${LAUNCH:-} ]]; then
    timeout 60 "$LAUNCH" --bench >"$out/launch.json" && launch=(--launch "$out/launch.json")
  fi
  bench=${BENCH_SECONDS:-150}
  LINES_SHOWN=200 step bench $((bench + 120)) "$python" -m benches.gpus --out "$out" --seconds "$bench" "${launch[@]}"
fi
wants truth && LINES_SHOWN=40 step truth 600 "$python" benches/plan_truth.py --quick --full --json "$out/truth.json"
wants loading && LINES_SHOWN=12 step loading 240 "$python" benches/load_speed.py --json "$out/loading.json"
wants tune && LINES_SHOWN=60 step tune 300 "$python" -m benches.gpus.tune --out "$out"
wants links && ((gpus > 1)) && LINES_SHOWN=9 step links 120 "$python" -m benches.gpus.links --out "$out"
# For docs/architectures.md: tests/python/models/table.py --gpu takes its file.
wants architectures && step architectures 330 "$python" tests/python/models/try_on_gpu.py \
  --out "$out/architectures.json" --seconds 270
# Models on two GPUs where there are as many, else on one.
wants steps && LINES_SHOWN=60 step steps 300 "$python" benches/models_on_gpu.py --json "$out/steps.json"

echo
failed=0
printf '%-12s %8s  %s\n' step seconds verdict
for name in "${names[@]}"; do
  printf '%-12s %8d  %s\n' "$name" "${seconds[$name]}" "${verdict[$name]}"
  [[ ${verdict[$name]} == passed ]] || failed=1
done
exit $failed
