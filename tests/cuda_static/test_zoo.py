"""The functions of the zoo on a device that launches the static kernels: every plan that the engine makes for a GPU is run."""

import pytest
from support.engine_zoo import CASES, PROBLEMS, check_case, check_problem


@pytest.mark.parametrize("name", CASES)
def test_jacobians_of_the_zoo(name, static_launches):
    check_case(name, "jacobian")


@pytest.mark.parametrize("name", PROBLEMS)
def test_jacobians_of_the_benchmark_problems(name, static_launches):
    check_problem(name)
