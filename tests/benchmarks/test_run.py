"""benchmarks/run.py from its command line: on the fake GPU, and on the CPU as before."""

import dataclasses
import json

import pytest
import report
import rows
import run
import slopes
import torch
from fake_cuda import COPY_BYTES, RECORD, FakeCuda, FakeDevice
from rows import Peer, Prepared

TINY = "two_variables,cartpole_1/vmap"
NAMES = ["two_variables_2/graph", "two_variables_2/functional", "cartpole_1/vmap"]
QUICK = ["--seconds", "0.001", "--threads", str(torch.get_num_threads())]


@pytest.fixture
def fake(monkeypatch):
    """The GPU of `--device cuda`."""
    cuda = FakeCuda()

    def open_device(name, *, seen_by_nsight):
        assert name == "cuda"
        return FakeDevice(cuda, seen_by_nsight=seen_by_nsight)

    monkeypatch.setattr(run, "open_device", open_device)
    monkeypatch.setattr(run, "prepare", launching(cuda))
    return cuda


def launching(cuda):
    """The real rows; ours launches two kernels of 3 us and a fill, a peer five kernels. None of them takes time."""

    def with_launches(call, *names):
        def launch():
            for name in names:
                cuda.launched.append((name, 3e-6))
            return call()

        return launch

    def prepare(row, device, *, compiled):
        prepared = rows.prepare(row, device, compiled=compiled)
        prepared.ours = with_launches(prepared.ours, "map", "Memset", "sum")
        prepared.peers = [dataclasses.replace(p, call=with_launches(p.call, *["kernel"] * 5)) for p in prepared.peers]
        return prepared

    return prepare


def on_gpu(*arguments):
    return run.main(["--device", "cuda", *QUICK, *arguments])


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_record_and_page(fake, capsys, tmp_path):
    assert on_gpu("--only", TINY, "--markdown", "--save", str(tmp_path), "--json", str(tmp_path / "copy.json")) == 0
    header, _, *lines = (cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert header[-4:] == ["launches", "kernels", "GB/s", "of copy"]
    assert [line[0] for line in lines] == NAMES
    # On the fake every call takes one event: two floats in and 2x2 out; the graph form does not say what it reads.
    assert [line[header.index("wengert")] for line in lines] == ["1 ms"] * 3
    assert [line[-4:-2] for line in lines] == [["2+1 / 5", "9 us"]] * 3
    assert [line[-2:] for line in lines[:2]] == [["n/a", "n/a"], [f"{24 / RECORD / 1e9:.3g}", "0.0012 %"]]

    record = json.loads((tmp_path / "fake-gpu-8-gb.json").read_text())
    assert record == json.loads((tmp_path / "copy.json").read_text())
    stamp = record["environment"]
    assert (stamp["device"], stamp["capability"], stamp["torch"]) == ("Fake GPU (8 GB)", "9.0", torch.__version__)
    assert stamp["copy GB/s"] == 2 * COPY_BYTES / RECORD / 1e9
    assert {"driver", "CUDA", "L2 MiB", "memory GiB", "wengert", "numpy"} <= stamp.keys()
    assert record["broken"] == []
    graph, functional, vmap = record["rows"]
    assert (graph["bytes"], functional["bytes"], vmap["bytes"]) == (None, 4 * (2 + 4), 4 * (5 + 4 * 5))
    assert functional["share_of_copy"] == pytest.approx(24 / RECORD / 2e9)
    for row in record["rows"]:
        best = next(p for p in row["peers"] if p["name"] == row["fastest"])
        assert row["ours"]["kernels"] == {"launches": 2, "copies": 1, "seconds": pytest.approx(9e-6)}
        assert best["kernels"]["launches"] == 5
        assert row["floor"] is None  # floors are the CPU's
        assert row["ratio"] == pytest.approx(1)

    page = (tmp_path / "fake-gpu-8-gb.md").read_text()
    assert page.startswith("# Benchmark on Fake GPU (8 GB)\n")
    assert "L2 was overwritten" in page
    shown = [cells(line) for line in page.splitlines() if line.startswith(("| two", "| cart"))]
    assert shown[:3] == lines
    assert [line[1] for line in shown[3:]] == [peer["name"] for row in record["rows"] for peer in row["peers"]]
    assert all(line[2:4] == ["yes", "1 ms"] for line in shown[3:] if line[1] != "functional of the batch sum")
    assert all(f"| {key} | {value} |" in page for key, value in stamp.items())


def test_profile_writes_a_trace_and_ranges_for_every_row(fake, tmp_path):
    folder = tmp_path / "new" / "traces"
    assert on_gpu("--only", "two_variables", "--profile", str(folder)) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["two_variables_2.functional.json", "two_variables_2.graph.json"]
    for label in ("two_variables_2.graph", "two_variables_2.functional"):
        names = traced(folder / f"{label}.json")
        sides = [name for name in names if name.startswith(f"{label}/")]
        assert names[:2] == [label, f"{label}/wengert"]
        assert names.count("map") == names.count("sum") == run.PROFILED_CALLS
        assert names.count("kernel") == 5 * run.PROFILED_CALLS * (len(sides) - 1) > 0
    assert fake.open_ranges == []


def test_profile_on_the_processor(tmp_path):
    assert run.main([*QUICK, "--only", "two_variables_2/graph", "--profile", str(tmp_path)]) == 0
    assert {"two_variables_2.graph", "wengert", "_vmap of row gradients"} <= set(traced(tmp_path / "two_variables_2.graph.json"))


def traced(path):
    return [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]


def test_nvtx_gives_ranges_and_leaves_profiling_to_the_other_tool(fake, capsys):
    assert on_gpu("--only", "two_variables_2/functional", "--nvtx", "--markdown") == 0
    assert ("two_variables_2.functional", "wengert") in fake.ranges
    assert fake.profiles == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| two"))
    assert cells(line)[-4:-2] == ["n/a / n/a", "n/a"]


def test_a_wrong_peer_breaks_its_row_only(fake, monkeypatch, capsys, tmp_path):
    def prepare(row, device, *, compiled):
        right = lambda: torch.ones(3)
        wrong = lambda: torch.ones(3) + (row.form == "graph")
        return Prepared(right, [Peer("peer", right), Peer("suspect", wrong)], input_bytes=0)

    monkeypatch.setattr(run, "prepare", prepare)
    assert on_gpu("--only", "two_variables", "--json", str(tmp_path / "r.json")) == 1
    out = capsys.readouterr().out
    message = "two_variables_2/graph: AssertionError: wengert differs from suspect by 5.00e-01; nothing was timed"
    assert f"BROKEN {message}" in out.splitlines()
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row["row"] for row in record["rows"]] == ["two_variables_2/functional"]
    assert record["broken"] == [message]


