"""Programs of any length: what repeats becomes a loop, the rest functions of a stretch each, and operands beyond a kernel's
parameters lie in memory."""

from __future__ import annotations

import random
import re

import pytest
import torch
from support import ptx_device
from support.long_programs import Writer, agree_relatively, product_of_sines, random_program, values
from wengert import reference


def source_of(evaluation: ptx_device.Evaluation) -> str:
    return evaluation.plan["launches"][-1]["source"]


def loops(source: str) -> list[int]:
    return [int(passes) for passes in re.findall(r"pass < (\d+)", source)]


def check(text: str, operands: list[torch.Tensor], tolerance: float = 1e-12, **limits) -> ptx_device.Evaluation:
    evaluation = ptx_device.evaluate(text, operands, **limits)
    for mine, twin in zip(evaluation.results, reference.evaluate(operands, text), strict=True):
        agree_relatively(mine, twin, tolerance)
    return evaluation


# ------------------------------------------------------------------------------------------------------------------- loops
def test_a_chain_is_one_loop_of_one_source_whatever_its_length():
    sources = [source_of(check(product_of_sines(length), values(length))) for length in (100, 1000)]
    assert [loops(source) for source in sources] == [[98], [998]]  # the first value is no product
    assert abs(len(sources[0]) - len(sources[1])) < 40  # digits


def test_short_programs_are_one_stretch():
    source = source_of(check(product_of_sines(40), values(40)))
    assert loops(source) == [] and "__noinline__ void section" not in source


def test_what_does_not_repeat_is_many_short_functions():
    rng, program, length = random.Random(1), Writer(), 400
    value = program.apply("sin", "a0")
    for k in range(1, length):
        value = program.apply(
            rng.choice(["mul", "sub", "maximum"]), value, program.apply(rng.choice(["sin", "cos", "tanh"]), f"a{k}")
        )
    source = source_of(check(program.text(length, [f"{value} f64"]), values(length)))
    assert loops(source) == [] and source.count("__noinline__ void section") > 10


def test_a_rollout_carries_its_state_and_keeps_its_parameters():
    """Leapfrog: two values carried, two parameters the same in every step, a step size and a force of each step."""
    program, steps = Writer(), 60
    q, p = "a0", "a1"
    for k in range(steps):
        force = program.apply("mul", program.apply("sin", program.apply("mul", q, "a2")), f"a{4 + 2 * k}")
        p = program.apply("sub", p, program.apply("mul", force, f"a{5 + 2 * k}"))
        q = program.apply("add", q, program.apply("mul", p, "a3"))
    operands = values(4 + 2 * steps)
    operands[3] = torch.tensor([0.1], dtype=torch.float64)
    source = source_of(check(program.text(len(operands), [f"{q} f64", f"{p} f64"]), operands))
    assert loops(source) == [steps - 1]


def test_operands_may_be_read_backwards_and_every_other_one():
    program, steps = Writer(), 80
    value = program.apply("sin", "a0")
    for k in range(steps):
        term = program.apply("sub", f"a{steps - k}", f"a{steps + 2 * k}")
        value = program.apply("sub", program.apply("sin", value), term)
    assert loops(source_of(check(program.text(3 * steps, [f"{value} f64"]), values(3 * steps)))) == [steps]


def test_loads_of_different_types_do_not_take_turns():
    length = 90
    operands = [x if k % 2 else x.float() for k, x in enumerate(values(length))]
    (passes,) = loops(source_of(check(product_of_sines(length), operands)))
    assert passes in (43, 44), "two factors a pass"
    operands[50] = operands[50].to(torch.float16)
    assert len(loops(source_of(check(product_of_sines(length), operands)))) == 2


@pytest.mark.parametrize("kept", [0, 1, 30, 58, 59])
def test_values_that_are_read_later_end_the_loop(kept):
    program, steps, held = Writer(), 60, None
    value = program.apply("sin", "a0")
    for k in range(steps):
        value = program.apply("mul", program.apply("sin", value), program.apply("cos", f"a{k}"))
        held = value if k == kept else held
    total = program.apply("sub", value, program.apply("mul", "0.5", held))
    source = source_of(check(program.text(steps, [f"{total} f64", f"{value} f64"]), values(steps)))
    assert sum(loops(source)) >= 40


def test_a_loop_within_the_steps_of_a_rollout():
    program, steps = Writer(), 40
    value = program.apply("sin", "a0")
    for k in range(steps):
        for i in range(6):
            value = program.apply("sin", program.apply("mul", value, f"a{6 * k + i}"))
        value = program.apply("tanh", program.apply("sub", value, "0.25"))
    source = source_of(check(program.text(6 * steps, [f"{value} f64"]), values(6 * steps)))
    assert steps - 2 <= max(loops(source)) <= steps


