#!/usr/bin/env bash
# Builds, tests, measures and sanitises on a machine with a GPU, in one run that needs no network.
#
#   bash benchmarks/gpu.sh [--out DIR] [STEP ...]
#
# Steps, the most valuable first: build smoke cuda_checks loss affine counters triton_checks stalls.
# cuda_checks is cuda_tests, memcheck and racecheck side by side, triton_checks is triton_tests and
# initcheck; what measures runs alone. Without a name: all.
# TOTAL_SECONDS (590) is what all of them take together: each step has a limit of its own, and what
# it does not use goes to the next ones. A step that fails keeps none of them from running; with
# little time in all, the last ones get none.
#
# Logs and CSVs are in build/gpu/results. DIR (build/gpu) gets all of that as one file,
# gpu_results.tar.gz, and gpu_summary.txt, a page of it, both anew after every step. PYTHON names
# another interpreter than python3. The exit status is 0 only if all steps passed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage="usage: bash benchmarks/gpu.sh [--out DIR] [STEP ...]"
STEPS=(build smoke cuda_checks loss affine counters triton_checks stalls)
declare -A members=([cuda_checks]="cuda_tests memcheck racecheck"
  [triton_checks]="triton_tests initcheck") # of the others themselves
# Seconds that a step gets at least, and its share of what is left over; with 16 processors and a
# prebuilt library, all but the benchmarks and the checks end earlier.
declare -A least=([build]=20 [smoke]=45 [cuda_checks]=65 [loss]=40 [affine]=30 [counters]=25
  [triton_checks]=45 [stalls]=0)
declare -A share=([build]=0 [smoke]=0 [cuda_checks]=30 [loss]=140 [affine]=80 [counters]=5
  [triton_checks]=45 [stalls]=10)
BUILD_SECONDS=150 # where no library is prebuilt
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

if ! command -v nvidia-smi >/dev/null; then
  echo "benchmarks/gpu.sh: there is no GPU here (no nvidia-smi)" >&2
  exit 2
fi
# A python3 may be a script that calls another, which profilers would rather be given themselves.
PYTHON=$("${PYTHON:-python3}" -c "import sys; print(sys.executable)") || exit 2
PATH="$(dirname "$PYTHON"):$PATH" # cmake and ninja may be packages of it
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # for those that are not installed
workers=$(($(nproc) > 4 ? $(nproc) - 3 : 1)) # next to them run a controller and three sanitizers
export PYTHON PATH PYTHONPATH PYTHONUNBUFFERED=1 results workers
rm -rf "$results"
mkdir -p "$results" "$out"

ready() { # says what is here, too
  "$PYTHON" -m ueo_fast.info | tee "$results/info.txt"
  grep -q "^backend cuda .*ready" "$results/info.txt"
}
build() {
  local name
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total \
    --format=csv
  for name in nvcc cmake ninja c++ ncu compute-sanitizer; do
    echo "$name: $(command -v $name || echo missing)"
  done
  echo "$(nproc) processors"
  # In a copied tree, prebuilt libraries are used as they are if they run here.
  [[ ! -d build/cmake ]] && ready && { echo "using the prebuilt libraries"; return; }
  "$PYTHON" setup.py build_ext --inplace && ready
}

smoke() { # every kernel; Triton's compile while CUDA's run
  local failed=0
  "$PYTHON" -m benchmarks.sanitize_set triton --jobs "$workers" >"$results/smoke_triton.log" 2>&1 &
  "$PYTHON" -m benchmarks.sanitize_set cuda || failed=1
  wait $! || failed=1
  cat "$results/smoke_triton.log"
  return $failed
}

