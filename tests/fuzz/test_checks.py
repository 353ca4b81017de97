"""The fuzzer's own checks can fail: each of them notices a result that was tampered with."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

HERE = pathlib.Path(__file__).parent

TAMPERED = {
    "jacobian": "wengert.jacobian = spoilt(wengert.jacobian)",
    "graph": "wengert.jacobian = spoilt(wengert.jacobian)",
    "gradient": "wengert.grad = spoilt(wengert.grad)",
    "hessian": "wengert.hessian = spoilt(wengert.hessian)",
    "second_products": "wengert.hvp = spoilt(wengert.hvp)",
    "func_jacfwd": "wengert.func.jacfwd = lambda f, n, g=wengert.func.jacfwd: spoilt(g(f, n))",
    "vmap_hessian": "wengert.func.vmap = lambda f, *a, g=wengert.func.vmap, **k: spoilt(g(f, *a, **k))",
    "plans": "plans.native = types.SimpleNamespace(plan=lambda *a: PLAN)",
}


@pytest.mark.parametrize("form", TAMPERED)
def test_a_wrong_result_is_noticed(form):
    program = f"""
        import sys, types
        sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}
        import batches, forms, plans, wengert, torch
        from fuzzer import check
        from programs import Program
        from support.compare import leaves

        def spoilt(call):
            def run(*args, **options):
                result = call(*args, **options)
                for t in [t for t in leaves(result) if t.numel()][:1]:
                    t.data[(-1,) * t.dim()] += 1e-3
                return result
            return run

        PLAN = "s0 (3, 4) f64 given\\nevaluate over (4): s0[i, 2i+-1] = program"
        small = lambda p: not p.first and len(p.steps) == 3 and p.outputs == "one" and p.exact[0] > 2 and p.seed > 100
        p = next(p for p in map(Program, range(300)) if small(p))
        assert check(p, 0, {form!r}) is None, check(p, 0, {form!r})
        {TAMPERED[form]}
        assert check(p, 0, {form!r}) is not None
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_program_that_kills_its_process_is_reported(tmp_path):
    """The sweep goes on behind it."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import json, os, sys\n"
        "seed, count = (int(a.split('=')[1]) for a in sys.argv[2:4])\n"
        "for s in range(seed, seed + count):\n"
        "    print(json.dumps({'begin': s, 'form': 'jacobian', 'content': 0}), flush=True)\n"
        "    os.abort() if s == 2 else None\n"
        "    print(json.dumps({'done': s, 'forms': ['jacobian']}), flush=True)\n"
    )
    sys.path.insert(0, str(HERE))
    from fuzzer import Sweep

    sweep = Sweep([], quiet=True)
    sweep.script = str(script)
    sweep.run(0, 5)
    assert [(f["fail"], f["form"]) for f in sweep.failures] == [(2, "jacobian")]
    assert sweep.programs == 4
