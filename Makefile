# make demo    set up .venv if needed, build the extension, run examples/quickstart.py
# make test    the same set-up, then the tests
# make opdb    the whole operator database instead of the sample that `make test` takes
# make lint    clang-format and ruff; `make format` mends what they can mend
# Another PyTorch: make TORCH=torch==X.Y.Z demo.  Another Python: make PYTHON=python3.12 demo.
TORCH ?= torch==2.13.0
PYTHON ?= python3
TEST_JOBS ?= 2

BIN := .venv/bin
STAMPS := .venv/stamps
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: demo test opdb lint format clean torch-choice
.DELETE_ON_ERROR:

demo: $(STAMPS)/build
	$(BIN)/python examples/quickstart.py

test: $(STAMPS)/build
	WENGERT_TEST_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal

opdb: $(STAMPS)/build
	WENGERT_OPDB=all WENGERT_TEST_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) tests/opdb

lint: $(STAMPS)/requirements
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/ruff check .

format: $(STAMPS)/requirements
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix .

clean:
	rm -rf build .venv pyext/*.egg-info pyext/wengert/_C*.so pyext/wengert/_build_info.py

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "wengert needs Python 3.10 or newer; say which with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv || { echo "wengert: $(PYTHON) cannot make virtual environments; install its venv module."; exit 1; }
	mkdir -p $(STAMPS)
	touch $@

# Holds the PyTorch asked for; rewritten, and so newer than what hangs on it, only when that changes.
$(STAMPS)/torch-choice: torch-choice $(STAMPS)/venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(STAMPS)/requirements: requirements.txt $(STAMPS)/torch-choice
	$(BIN)/python -m pip install --quiet '$(TORCH)' -r requirements.txt
	touch $@

$(STAMPS)/build: $(STAMPS)/requirements setup.py pyproject.toml csrc/sources.txt $(CPP)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@
