#!/usr/bin/env bash
# Runs the tests on the GPU under every tool of compute-sanitizer.
#
#   benchmarks/sanitize.sh                       all four tools
#   benchmarks/sanitize.sh memcheck racecheck    these
#
# PYTHON                    the interpreter that has wengert (default: python)
# WENGERT_SANITIZE_TESTS    the tests, as pytest's -k takes them (default: a selection; a tool slows kernels 10 to 100 times)
# WENGERT_SANITIZE_KERNELS  part of the names of the kernels to check (default: wengert; empty: PyTorch's kernels as well)
#
# Exit status: 0; 1 if a tool found an error or a test failed; 2 where something needed is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
tests=${WENGERT_SANITIZE_TESTS:-test_problems or test_conventions or test_semantics or test_structure}
kernels=${WENGERT_SANITIZE_KERNELS-wengert}

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
[[ -z $kernels ]] || options+=(--kernel-name "kernel_substring=$kernels")

# The caching allocator hands out parts of large blocks: an access beyond a tensor, or of memory never written, would look right.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
export WENGERT_TEST_DEVICE=cuda

failed=()
for tool in "${tools[@]}"; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" "${options[@]}" "$python" -m pytest tests -p no:cacheprovider -k "$tests" || failed+=("$tool")
done
if ((${#failed[@]})); then
  echo "sanitize.sh: failed under ${failed[*]}" >&2
  exit 1
fi
echo "sanitize.sh: clean under ${tools[*]}"
