"""The operator database in a few slices, each in its own process; the summary says how much agrees and how much is native."""

import json
import os
import pathlib
import select
import subprocess
import sys
import time

import pytest
from agreement import OpReport
from sweep import LARGEST_JACOBIAN

SWEEP = pathlib.Path(__file__).with_name("sweep.py")
FULL = bool(os.environ.get("WENGERT_OPDB"))
SLICES = int(os.environ.get("WENGERT_OPDB_SLICES", "4"))
PATIENCE = 1800 if FULL else 90  # seconds one operator may take


def read_lines(process, patience):
    """Lines of a process until it ends; None when it said nothing for too long."""
    pending = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], patience)
        if not ready:
            yield None
            return
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            return
        pending += chunk
        *lines, pending = pending.split(b"\n")
        yield from lines


def run_slice(index):
    """Reports of one slice; an operator that kills or hangs its process is reported and stepped over."""
    reports, deaths = [], 0
    while True:
        command = [sys.executable, str(SWEEP), f"--index={index}", f"--count={SLICES}", f"--start={len(reports)}"]
        process = subprocess.Popen(command + ["--full"] * FULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        current, hung = None, False
        for line in read_lines(process, PATIENCE):
            if line is None:
                hung = True
                process.kill()
                break
            if not line.startswith(b"{"):
                continue
            record = json.loads(line)
            if "begin" in record:
                current = record["begin"]
            else:
                reports.append(OpReport(**record))
                current = None
        errors = process.stderr.read().decode(errors="replace")
        process.stdout.close()
        process.stderr.close()
        code = process.wait()
        if code == 0 and not hung:
            return reports
        assert current is not None, f"the sweep ended with {code}: {errors[-2000:]}"
        why = f"no answer in {PATIENCE} s" if hung else f"the process died with {code}: {errors[-300:]}"
        reports.append(OpReport(current, samples=1, failures=[why]))
        deaths += 1
        assert deaths <= 25, f"the sweep keeps dying, last in {current}: {errors[-2000:]}"


def summary(reports):
    compared = [r for r in reports if r.samples]
    samples = sum(r.samples for r in compared)
    agreed = sum(r.agreed + r.refused for r in compared)
    native, opaque, fallback = (sum(getattr(r, name) for r in compared) for name in ("native", "opaque", "fallback"))
    calls = max(1, native + fallback)
    good = sum(r.ok for r in compared)
    text = (
        f"{len(reports)} operators, {len(compared)} compared: {good} agree ({100 * good / max(1, len(compared)):.1f} %), "
        f"{agreed} of {samples} samples ({100 * agreed / max(1, samples):.1f} %), "
        f"native share {100 * native / calls:.1f} % of calls ({100 * (native - opaque) / calls:.1f} % without calling a node)"
    )
    if large := sum(r.large for r in reports):
        text += f", {large} samples left out: their dense Jacobian has more than {LARGEST_JACOBIAN} elements"
    lines = [f"  {r.op}: {line}" for r in compared for line in r.failures[:3]]
    return text, lines


@pytest.mark.parametrize("index", range(SLICES))
def test_opdb(index, record_property, capsys):
    begin = time.perf_counter()
    reports = run_slice(index)
    text, failures = summary(reports)
    record_property("opdb", text)
    with capsys.disabled():
        print(f"\nopdb slice {index + 1}/{SLICES}: {text} in {time.perf_counter() - begin:.0f} s", flush=True)
    if target := os.environ.get("WENGERT_OPDB_JSON"):
        pathlib.Path(f"{target}.{index}").write_text(json.dumps([vars(r) for r in reports], indent=1))
    assert not failures, text + "\n" + "\n".join(failures)
