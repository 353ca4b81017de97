"""benchmarks/run_networks.py from its command line."""

import json

import pytest
import run_networks
import torch
from rows import Peer, Prepared

QUICK = ["--seconds", "0.001", "--threads", str(torch.get_num_threads())]


@pytest.fixture
def cells(monkeypatch):
    """Forms of a network that take no time, by name."""
    forms = {}
    monkeypatch.setattr(run_networks, "FORMS", forms)
    monkeypatch.setattr(run_networks.networks, "NETWORKS", {"small": lambda batch: None})
    return forms


def fails():
    raise RuntimeError("no derivative")


ONE = lambda: torch.ones(3)


def test_table_and_record(cells, capsys, tmp_path):
    cells["right"] = lambda n: Prepared(ONE, [Peer("loop", ONE)])
    cells["nobody's"] = lambda n: Prepared(fails, [Peer("loop", fails)])
    status = run_networks.main([*QUICK, "--least", "0.0001", "--save", str(tmp_path)])
    out = capsys.readouterr().out
    assert status == 0
    assert "1 of 1 cells at 0.0001 times PyTorch's fastest form or more" in out
    header, line = out.splitlines()[:2]
    assert header.split() == ["network", "right", "nobody's"]
    assert (line.split()[0], line.split()[2]) == ("small", "-")
    record = json.loads((tmp_path / "networks-cpu.json").read_text())
    assert [cell["cell"] for cell in record["cells"]] == ["small/right"]
    assert record["cells"][0]["fastest"] == "loop"
    assert "| small | " in (tmp_path / "networks-cpu.md").read_text()


def test_what_differs_is_not_timed(cells, capsys):
    cells["wrong"] = lambda n: Prepared(ONE, [Peer("loop", lambda: torch.ones(3) + 1)])
    assert run_networks.main(QUICK) == 1
    message = "AssertionError: wengert differs from loop by 5.00e-01; nothing was timed"
    assert f"BROKEN small/wrong: {message}" in capsys.readouterr().out


def test_what_only_we_refuse_is_broken(cells, capsys):
    cells["refused"] = lambda n: Prepared(fails, [Peer("loop", ONE)])
    assert run_networks.main(QUICK) == 1
    assert "BROKEN small/refused: RuntimeError: no derivative" in capsys.readouterr().out


def test_a_cell_below_the_least_is_measured_again(cells, capsys):
    cells["slow"] = lambda n: Prepared(ONE, [Peer("loop", ONE)])
    assert run_networks.main([*QUICK, "--least", "1e9"]) == 1
    assert "below: small/slow" in capsys.readouterr().out


@pytest.mark.parametrize("option, text", [("--only", "no such"), ("--forms", "gradient,")])
def test_wrong_names(option, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_networks.main([option, text])
    assert stopped.value.code == 2
    assert f"{option}: no name contains" in capsys.readouterr().err
