#pragma once
#include <pybind11/pybind11.h>

namespace wengert::bind {

// Says where nests can be evaluated, and lets tests evaluate those on the CPU in another way.
void define_evaluator(pybind11::module_ module);

}  // namespace wengert::bind