def test_values_that_wait_for_the_way_back_stay_alive():
    """As in a second derivative: the products from the front meet those from the back."""
    program, steps = Writer(), 150
    products = [program.apply("sin", "a0")]
    for k in range(1, steps):
        products.append(program.apply("mul", products[-1], program.apply("add", program.apply("sin", f"a{k}"), "0.5")))
    value = program.apply("cos", products[-1])
    for product in reversed(products):
        value = program.apply("sub", program.apply("mul", value, "0.5"), product)
    check(program.text(steps, [f"{value} f64"]), values(steps))


def test_steps_of_many_operations_are_stretches():
    rng = random.Random(3)
    body = [(rng.choice(["mul", "sub", "maximum"]), rng.choice(["sin", "cos", "tanh"])) for _ in range(300)]
    program, steps = Writer(), 3
    value = program.apply("sin", "a0")
    for k in range(steps * len(body)):
        outer, inner = body[k % len(body)]
        value = program.apply(outer, value, program.apply(inner, f"a{k}"))
    operands = values(steps * len(body))
    assert loops(source_of(check(program.text(len(operands), [f"{value} f64"]), operands))) == []


@pytest.mark.parametrize("sums", [[""], [" sum=0"], [" sum=1"], [" sum=0,1", ""]], ids=str)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_loops_in_every_kind_of_kernel(sums, dtype):
    length = 60
    text = product_of_sines(length, dtype, rank=2)
    last = text.splitlines()[-1]
    text = text.replace(last, "\n".join(last + axes for axes in sums))
    shapes = [(6, 32), (1, 32), (6, 1), (6, 32)]
    operands = [values(1, shapes[k % 4], ptx_device.DTYPES[dtype])[0] * (0.5 + 0.01 * k) for k in range(length)]
    evaluation = check(text, operands, tolerance=1e-12 if dtype == "f64" else 2e-5)
    assert sum(loops(source_of(evaluation))) > 0


@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed):
    check(*random_program(seed))


def test_random_programs_are_not_all_straight():
    with_loops = 0
    for seed in range(24):
        text, operands = random_program(seed)
        plan = ptx_device.make_plan(text, operands, ptx_device.new_outputs(text, operands))
        with_loops += bool(loops(plan["launches"][-1]["source"]))
    assert with_loops >= 12


# ------------------------------------------------------------------------------------------------- more operands than parameters
FIT = 2700  # operands whose addresses and strides fit a kernel's parameters, in one loop


def entries(evaluation: ptx_device.Evaluation) -> list[str]:
    return [launch["entry"] for launch in evaluation.plan["launches"]]


def test_operands_beyond_the_parameters_are_looked_up_in_memory():
    evaluation = check(product_of_sines(FIT), values(FIT, (3,)))
    assert entries(evaluation) == ["wengert_map"] and evaluation.plan["workspace_bytes"] == 0
    evaluation = check(product_of_sines(2 * FIT), values(2 * FIT, (3,)))
    assert entries(evaluation) == ["wengert_table"] * 2 + ["wengert_map"]
    assert "kInMemory = true" in source_of(evaluation)
    # An address and a stride of each operand.
    assert 2 * FIT * 12 <= evaluation.plan["workspace_bytes"] < 2 * FIT * 12 + 512
    assert all(len(launch["parameters"]) <= 32764 for launch in evaluation.plan["launches"])


@pytest.mark.parametrize("sums", [" sum=1", " sum=0"])
@pytest.mark.parametrize("pieces", [False, True])
def test_sums_over_operands_in_memory(sums, pieces):
    """With partial sums in the same workspace."""
    length = 2600
    text = product_of_sines(length, rank=2)
    text = text.rstrip("\n") + sums + "\n"
    operands = values(length, (4, 3) if not pieces else (1, 1200) if sums == " sum=1" else (1200, 1))
    limits = {"iterations_per_lane": 1} if pieces else {}
    evaluation = check(text, operands, **limits)
    assert entries(evaluation)[-2 if pieces else -1 :] == ["wengert_sum"] * (2 if pieces else 1)
    assert entries(evaluation)[0] == "wengert_table"


def test_straight_code_over_operands_in_memory():
    rng, program, length = random.Random(2), Writer(), 3000
    value = "a0"
    for k in range(1, length):
        value = program.apply(rng.choice(["sub", "maximum", "minimum"]), value, f"a{k}")
    evaluation = check(program.text(length, [f"{value} f64"]), values(length, (3,)))
    assert entries(evaluation) == ["wengert_table"] * 2 + ["wengert_map"]


def test_numbers_of_the_host_among_operands_in_memory():
    length = 3000
    text, operands = product_of_sines(length), values(length, (2,))
    number = torch.tensor([0.75], dtype=torch.float64)
    operands[7::5] = [number] * len(operands[7::5])
    out = torch.empty(2, dtype=torch.float64)
    given = [(x.data_ptr(), "f64", ptx_device.window(x), x is number) for x in operands]
    plan = ptx_device.cuda.plan(text, [2], given, [(out.data_ptr(), "f64", [1], False)])
    ptx_device.execute(plan, [x for x in operands if x is not number] + [out])  # the number's memory may not be touched
    agree_relatively(out, reference.evaluate(operands, text)[0])
