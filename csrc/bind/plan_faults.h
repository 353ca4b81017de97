#pragma once
#include <torch/csrc/utils/pybind.h>

namespace wengert::bind {

// plan_faults: what the verifier of plans lets pass, for tests.
void define_plan_faults(pybind11::module_& m);

}  // namespace wengert::bind
