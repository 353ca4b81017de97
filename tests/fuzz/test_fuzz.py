"""A fixed range of random programs; `python tests/fuzz/fuzzer.py` runs others, `make fuzz` many."""

import os

import pytest
from fuzzer import Sweep, describe

COUNT = int(os.environ.get("WENGERT_FUZZ", "600"))
SLICES = 4


@pytest.mark.parametrize("index", range(SLICES))
def test_programs(index, capsys):
    sweep = Sweep([], quiet=True)
    size = COUNT // SLICES
    sweep.run(index * size, size)
    with capsys.disabled():
        print(f"\nfuzz {index + 1}/{SLICES}: {sweep.summary()}", flush=True)
    assert not sweep.failures, "\n".join(map(describe, sweep.failures))
    assert sweep.programs == size
    # Most programs run on the engine, and the second content of a program on the plans of the first.
    assert sweep.native > 10 * sum(sweep.reasons.values())
    assert sweep.plans["plan_hits"] > sweep.plans["plan_misses"]
    assert not any("slot" in reason for reason in sweep.reasons), sweep.reasons
