#!/usr/bin/env bash
# Builds, tests, measures and sanitises on a machine with a GPU, in one run that needs no network.
#
#   bash benchmarks/gpu.sh [--out DIR] [STEP ...]
#
# Steps, the most valuable first: facts build smoke cuda_tests loss affine counters checks stalls;
# `checks` is memcheck, racecheck, initcheck and triton_tests side by side. Without a name: all.
# TOTAL_SECONDS (590) is what all of them take together: each step has a limit of its own, and what
# it does not use goes to the next ones. A step that fails keeps none of them from running.
#
# Logs and CSVs are in build/gpu/results; DIR (build/gpu) gets them as one file, gpu_results.tar.gz,
# and gpu_summary.txt, both anew after every step. PYTHON names another interpreter than python3.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage="usage: bash benchmarks/gpu.sh [--out DIR] [STEP ...]"
STEPS=(facts build smoke cuda_tests loss affine counters checks stalls)
# Seconds that a step gets at least, and its share of what is left over. Those of the tests and of
# the checks are for 16 processors.
declare -A least=([facts]=25 [build]=20 [smoke]=45 [cuda_tests]=60 [loss]=60 [affine]=30
  [counters]=35 [checks]=50 [stalls]=0)
declare -A share=([facts]=0 [build]=0 [smoke]=0 [cuda_tests]=10 [loss]=150 [affine]=60
  [counters]=10 [checks]=70 [stalls]=20)
BUILD_SECONDS=150 # where no built library came along
TOTAL_SECONDS=${TOTAL_SECONDS:-590}

out=build/gpu results=build/gpu/results steps=()
while (($#)); do
  case $1 in
    --out)
      [[ -n ${2:-} ]] || { echo "$usage" >&2; exit 2; }
      out=$2
      shift
      ;;
    -h | --help) echo "$usage; steps: ${STEPS[*]}"; exit 0 ;;
    *)
      [[ -n ${least[$1]:-} ]] || { echo "unknown step: $1; $usage" >&2; exit 2; }
      steps+=("$1")
      ;;
  esac
  shift
done
((${#steps[@]})) || steps=("${STEPS[@]}")

# A python3 may be a script that calls another, which profilers would rather be given themselves.
PYTHON=$("${PYTHON:-python3}" -c "import sys; print(sys.executable)") || exit 2
PATH="$(dirname "$PYTHON"):$PATH" # cmake and ninja may be packages of it
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # for those that are not installed
export PYTHON PATH PYTHONPATH PYTHONUNBUFFERED=1 results
rm -rf "$results"
mkdir -p "$results" "$out"

facts() {
  local name
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total \
    --format=csv || return
  for name in nvcc cmake ninja c++ ncu compute-sanitizer; do
    echo "$name: $(command -v $name || echo missing)"
  done
  nvcc --version | tail -n 2
  echo "$(nproc) processors"
  "$PYTHON" -m ueo_fast.info
}

build() { # of what came along built, only what runs here is kept
  "$PYTHON" -m ueo_fast.info | grep -q "^backend cuda .*ready" && { echo "came along built"; return; }
  "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m ueo_fast.info |
    grep "^CUDA library\|^backend cuda" | tee /dev/stderr | grep -q "^backend cuda .*ready"
}

smoke() { # every kernel; Triton's compile while CUDA's run
  local failed=0
  "$PYTHON" -m benchmarks.sanitize_set triton --jobs $(($(nproc) - 2)) >"$results/smoke_triton.log" 2>&1 &
  "$PYTHON" -m benchmarks.sanitize_set cuda || failed=1
  wait $! || failed=1
  cat "$results/smoke_triton.log"
  return $failed
}

run_tests() { # BACKEND LIMIT WORKERS; a missing backend is a failure here, no reason to skip
  local workers=() until=$(($(date +%s) + $2 - 12)) # then the rest is skipped: what failed is said
  "$PYTHON" -c "import xdist" 2>/dev/null && workers=(-n "$3")
  # One compiler per worker: Inductor would start a pool of them in each.
  UEO_FAST_REQUIRE_GPU=1 TORCHINDUCTOR_COMPILE_THREADS=1 "$PYTHON" -m pytest -v --tb=short -r fE -p no:cacheprovider --durations=15 \
    "${workers[@]}" --only-backend "$1" --until "$until" tests/test_gpu.py tests/test_gpu_affine.py \
    tests/test_gpu_sizes.py tests/test_patch_gpu.py tests/test_ueo_loss*.py \
    tests/test_channel_affine*.py tests/test_frozen_batch_norm.py tests/test_layer_norm.py
}
cuda_tests() { run_tests cuda "$1" $(($(nproc) - 2)); }
triton_tests() { run_tests triton "$1" $(($(nproc) - 3)); }

loss() { "$PYTHON" -m benchmarks.bench_ueo_loss_gpu --seconds $(($1 - 12)) --out "$results"; }
affine() { "$PYTHON" -m benchmarks.bench_affine_gpu --seconds $(($1 - 12)) --out "$results"; }

profile() { # what ncu says of one call of each case; the clocks stay as they are
  command -v ncu >/dev/null || { echo "ncu is not on PATH"; return "$NOT_THERE"; }
  ncu --clock-control none --target-processes all --kernel-name "regex:ueo_|channel_affine|layer_norm" \
    --csv --page raw --print-units base --log-file "$results/$1" "${@:2}" \
    "$PYTHON" -m benchmarks.gpu_kernels
}
counters() {
  local metrics=gpu__time_duration.sum,smsp__inst_executed.sum,launch__registers_per_thread
  metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,dram__bytes_read.sum,dram__bytes_write.sum
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
  profile ncu_counters.txt --metrics $metrics
  "$PYTHON" -m benchmarks.gpu_kernels --from "$results/ncu_counters.txt" --out "$results"
}
stalls() { profile ncu_stalls.txt --section WarpStateStats --section SpeedOfLight; }

sanitize() {
  command -v compute-sanitizer >/dev/null || {
    echo "compute-sanitizer is not on PATH"
    return "$NOT_THERE"
  }
  # Without this name in it, the filter below would leave nothing to check.
  grep -qa 8ueo_fast4cuda ueo_fast/_cuda.so || { echo "no kernel of ours in _cuda.so"; return 1; }
  local options=(--tool "$1" --kernel-name kns=ueo_fast --error-exitcode 99)
  [[ $1 == memcheck ]] && options+=(--report-api-errors no) # torch's own probes
  # Every tensor an allocation of its own, or an access beyond one would go unnoticed.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${options[@]}" \
    "$PYTHON" -m benchmarks.sanitize_set cuda
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
initcheck() { sanitize initcheck; }

# `timeout` runs programs, not functions: a step is this script's function in a shell of its own.
NOT_THERE=77 # exit status of a step that cannot run here
export NOT_THERE
export -f facts build smoke run_tests cuda_tests triton_tests loss affine profile counters stalls
export -f sanitize memcheck racecheck initcheck

run() { # NAME LIMIT: leaves NAME.log and NAME.status
  local start=$SECONDS code state
  timeout -k 3 $(($2 - 3)) bash -uo pipefail -c "$1 $2" >"$results/$1.log" 2>&1
  code=$?
  case $code in
    0) state=passed ;;
    124 | 137) state="timed out" ;;
    "$NOT_THERE") state="skipped: $(tail -n 1 "$results/$1.log")" ;;
    *) state="failed ($code)" ;;
  esac
  printf '%-13s %4s s  %s\n' "$1" $((SECONDS - start)) "$state" >"$results/$1.status"
  cat "$results/$1.status"
}

