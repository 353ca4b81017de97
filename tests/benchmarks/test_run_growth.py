"""benchmarks/run_growth.py from its command line."""

import pytest
import run_growth
import torch
from rows import Peer, Prepared
from run_growth import Growth

QUICK = ["--seconds", "0.001", "--threads", str(torch.get_num_threads())]


@pytest.fixture
def lines(monkeypatch):
    """Forms of a network that take no time, by name: what to prepare for a batch."""
    forms = {}
    monkeypatch.setattr(run_growth, "BATCHES", forms)
    monkeypatch.setattr(run_growth, "prepare", lambda name, form, batch: forms_prepared[form](batch))
    monkeypatch.setattr(run_growth.networks, "NETWORKS", {"small": lambda batch: None})
    forms_prepared = {}

    def add(form, prepare):
        forms[form], forms_prepared[form] = (1, 2, 4), prepare

    return add


def test_table_and_record(lines, capsys, tmp_path):
    ones = lambda batch: lambda: torch.ones(batch)
    asked = []
    lines("right", lambda batch: asked.append(batch) or Prepared(ones(batch), [Peer("loop", ones(batch))]))
    lines("too large", lambda batch: None)
    assert run_growth.main([*QUICK, "--save", str(tmp_path)]) == 0
    assert sorted(asked) == [1, 2, 4]
    out = capsys.readouterr().out
    assert "small / right" in out and "too large" not in out
    assert "| small / right | " in (tmp_path / "growth-cpu.md").read_text()


def test_what_differs_is_broken(lines, capsys):
    lines("wrong", lambda batch: Prepared(lambda: torch.ones(3), [Peer("loop", lambda: torch.ones(3) + 1)]))
    assert run_growth.main(QUICK) == 1
    assert "BROKEN small/wrong: AssertionError: wengert differs from loop by 5.00e-01" in capsys.readouterr().out


def test_summary_names_what_grows():
    same = [0.1, 0.2, 0.4]
    good = Growth("good", same, "loop", same, 3, 3, (1, 2, 4))
    quadratic = Growth("quadratic", [0.1, 0.2, 0.8], "loop", same, 9, 3, (1, 2, 4))
    assert good.exponent(good.seconds) == pytest.approx(1)
    assert run_growth.summary([good, quadratic]).splitlines() == [
        "more than linear and than PyTorch's: 1 of 2",
        "  quadratic 2.00",
        "more than 1.1 times PyTorch's memory: 1 of 2",
        "  quadratic 9 for 3 MiB",
        "below 0.95 times PyTorch's speed at the largest: 1 of 2",
        "  quadratic 0.50",
    ]


def test_jacobians_by_parameters_agree():
    prepared = run_growth.by_parameters("mlp_softplus", 2)
    ours, theirs = prepared.ours(), prepared.peers[0].call()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))
    assert run_growth.by_parameters("wide_output", 100000) is None


def test_wrong_names(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_growth.main(["--only", "no such"])
    assert stopped.value.code == 2
    assert "--only: no name contains" in capsys.readouterr().err
