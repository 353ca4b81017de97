"""Runs random programs: in every form, with two contents, against PyTorch's row loop in float64.

    python tests/fuzz/fuzzer.py --seed 0 --count 600 --jobs 2       # a range of programs, in processes of their own
    python tests/fuzz/fuzzer.py --seed 17 --count 1 --all --verbose # one program in all its forms
    python tests/fuzz/fuzzer.py --seed 17 --shrink                  # ... with fewer steps, as long as it still fails

Every failure is one FAIL line that says the seed and how to see it again. A program that kills or hangs its process is a
failure like any other: the next process goes on behind it. Nothing depends on time but where `--seconds` stops.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import faulthandler
import json
import math
import os
import pathlib
import random
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

FORMS_OF_A_PROGRAM = 3
PATIENCE = 120.0  # seconds a single form may take
PER_PROCESS = 300  # programs; caches start anew


def contents(seed: int) -> tuple[int, int]:
    """Two contents: other numbers, or numbers with ties and zeros."""
    return (0, 2) if seed % 3 == 0 else (0, 1)


def chosen_forms(program: Any, everything: bool, only: str | None) -> list[str]:
    from forms import FORMS

    fitting = [n for n, f in FORMS.items() if (f.batched if program.first else f.plain) and f.order <= program.exact[0]]
    if only:
        return [n for n in fitting if n in only.split(",")]
    if everything:
        return fitting
    draw = random.Random(f"forms {program.seed}")
    return ["plans", *draw.sample([n for n in fitting if n != "plans"], FORMS_OF_A_PROGRAM)] if "plans" in fitting else fitting


def tell(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def check(program: Any, content: int, name: str) -> str | None:
    """What is wrong with a form of a program, or None."""
    import torch
    from forms import FORMS, Case
    from judge import Mismatch

    torch.manual_seed(0)
    case = Case(program, content)
    try:
        if FORMS[name].order == 1 or name == "plans" or case.jacobian.error is None:
            if case.jacobian.error is not None:
                return refused_alike(case)
            FORMS[name].check(case)
    except Mismatch as error:
        # Rounding: a result that itself moves as much is not wrong, whoever computed it.
        if error.by is not None and (error.by < 1e-3 or not near_a_kink(case)) and rounding(case, FORMS[name].order) > error.by:
            return None
        # After an overflow on the way it is the order of the operations that decides between inf, nan and 0.
        if error.by is not None and not math.isfinite(error.by) and overflowing(case):
            return None
        return first_line(error)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def rounding(case: Any, order: int) -> float:
    """How far PyTorch's derivatives move with the last places of the inputs, with a margin."""
    import torch
    from judge import moves

    derivative = torch.autograd.functional.jacobian if order == 1 else torch.autograd.functional.hessian
    try:
        return 100 * max(moves(lambda xs: derivative(case.f if order == 1 else case.scalar, xs), xs) for xs in evaluated(case))
    except RuntimeError:
        return 0.0


def evaluated(case: Any) -> list[Any]:
    return [case.xs, *case.samples] if "samples" in vars(case) else [case.xs]


def overflowing(case: Any) -> bool:
    from judge import overflows

    return any(overflows(case.scalar, xs) for xs in evaluated(case))


def near_a_kink(case: Any) -> bool:
    """Ties are broken by any perturbation; what moves then proves nothing."""
    return case.content % 3 == 2 or any(n in ("ties", "ties_of_all", "kinked") for n in case.program.names)


def refused_alike(case: Any) -> str | None:
    import wengert
    from judge import Mismatch, same_calls
    from torch.autograd import functional as F

    if "invalid gradient" in str(case.jacobian.error):
        return None  # the text names the node that noticed
    try:
        same_calls(case.tol, lambda: wengert.jacobian(case.f, case.xs), lambda: F.jacobian(case.f, case.xs), "jacobian")
    except Mismatch as error:
        return first_line(error)
    return None


