#!/usr/bin/env bash
# Runs the tests on the GPU under every tool of compute-sanitizer.
#
#   benchmarks/sanitize.sh                       all four tools
#   benchmarks/sanitize.sh memcheck racecheck    these
#
# PYTHON                    the interpreter that has wengert (default: python)
# SECONDS_EACH              the time for one tool (default: no limit)
# WENGERT_SANITIZE_TESTS    what pytest runs (default: one launch of every kernel; a tool slows kernels 10 to 100 times)
# WENGERT_SANITIZE_KERNELS  parts of the names of the kernels to check (default: those of this library; empty, and for initcheck
#                           always: PyTorch's as well)
#
# Exit status: 0; 1 if a tool found an error or a test failed; 2 where something needed is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
read -r -a tests <<<"${WENGERT_SANITIZE_TESTS:-tests/gpu/test_each_kernel.py}"
read -r -a kernels <<<"${WENGERT_SANITIZE_KERNELS-wengert materialize segment_sum small_matmul}"

missing() {
  echo "sanitize.sh: $1" >&2
  exit 2
}

known="memcheck racecheck synccheck initcheck"
read -r -a tools <<<"${*:-$known}"
for tool in "${tools[@]}"; do
  [[ " $known " == *" $tool "* ]] || missing "no tool is called '$tool'; there are: $known"
done
command -v compute-sanitizer >/dev/null || missing "compute-sanitizer was not found; it comes with the CUDA toolkit: add its bin folder to PATH"
command -v "$python" >/dev/null || missing "'$python' was not found; PYTHON names the interpreter that has wengert"
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
  missing "'$python' has no PyTorch that can use a GPU here"

options=(--target-processes all --error-exitcode 99 --print-limit 20)
named=()
for kernel in "${kernels[@]}"; do named+=(--kernel-name "kernel_substring=$kernel"); done

# The caching allocator hands out parts of large blocks: an access beyond a tensor, or of memory never written, would look right.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
export WENGERT_TEST_DEVICE=cuda

failed=()
for tool in "${tools[@]}"; do
  echo "== $tool"
  chosen=("${options[@]}" "${named[@]}")
  [[ $tool == initcheck ]] && chosen=("${options[@]}") # of what PyTorch's kernels write it knows only if it watches them
  timeout "${SECONDS_EACH:-0}" compute-sanitizer --tool "$tool" "${chosen[@]}" "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" ||
    failed+=("$tool")
done
if ((${#failed[@]})); then
  echo "sanitize.sh: failed under ${failed[*]}" >&2
  exit 1
fi
echo "sanitize.sh: clean under ${tools[*]}"
