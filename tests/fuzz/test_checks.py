"""The fuzzer's own checks can fail: each of them notices a result that was tampered with."""

import pathlib
import subprocess
import sys
import textwrap

from fuzzer import Sweep

HERE = pathlib.Path(__file__).parent

# In a process of its own, since it spoils wengert's functions: prints the forms that notice nothing.
TAMPERING = """
    import sys, types, warnings
    sys.path[:0] = [HERE, HERE + "/.."]
    warnings.simplefilter("ignore")
    import batches, forms, plans, wengert
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

    def spoilt_transform(transform):
        return lambda *args, **options: spoilt(transform(*args, **options))

    PLAN = "s0 (3, 4) f64 given\\nevaluate over (4): s0[i, 2i+-1] = program"
    TAMPERED = [
        (wengert, "jacobian", spoilt, ["jacobian", "jacobian_options", "graph", "jacobian_twice"]),
        (wengert, "grad", spoilt, ["gradient", "gradient_twice"]),
        (wengert, "hessian", spoilt, ["hessian", "hessian_twice"]),
        (wengert, "jvp", spoilt, ["products"]),
        (wengert, "hvp", spoilt, ["second_products"]),
        (wengert.func, "jacrev", spoilt_transform, ["func_jacrev"]),
        (wengert.func, "jacfwd", spoilt_transform, ["func_jacfwd"]),
        (wengert.func, "vmap", spoilt_transform, ["vmap_jacrev", "vmap_jacfwd", "vmap_grad", "vmap_hessian"]),
        (plans, "native", lambda native: types.SimpleNamespace(plan=lambda *a: PLAN), ["plans"]),
    ]
    small = lambda p: not p.first and len(p.steps) == 3 and p.outputs == "one" and p.exact[0] > 2 and p.seed > 100
    program = next(p for p in map(Program, range(300)) if small(p))
    for module, name, spoil, noticing in TAMPERED:
        right = getattr(module, name)
        for spoilt_now in (False, True):
            setattr(module, name, spoil(right) if spoilt_now else right)
            for form in noticing:
                if (check(program, 0, form) is not None) != spoilt_now:
                    print(form, "notices nothing" if spoilt_now else "is wrong from the start")
        setattr(module, name, right)
    print("done")
"""


def test_a_wrong_result_is_noticed():
    program = f"HERE = {str(HERE)!r}\n{textwrap.dedent(TAMPERING)}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stdout + done.stderr[-2000:]


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
    sweep = Sweep([], quiet=True)
    sweep.script = str(script)
    sweep.run(0, 5)
    assert [(f["fail"], f["form"]) for f in sweep.failures] == [(2, "jacobian")]
    assert sweep.programs == 4
