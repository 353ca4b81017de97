# make demo    set up .venv if needed, build the extension, run examples/quickstart.py
# make test    the same set-up, then the tests
# make opdb    the whole operator database instead of the sample that `make test` takes
# make fuzz    20,000 random programs in two processes, some two hours; FUZZ_COUNT and FUZZ_SEED choose others
# make cuda-check  the build with CUDA, in an environment of its own (.venv-cuda), and the tests under it; needs nvcc, but no GPU
# make asan    a build with AddressSanitizer beside the normal one, and the tests of what writes memory under it; make tsan: with
#              ThreadSanitizer, the tests of threads
# make lint    clang-format and ruff; `make format` mends what they can mend
# Another PyTorch: make TORCH=torch==X.Y.Z demo.  Another Python: make PYTHON=python3.12 demo.
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
PYTHON ?= python3
TEST_JOBS ?= 2
FUZZ_SEED ?= 0
FUZZ_COUNT ?= 20000

BIN := .venv/bin
STAMPS := .venv/stamps
CUDA_BIN := .venv-cuda/bin
CUDA_STAMPS := .venv-cuda/stamps
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

SOURCES := setup.py pyproject.toml csrc/sources.txt $(CPP)

.PHONY: demo test opdb fuzz asan tsan cuda-check lint format clean torch-choice cuda-torch-choice
.DELETE_ON_ERROR:

demo: $(STAMPS)/build
	$(BIN)/python examples/quickstart.py

test: $(STAMPS)/build
	WENGERT_TEST_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal

opdb: $(STAMPS)/build
	WENGERT_OPDB=all WENGERT_TEST_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) tests/opdb

fuzz: $(STAMPS)/build
	$(BIN)/python tests/fuzz/fuzzer.py --seed $(FUZZ_SEED) --count $(FUZZ_COUNT) --jobs 2

ifeq ($(NVCC),)
cuda-check:
	@echo "cuda-check: SKIPPED, because nvcc was not found; install the CUDA toolkit and set CUDA_HOME, or put nvcc on the PATH."
else
cuda-check: $(CUDA_STAMPS)/build
	$(CUDA_BIN)/python -m pytest -rs tests/cuda_build
	WENGERT_PTX=all WENGERT_TEST_THREADS=1 $(CUDA_BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal --ignore=tests/cuda_build
endif

# A copy of the package for each, found before the installed one; Python and PyTorch are as they are, without sanitizers.
ASAN_TESTS ?= tests/ops tests/fused tests/end_to_end/test_structure.py tests/end_to_end/test_dynamics.py tests/property
TSAN_TESTS ?= tests/threads
SANITIZED := WENGERT_TEST_THREADS=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PYTHONMALLOC=malloc
RUNTIME = $(shell $(or $(CXX),c++) -print-file-name=lib$(1).so)

asan: build/address/stamp
	$(SANITIZED) PYTHONPATH=$(CURDIR)/build/address LD_PRELOAD="$(call RUNTIME,asan) $(call RUNTIME,stdc++)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 WENGERT_HYPOTHESIS_PROFILE=brief \
	  $(BIN)/python -m pytest -p no:cacheprovider -n $(TEST_JOBS) --dist worksteal $(ASAN_TESTS)

tsan: build/thread/stamp
	$(SANITIZED) PYTHONPATH=$(CURDIR)/build/thread LD_PRELOAD="$(call RUNTIME,tsan)" WENGERT_THREAD_ROUNDS=60 \
	  TSAN_OPTIONS=ignore_noninstrumented_modules=1:suppressions=$(CURDIR)/tests/threads/tsan.supp:halt_on_error=0:exitcode=66 \
	  $(BIN)/python -m pytest -p no:cacheprovider --capture=no $(TSAN_TESTS)

build/address/stamp build/thread/stamp: build/%/stamp: $(STAMPS)/build $(shell find pyext/wengert -name '*.py' ! -name _build_info.py)
	WENGERT_SANITIZE=$* WENGERT_CUDA=0 $(BIN)/python setup.py --quiet build --build-base build/$*/base --build-lib build/$*
	touch $@

lint: $(STAMPS)/requirements
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/ruff check .

format: $(STAMPS)/requirements
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix .

clean:
	rm -rf build .venv .venv-cuda pyext/*.egg-info pyext/wengert/_C*.so pyext/wengert/_build_info.py

# The environment with CUDA has a PyTorch of its own, and an installed copy of the package: pyext holds the other build.
$(STAMPS)/venv $(CUDA_STAMPS)/venv: %/stamps/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "wengert needs Python 3.10 or newer; say which with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $* || { echo "wengert: $(PYTHON) cannot make virtual environments; install its venv module."; exit 1; }
	mkdir -p $(@D)
	touch $@

# Holds the PyTorch asked for; rewritten, and so newer than what hangs on it, only when that changes.
$(STAMPS)/torch-choice: torch-choice $(STAMPS)/venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(CUDA_STAMPS)/torch-choice: cuda-torch-choice $(CUDA_STAMPS)/venv
	@echo '$(CUDA_TORCH)' | cmp -s - $@ || echo '$(CUDA_TORCH)' > $@

$(STAMPS)/requirements $(CUDA_STAMPS)/requirements: %/stamps/requirements: requirements.txt %/stamps/torch-choice
	$*/bin/python -m pip install --quiet "$$(cat $*/stamps/torch-choice)" -r requirements.txt
	touch $@

$(STAMPS)/build: $(STAMPS)/requirements $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

$(CUDA_STAMPS)/build: $(CUDA_STAMPS)/requirements $(SOURCES) $(shell find pyext/wengert -name '*.py' ! -name _build_info.py)
	WENGERT_CUDA=1 CUDA_HOME=$(NVCC:/bin/nvcc=) $(CUDA_BIN)/python -m pip install --quiet --no-build-isolation --no-deps .
	touch $@
