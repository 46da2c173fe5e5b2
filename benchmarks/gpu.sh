#!/usr/bin/env bash
# Builds, tests, sanitises and measures on a machine with a GPU; needs no network. Under 9 minutes.
#
#   bash benchmarks/gpu.sh [--quick] [--out DIR] [build] [test] [sanitize] [bench]
#
# Without a stage: all four. A stage that fails or takes too long does not keep the next ones from
# running; the exit status is 0 only if all passed. CSVs go to DIR: benchmarks/results, or build/gpu
# with --quick. Uses the python3 of the machine (PYTHON=... for another), not the Makefile's.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage="usage: bash benchmarks/gpu.sh [--quick] [--out DIR] [build] [test] [sanitize] [bench]"
PYTHON=${PYTHON:-python3}
TOTAL_SECONDS=${TOTAL_SECONDS:-525} # of all stages; the start and the end take a few seconds more
declare -A share=([build]=70 [test]=170 [sanitize]=95 [bench]=190) # of it, by stage

out=""
logs=build/gpu
quick=""
stages=()
while (($#)); do
  case $1 in
    --quick) quick=--quick ;;
    --out)
      [[ -n ${2:-} ]] || { echo "$usage" >&2; exit 2; }
      out=$2 logs=$2
      shift
      ;;
    build | test | sanitize | bench) stages+=("$1") ;;
    -h | --help) echo "$usage"; exit 0 ;;
    *) echo "unknown argument: $1; $usage" >&2; exit 2 ;;
  esac
  shift
done
((${#stages[@]})) || stages=(build test sanitize bench)
if [[ -z $out ]]; then # a quick run's figures are not for the docs
  [[ -n $quick ]] && out=build/gpu || out=benchmarks/results
fi

command -v "$PYTHON" >/dev/null || { echo "benchmarks/gpu.sh: missing here: $PYTHON" >&2; exit 2; }
if [[ -z ${CUDACXX:-} ]] && command -v nvcc >/dev/null; then
  # The nvcc on PATH may be a wrapper, from which CMake cannot tell where the toolkit is: ask it.
  here=$(nvcc --dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p')
  [[ -x $here/nvcc ]] && export CUDACXX=$here/nvcc
fi
architecture=$("$PYTHON" -m benchmarks.gpu_requirements "${stages[@]}") || exit 2
PATH="$("$PYTHON" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH"
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PATH PYTHONPATH PYTHONUNBUFFERED=1
mkdir -p "$out" "$logs"

build() {
  CUDA=1 UEO_FAST_CUDA_ARCHITECTURES=$architecture "$PYTHON" setup.py build_ext --inplace &&
    "$PYTHON" -m ueo_fast.info
}

run_tests() {
  shopt -s nullglob
  local files=(tests/test_gpu*.py tests/test_patch_gpu.py tests/test_ueo_loss*.py) workers=()
  files+=(tests/test_channel_affine*.py tests/test_frozen_batch_norm*.py tests/test_layer_norm*.py)
  # A missing backend is a failure here, not a reason to skip.
  # What runs on the host is tested where there is no GPU. Most of the time is Triton compiling.
  "$PYTHON" -c "import xdist" 2>/dev/null && workers=(-n 4)
  UEO_FAST_REQUIRE_GPU=1 "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" \
    -k "not cuda_host and not cpp and not reference" "${files[@]}"
}

NOT_THERE=77 # exit status of a stage that cannot run
sanitize() {
  command -v compute-sanitizer >/dev/null || {
    echo "compute-sanitizer is not on PATH"
    return $NOT_THERE
  }
  # Without this name in it, the filter below would leave nothing to check.
  grep -qa 8ueo_fast4cuda ueo_fast/_cuda.so || { echo "no kernel of ours in _cuda.so"; return 1; }
  local tools=(memcheck racecheck initcheck) tool failed=0
  [[ -n $quick ]] && tools=(memcheck)
  for tool in "${tools[@]}"; do
    local options=(--tool "$tool" --kernel-regex kns=ueo_fast --error-exitcode 99)
    [[ $tool == memcheck ]] && options+=(--report-api-errors no) # torch's own probes
    echo "== $tool"
    # Every tensor an allocation of its own, or an access beyond one would go unnoticed.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${options[@]}" \
      "$PYTHON" -m benchmarks.sanitize_set cuda || failed=1
  done
  return $failed
}

bench() {
  local seconds=$(($1 > 40 ? $1 - 20 : $1)) start=$SECONDS failed=0 # it ends before it is stopped
  "$PYTHON" -m benchmarks.bench_ueo_loss_gpu \
    --seconds $((seconds * 6 / 10)) --out "$out" $quick || failed=1
  "$PYTHON" -m benchmarks.bench_affine_gpu \
    --seconds $((seconds - (SECONDS - start))) --out "$out" $quick || failed=1
  return $failed
}

# `timeout` runs programs, not functions: a stage is this script's function in a shell of its own.
export PYTHON out quick architecture NOT_THERE
export -f build run_tests sanitize bench
shares=0
for stage in "${stages[@]}"; do ((shares += share[$stage])); done
summary=() failures=0
for stage in "${stages[@]}"; do
  limit=$((TOTAL_SECONDS * share[$stage] / shares))
  function=$stage
  [[ $stage == test ]] && function=run_tests # `test` is the shell's own
  echo "== $stage (at most $limit s, log in $logs/gpu_$stage.log)"
  start=$SECONDS
  timeout -k 5 "$limit" bash -uo pipefail -c "$function $limit" >"$logs/gpu_$stage.log" 2>&1
  code=$?
  case $code in
    0) result=passed ;;
    124 | 137) result="timed out" ;;
    "$NOT_THERE") result="skipped: $(tail -n 1 "$logs/gpu_$stage.log")" ;;
    *) result="failed ($code)" ;;
  esac
  [[ $result == passed ]] && lines=4 || lines=40
  [[ $stage == bench ]] && lines=40
  tail -n $lines "$logs/gpu_$stage.log"
  case $result in passed) ;; *) failures=$((failures + 1)) ;; esac
  summary+=("$(printf '%-10s %5s s  %s' "$stage" $((SECONDS - start)) "$result")")
done

echo
printf '%s\n' "${summary[@]}"
if [[ " ${stages[*]} " == *" bench "* ]] && compgen -G "$out/*gpu*.csv" >/dev/null; then
  echo "CSVs are in $out; python -m benchmarks.render draws those of benchmarks/results in the docs"
fi
exit $((failures > 0))
