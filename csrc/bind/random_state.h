#pragma once
#include <pybind11/pybind11.h>

namespace wengert::bind {

// What the function returns; an operator that would draw random numbers raises an error instead, before it does.
pybind11::object without_draws(const pybind11::object& function);

// RandomState(device): back to before what a function has drawn since.
void define_random_state(pybind11::module_ module);

}  // namespace wengert::bind