def work(args: argparse.Namespace) -> None:
    """One process's share, as lines of JSON."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import batches  # noqa: F401 - registers forms
    import forms  # noqa: F401
    import plans  # noqa: F401
    import wengert
    from programs import Program

    for seed in range(args.seed, args.seed + args.count):
        tell(begin=seed, form="the program itself", content=0)
        program = Program(seed)
        if args.op and args.op not in program.names:
            tell(done=seed, forms=[])
            continue
        names = chosen_forms(program, args.all, args.form)
        if args.verbose:
            print(f"{seed}: {program}: {' '.join(names)}", file=sys.stderr, flush=True)
        for content in contents(seed):
            for name in names:
                if name == "plans" and content != 0:
                    continue  # the same plans
                tell(begin=seed, form=name, content=content)
                if (why := check(program, content, name)) is not None:
                    tell(fail=seed, form=name, content=content, why=why, program=str(program))
        stats = wengert.stats()
        reasons: collections.Counter[str] = collections.Counter()
        for by_reason in stats.fallback.values():
            reasons.update(by_reason)
        native = sum(stats.native.values())
        engine = {k: stats.engine[k] for k in ("plan_hits", "plan_misses") if k in stats.engine}
        wengert.reset_stats()
        tell(done=seed, forms=names, native=native, reasons=dict(reasons), **engine)


def lines_of(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any] | None]:
    """Records of a process until it ends; None where it said nothing for too long."""
    assert process.stdout is not None
    pending = b""
    while True:
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            yield None
            return
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        yield from (json.loads(line) for line in lines if line.startswith(b"{"))


class Sweep:
    """Runs a range of programs in processes of their own and gathers what they say."""

    def __init__(self, options: list[str], quiet: bool = False) -> None:
        self.options, self.quiet, self.script = options, quiet, __file__
        self.failures: list[dict[str, Any]] = []
        self.programs = self.native = 0
        self.reasons: collections.Counter[str] = collections.Counter()
        self.forms: collections.Counter[str] = collections.Counter()
        self.plans: collections.Counter[str] = collections.Counter()

    def run(self, seed: int, count: int, until: float = float("inf"), jobs: int = 1) -> None:
        ranges = [range(start, min(start + PER_PROCESS, seed + count)) for start in range(seed, seed + count, PER_PROCESS)]
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda seeds: self._range(seeds, until), ranges))

    def _range(self, seeds: range, until: float) -> None:
        seed = seeds.start
        while seed < seeds.stop and time.monotonic() < until:
            seed = self._process(seed, seeds.stop - seed, until)

    def _process(self, seed: int, count: int, until: float) -> int:
        command = [sys.executable, self.script, "--child", f"--seed={seed}", f"--count={count}", *self.options]
        # Freed and fresh memory is filled, so that what is read too late or too early is no plausible number.
        env = {"WENGERT_COMPARE_WAYS": "0", **os.environ}
        env |= {"MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1", "WENGERT_COMPARE_PLANS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
            current, hung, following = {"begin": seed, "form": "start", "content": 0}, False, seed
            for record in lines_of(process):
                if record is None:
                    hung = True
                    process.send_signal(signal.SIGABRT)  # which faulthandler answers with a traceback
                elif "begin" in record:
                    current = record
                elif "fail" in record:
                    self._failed(record)
                else:
                    following = record["done"] + 1
                    self._done(record)
                    if time.monotonic() > until:
                        process.kill()
                        process.wait()
                        return following
            code = process.wait()
        if code == 0 and not hung:
            return seed + count
        why = f"no answer in {PATIENCE:.0f} s" if hung else f"the process died with {code}"
        self._failed({"fail": current["begin"], **current, "why": why, "program": ""})
        return max(following, current["begin"] + 1)

    def _done(self, record: dict[str, Any]) -> None:
        self.programs += bool(record["forms"])
        self.forms.update(record["forms"])
        self.native += record.get("native", 0)
        self.reasons.update(record.get("reasons", {}))
        self.plans.update({k: record[k] for k in ("plan_hits", "plan_misses") if k in record})

    def _failed(self, record: dict[str, Any]) -> None:
        self.failures.append(record)
        if not self.quiet:
            print(describe(record), flush=True)

    def summary(self) -> str:
        kinds = collections.Counter(f["form"] for f in self.failures)
        seeds = len({f["fail"] for f in self.failures})
        text = f"{self.programs} programs, {sum(self.forms.values())} forms of them: {seeds} programs fail"
        if kinds:
            text += " (" + ", ".join(f"{n} {k}" for k, n in kinds.most_common()) + ")"
        fallbacks = sum(self.reasons.values())
        text += f"; {100 * self.native / max(1, self.native + fallbacks):.1f} % of calls native"
        return text + f"; plans: {self.plans['plan_misses']} made, {self.plans['plan_hits']} found again"


def describe(record: dict[str, Any]) -> str:
    show = f"python tests/fuzz/fuzzer.py --seed {record['fail']} --count 1 --form {record['form']}"
    where = f"FAIL seed={record['fail']} content={record['content']} form={record['form']}"
    return f"{where}: {record['why']} | {record['program']} | {show}"


def shrink(seed: int, form: str | None, every: bool) -> None:
    """The fewest steps with which a program still fails."""
    import batches  # noqa: F401
    import forms  # noqa: F401
    import plans  # noqa: F401
    import torch
    from programs import Program

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    program = Program(seed)
    names = chosen_forms(program, every, form)

    def failing(keep: tuple[int, ...], single: bool) -> list[tuple[int, str, str]]:
        p = Program(seed, keep, single)
        found = ((c, n, check(p, c, n)) for n in names for c in contents(seed))
        return [(c, n, why) for c, n, why in found if why is not None]

    keep: tuple[int, ...] = tuple(range(program.length))
    first = failing(keep, False)
    if not first:
        print(f"seed {seed} does not fail")
        return
    names = [first[0][1]]
    single = bool(failing(keep, True))
    for k in range(program.length):
        fewer = tuple(j for j in keep if j != k)
        if fewer and failing(fewer, single):
            keep = fewer
    for content, name, why in failing(keep, single):
        print(f"seed={seed} keep={keep} single_output={single} content={content} form={name}: {why}")
    small = Program(seed, keep, single)
    print(f"  {small}")
    for x in small.inputs(first[0][0]):
        print(f"  input {tuple(x.shape)} {x.stride()}: {x.tolist()}")
    for y in torch.utils._pytree.tree_leaves(small.function(first[0][0])(*(x.clone().requires_grad_() for x in small.inputs(0)))):
        print(f"  output {tuple(y.shape)}")
        show(y.grad_fn, 2, {})


def show(node: Any, depth: int, seen: dict[Any, int]) -> None:
    if node is None:
        return
    saved = {k[7:]: getattr(node, k) for k in dir(node) if k.startswith("_saved_")}
    plain = {k: v for k, v in saved.items() if not hasattr(v, "shape")}
    print("  " * depth + f"{node.name()} {plain}" + " (again)" * (node in seen))
    if node not in seen:
        seen[node] = 1
        for following, _ in node.next_functions:
            show(following, depth + 1, seen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first program")
    parser.add_argument("--count", type=int, default=600, help="how many programs")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--all", action="store_true", help="every form of every program instead of some")
    parser.add_argument("--form", help="only these forms, separated by commas")
    parser.add_argument("--op", help="only programs with this operation")
    parser.add_argument("--shrink", action="store_true", help="look for a smaller program")
    parser.add_argument("--verbose", action="store_true", help="print the programs")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        faulthandler.enable()
        work(args)
        return 0
    if args.shrink:
        shrink(args.seed, args.form, args.all)
        return 0
    options = ["--all"] * args.all + ["--verbose"] * args.verbose
    options += [f"--form={args.form}"] * bool(args.form) + [f"--op={args.op}"] * bool(args.op)
    sweep = Sweep(options)
    begin = time.monotonic()
    sweep.run(args.seed, args.count, begin + args.seconds, args.jobs)
    print(f"{sweep.summary()}; {time.monotonic() - begin:.0f} s")
    return bool(sweep.failures)


if __name__ == "__main__":
    sys.exit(main())