run_tests() { # BACKEND LIMIT; a missing backend is a failure here, not a reason to skip
  local parallel=() until=$(($(date +%s) + $2 - 12)) # then the rest is skipped: what failed is said
  # Neighbours, which share what Triton compiles, stay in one worker until another has nothing left.
  "$PYTHON" -c "import xdist" 2>/dev/null && parallel=(-n "$workers" --dist worksteal)
  # One compiler per worker: Inductor would start a pool of them in each.
  UEO_FAST_REQUIRE_GPU=1 TORCHINDUCTOR_COMPILE_THREADS=1 "$PYTHON" -m pytest -v --tb=short -r fE \
    -p no:cacheprovider --durations=15 "${parallel[@]}" --only-backend "$1" --until "$until" \
    tests/cuda/test_gpu.py tests/cuda/test_gpu_affine.py tests/cuda/test_gpu_sizes.py tests/patch/test_patch_gpu.py \
    tests/loss/test_ueo_loss*.py tests/affine/test_channel_affine*.py tests/affine/test_frozen_batch_norm.py \
    tests/affine/test_layer_norm.py
}
cuda_tests() { run_tests cuda "$1"; }
triton_tests() { run_tests triton "$1"; }

loss() { "$PYTHON" -m benchmarks.bench_ueo_loss_gpu --seconds $(($1 - 12)) --out "$results"; }
affine() { "$PYTHON" -m benchmarks.bench_affine_gpu --seconds $(($1 - 12)) --out "$results"; }

counters() { "$PYTHON" -m benchmarks.gpu_counters --out "$results"; }
stalls() { "$PYTHON" -m benchmarks.gpu_counters --section WarpStateStats --section SpeedOfLight; }

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
export -f ready build smoke run_tests cuda_tests triton_tests loss affine counters stalls
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

summarize() { # what comes back: a page to read, and everything
  local name trouble
  trouble="^(FAILED|ERROR|failed|E  )|^\[gw.* FAILED|[Ee]rror:"
  trouble+="|========= .*(Invalid|Error|Race|Uninit|hazard)"
  {
    for name in "${names[@]}"; do cat "$results/$name.status"; done
    for name in cuda_tests triton_tests; do
      [[ -f $results/$name.log ]] && echo "$name: $(tail -n 1 "$results/$name.log")"
    done
    cat "$results/report.txt"
    for name in "${names[@]}"; do
      grep -q "passed$\|skipped" "$results/$name.status" && continue
      echo "-- $name"
      grep -E "$trouble" "$results/$name.log" | cut -c1-180 | sort | uniq -c | sort -rn | head -n 12
      tail -n 3 "$results/$name.log" | cut -c1-180
    done
  } 2>/dev/null | head -c 9500 >"$out/gpu_summary.txt"
  tar -czf "$out/new.tar.gz" -C "$results" . && mv "$out/new.tar.gz" "$out/gpu_results.tar.gz"
}

deadline=$((TOTAL_SECONDS - 10)) # SECONDS is 0 where the script begins; the report takes some
names=() # of what has run
for ((i = 0; i < ${#steps[@]}; i++)); do
  step=${steps[i]} later=0 shares=0
  for other in "${steps[@]:i}"; do ((later += least[$other], shares += share[$other])); done
  left=$((deadline - SECONDS))
  spare=$((left > later ? left - later : 0))
  limit=$((least[$step] + (shares ? spare * share[$step] / shares : 0)))
  [[ $step == build && $limit -lt $BUILD_SECONDS ]] && limit=$BUILD_SECONDS
  ((limit < left)) || limit=$left
  read -ra now <<<"${members[$step]:-$step}"
  names+=("${now[@]}")
  if ((limit < 8)); then
    for name in "${now[@]}"; do
      printf '%-13s %4s s  no time was left\n' "$name" 0 | tee "$results/$name.status"
    done
    continue
  fi
  echo "== $step, at most $limit s"
  for name in "${now[@]}"; do run "$name" $limit & done
  wait
  summarize
done

timeout 20 "$PYTHON" -m benchmarks.gpu_tables "$results" >"$results/report.txt"
summarize
echo
cat "$out/gpu_summary.txt"
echo "cp $results/*.csv benchmarks/results && python -m benchmarks.render: draws the CSVs in the docs"
for name in "${names[@]}"; do grep -q "passed$" "$results/$name.status" || exit 1; done
