#pragma once
#include <pybind11/pybind11.h>

namespace wengert::bind {

// RandomState(device): what a function has drawn since, and back to before.
void define_random_state(pybind11::module_ module);

}  // namespace wengert::bind
