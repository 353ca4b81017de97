#!/usr/bin/env bash
# Checks a GPU's part of wengert in about nine minutes, what matters most first.  Nothing is downloaded, nothing waits for ever.
#
#   benchmarks/gpu_check.sh                    every stage, in this order: build streams sanitize gpu suite bench
#   benchmarks/gpu_check.sh sanitize bench     these; the build is in pyext already
#
# build     the extension, in place, for this GPU's architecture (or TORCH_CUDA_ARCH_LIST) and with MAX_JOBS compilers (one a core)
# streams   streams, CUDA graphs, fallbacks, every kernel once
# sanitize  racecheck, initcheck, memcheck and synccheck over one launch of every kernel (benchmarks/sanitize.sh)
# gpu       the rest of tests/gpu
# suite     random programs and the zoo of functions on the GPU
# bench     benchmarks/run.py, as many rows as there is time for
#
# PYTHON     the interpreter (default: python3), with torch, pytest, hypothesis, ninja and setuptools
# OUT        a folder for logs and figures (default: a new one below /tmp)
# SECONDS_*  the time for a stage, e.g. SECONDS_BENCH=300
#
# Exit status: 0; 1 if a stage failed or ran out of time; 2 where something needed is missing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
cores=$(nproc)
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONPATH="$PWD/pyext${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1 WENGERT_TEST_THREADS=1
# Shared by all that follows: a kernel is compiled once.
export WENGERT_CACHE_DIR=${WENGERT_CACHE_DIR:-$out/kernels}
export WENGERT_TEST_CACHE_DIR=$WENGERT_CACHE_DIR

declare -A limit=([build]=240 [streams]=110 [sanitize]=210 [gpu]=100 [suite]=80 [bench]=90)
order="build streams sanitize gpu suite bench"
read -r -a stages <<<"${*:-$order}"
for stage in "${stages[@]}"; do
  [[ -n ${limit[$stage]:-} ]] || { echo "gpu_check.sh: no stage is called '$stage'; there are: $order" >&2; exit 2; }
  variable=SECONDS_${stage^^}
  limit[$stage]=${!variable:-${limit[$stage]}}
done
[[ -n ${GPU_CHECK_STAGE:-} ]] || "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
  { echo "gpu_check.sh: '$python' has no PyTorch that can use a GPU here" >&2; exit 2; }

pytest() { "$python" -m pytest -o addopts= -p no:cacheprovider --tb=short "$@"; }

# The tests that pytest selects by these words, in as many processes as there are cores: they wait for the compiler of kernels.
in_parallel() {
  local name=$1 most=$2 collected shards pids=() status=0 k
  shift 2
  collected=$out/$name.tests
  pytest -q --collect-only "$@" 2>&1 | grep '::' >"$collected"
  [[ -s $collected ]] || { pytest --collect-only "$@" | tail -n 20; return 1; }
  shards=$((cores < most ? cores : most))
  rm -f "$out/$name".shard.*
  split -d -n "r/$shards" "$collected" "$out/$name.shard."
  for k in "$out/$name".shard.*; do
    # xargs: names of tests have blanks and brackets.
    xargs -d '\n' -a "$k" "$python" -m pytest -v -o addopts= -p no:cacheprovider --tb=short --maxfail=20 >"$k.log" 2>&1 &
    pids+=($!)
  done
  for k in "${pids[@]}"; do wait "$k" || status=1; done
  return $status
}

stage_build() {
  # Where the architecture is not given: this GPU's alone, which compiles fastest.
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
  WENGERT_CUDA=1 MAX_JOBS=${MAX_JOBS:-$cores} "$python" setup.py --quiet build_ext --inplace &&
    "$python" -c 'import torch, wengert; x = torch.rand(9, device="cuda"); print(wengert.jacobian(torch.sin, x).diagonal().sub(x.cos()).abs().max().item(), wengert.stats())'
}

stage_streams() { pytest -v tests/gpu/test_streams.py tests/gpu/test_each_kernel.py tests/gpu/test_manners.py; }

stage_sanitize() { PYTHON=$python SECONDS_EACH=52 benchmarks/sanitize.sh racecheck initcheck memcheck synccheck; }

stage_gpu() { in_parallel gpu 12 tests/gpu/test_static.py tests/gpu/test_every_primitive.py tests/gpu/test_libraries.py; }

stage_suite() { WENGERT_TEST_DEVICE=cuda in_parallel suite 12 tests/property tests/end_to_end; }

stage_bench() {
  # An interrupt ends it with the rows there are.
  "$python" benchmarks/run.py --device cuda --seconds 0.5 --no-slopes --json "$out/bench.json"
}

if [[ -n ${GPU_CHECK_STAGE:-} ]]; then # this script as it is called below, in a process group that a time limit ends
  [[ $GPU_CHECK_STAGE == build ]] || "$python" -c 'from wengert import _build_info; raise SystemExit(not _build_info.CUDA)' ||
    { echo "ERROR: there is no wengert built with CUDA; the stage build makes one"; exit 1; }
  "stage_$GPU_CHECK_STAGE"
  exit
fi

failed=()
for stage in "${stages[@]}"; do
  echo "== $stage (at most ${limit[$stage]} s)"
  log=$out/$stage.log begin=$SECONDS
  signal=$([[ $stage == bench ]] && echo INT || echo TERM)
  GPU_CHECK_STAGE=$stage OUT=$out timeout --signal "$signal" --kill-after 15 "${limit[$stage]}" benchmarks/gpu_check.sh "$stage" >"$log" 2>&1
  status=$?
  case $stage in
    build) tail -n "$([[ $status == 0 ]] && echo 3 || echo 60)" "$log" ;;
    bench) tail -n 80 "$log" ;;
    gpu | suite) # also of what was cut short
      grep -hE '^(FAILED|ERROR)|^E  ' "$log" "$out/$stage".shard.*.log | head -60
      grep -hoE ' (PASSED|FAILED|ERROR|SKIPPED) ' "$out/$stage".shard.*.log | sort | uniq -c
      echo "of $(wc -l <"$out/$stage.tests") tests"
      ;;
    *) # also of what was cut short
      grep -oE ' (PASSED|FAILED|ERROR|SKIPPED) ' "$log" | sort | uniq -c
      grep -E '^(FAILED|ERROR|E  |==|sanitize.sh)|passed|failed|ERROR SUMMARY|========= (Error|Warning|Invalid|Uninit|Race)' "$log" | head -60 ;;
  esac
  echo "-- $stage: status $status, $((SECONDS - begin)) s, $log"
  if [[ $status == 124 || $status == 137 ]]; then echo "   out of time"; fi
  if [[ $status != 0 && ! ($stage == bench && $status == 124) ]]; then
    failed+=("$stage")
    [[ $stage == build ]] && break
  fi
done
if ((${#failed[@]})); then
  echo "gpu_check.sh: not well: ${failed[*]}"
  exit 1
fi
echo "gpu_check.sh: all is well: ${stages[*]}"
