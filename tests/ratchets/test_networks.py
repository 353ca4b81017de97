"""What the derivatives of ordinary networks cost, in counts, so that a regression and an improvement both show.

    python tests/ratchets/test_networks.py      writes the counts down anew

The networks are the benchmark's (benchmarks/networks.py), each in the forms of benchmarks/run_networks.py.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

if __name__ == "__main__":
    HERE = pathlib.Path(__file__).parent
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "benchmarks")]
    os.environ["WENGERT_COMPARE_WAYS"] = "0"

import networks
import pytest
import torch
import wengert
from run_networks import FORMS, prepare
from support.check import DEVICE
from timer import largest_difference
from wengert import _C

COUNTS = pathlib.Path(__file__).with_name("networks.json")
COUNTED = ("launches", "matmuls", "node_calls")
BATCHED = ("batch_jacobian", "per_sample", "grad")  # whose cost must not depend on how many samples there are

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the counts are the CPU's")


def counts(name: str, form: str, batch: int) -> dict[str, int] | str:
    """Of a second call, when plans are known; or the error that PyTorch has too."""
    prepared = prepare(name, form, batch)
    try:
        prepared.ours()
    except RuntimeError as error:
        return type(error).__name__
    _C.reset_counters()
    wengert.reset_stats()
    prepared.ours()
    found = {key: _C.counters()[key] for key in COUNTED}
    found["fallbacks"] = sum(n for by_reason in wengert.stats().fallback.values() for n in by_reason.values())
    return {key: n for key, n in found.items() if n}


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="written down for the graphs of PyTorch 2.13")
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_counts(name):
    expected = json.loads(COUNTS.read_text())[name]
    found = {form: counts(name, form, 4) for form in FORMS}
    assert found == expected, "better or worse: look, and then write the new counts down"


@pytest.mark.parametrize("form", BATCHED)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_counts_do_not_grow_with_the_batch(name, form):
    few, many = counts(name, form, 4), counts(name, form, 12)
    if isinstance(few, dict) and few.get("fallbacks"):
        pytest.skip("PyTorch's path")
    if isinstance(few, str):
        assert many == few
    else:  # small products are nests
        assert sum(many.values()) <= 1.5 * sum(few.values()) + 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_agreement(name, form):
    prepared = prepare(name, form, 3)
    agreed = 0
    try:
        ours = prepared.ours()
    except RuntimeError as error:
        for peer in prepared.peers:  # then PyTorch has no way either
            with pytest.raises(type(error)):
                peer.call()
        return
    for peer in prepared.peers:
        try:
            theirs = peer.call()
        except RuntimeError:  # not every form of PyTorch's runs everywhere
            continue
        assert largest_difference(ours, theirs) < 1e-4, peer.name
        agreed += 1
    assert agreed


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = {name: {form: counts(name, form, 4) for form in FORMS} for name in networks.NETWORKS}
    COUNTS.write_text(json.dumps(made, indent=1) + "\n")