summarize() {
  local name file
  {
    for name in facts build smoke cuda_tests loss affine counters memcheck racecheck initcheck \
      triton_tests stalls; do
      [[ -f $results/$name.status ]] && cat "$results/$name.status"
    done
    for file in "$results"/*_tests.log; do
      [[ -f $file ]] && echo "$(basename "$file"): $(tail -n 1 "$file")"
    done
    for name in loss affine counters; do
      [[ -f $results/$name.log ]] && sed -n '/^us, /,$p' "$results/$name.log" | head -n 45
    done
    for file in "$results"/*.status; do
      grep -q "passed$\|skipped" "$file" && continue
      name=$(basename "$file" .status)
      echo "-- $name"
      grep -E "^(FAILED|ERROR|failed|E  )|^\[gw.* FAILED|========= .*(Invalid|Error|Race|Uninit|hazard)|Error:|error:" \
        "$results/$name.log" | sort | uniq -c | sort -rn | cut -c1-180 | head -n 12
      tail -n 3 "$results/$name.log" | cut -c1-180
    done
  } 2>/dev/null | cut -c1-240 | head -c 9500 >"$out/gpu_summary.txt"
  tar -czf "$out/gpu_results.tar.gz.new" -C "$results" . &&
    mv "$out/gpu_results.tar.gz.new" "$out/gpu_results.tar.gz"
}

if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "benchmarks/gpu.sh: $PYTHON has no torch that can use a GPU here" >&2
  exit 2
fi
deadline=$((TOTAL_SECONDS - 3)) # SECONDS is 0 where the script begins
for ((i = 0; i < ${#steps[@]}; i++)); do
  step=${steps[i]} later=0 shares=0
  for other in "${steps[@]:i}"; do ((later += least[$other], shares += share[$other])); done
  left=$((deadline - SECONDS))
  spare=$((left > later ? left - later : 0))
  limit=$((least[$step] + (shares ? spare * share[$step] / shares : 0)))
  [[ $step == build && $limit -lt $BUILD_SECONDS ]] && limit=$BUILD_SECONDS
  ((limit < left)) || limit=$left
  if ((limit < 8)); then
    printf '%-13s %4s s  no time was left\n' "$step" 0 | tee "$results/$step.status"
    continue
  fi
  echo "== $step, at most $limit s"
  if [[ $step == checks ]]; then
    for name in memcheck racecheck initcheck triton_tests; do run $name $limit & done
    wait
  else
    run "$step" $limit
  fi
  summarize
done

echo
cat "$out/gpu_summary.txt"
for file in "$results"/*.status; do
  grep -q "passed$" "$file" || exit 1
done