def test_a_peer_that_did_not_run_is_null_in_the_record(fake, monkeypatch, tmp_path):
    def prepare(row, device, *, compiled):
        right = lambda: torch.ones(3)
        return Prepared(right, [Peer("peer", right), Peer("broken", lambda: 1 / 0)])

    monkeypatch.setattr(run, "prepare", prepare)
    assert on_gpu("--only", "two_variables_2/graph", "--json", str(tmp_path / "r.json")) == 0
    peer = json.loads((tmp_path / "r.json").read_text())["rows"][0]["peers"][1]
    assert (peer["seconds"], peer["note"]) == (None, "ZeroDivisionError: division by zero")


def test_compile_adds_peers_that_do_not_count(fake, monkeypatch, tmp_path):
    resets = []
    monkeypatch.setattr(torch, "compile", lambda call: call)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    forms = "linear_ab_1000/functional,cartpole_1/batch,chain_1000/grad,persample"
    monkeypatch.setattr(
        rows, "ROWS", [rows.Row(r.problem, 5, r.form) for r in rows.ROWS if r.name in forms or "persample" in r.name]
    )
    assert on_gpu("--compile", "--no-slopes", "--json", str(tmp_path / "r.json")) == 0
    found = json.loads((tmp_path / "r.json").read_text())["rows"]
    compiled = [p for row in found for p in row["peers"] if p["name"].startswith("compiled ")]
    assert {p["name"] for p in compiled} >= {"compiled func.jacrev", "compiled func.grad", "compiled vmap(func.grad)"}
    assert all(not p["counted"] and p["difference"] < 1e-5 and not p["note"] for p in compiled)
    assert len(resets) == len(found) == 4


def test_slopes(fake, monkeypatch, capsys):
    monkeypatch.setattr(slopes, "SIZES", (4, 8, 16))
    monkeypatch.setattr(rows, "ROWS", rows.ROWS[:1])
    assert on_gpu() == 0
    assert "pointwise Jacobian's arithmetic, wengert: cost ~ N^" in capsys.readouterr().out


WRONG = [
    (["--only", "no_such_row"], "no row's name contains 'no_such_row'; --list shows the names"),
    (["--only", "mlp,"], "no row's name contains ''"),
    (["--nvtx"], "--nvtx needs --device cuda"),
    (["--device", "cuda", "--nvtx", "--profile", "out"], "excludes --profile"),
    (["--device", "tpu"], "invalid choice"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda", *QUICK, "--only", TINY]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("run.py: --device cuda needs a GPU that PyTorch can use")
    assert captured.out == ""


def test_the_processors_table_and_floors(capsys, tmp_path):
    status = run.main([*QUICK, "--only", "two_variables_2/functional", "--markdown", "--floors", "--save", str(tmp_path)])
    header, _, line = (cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert header[-4:] == ["peak MiB", "difference", "floor", ""]
    assert (line[-2], status) in [("4x", 0 if line[-1] == "pass" else 1)]
    assert json.loads((tmp_path / "cpu.json").read_text())["rows"][0]["copy_bandwidth"] is None
    assert "L2" not in (tmp_path / "cpu.md").read_text()


def test_list(capsys):
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [row.name for row in rows.ROWS]


@pytest.mark.parametrize(
    "seconds, text", [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (5e-6, "5 us"), (5e-8, "50 ns"), (float("inf"), "-")]
)
def test_human(seconds, text):
    assert report.human(seconds) == text
