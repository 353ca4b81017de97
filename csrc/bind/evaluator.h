#pragma once
#include <pybind11/pybind11.h>

namespace wengert::bind {

// Lets tests evaluate nests on the CPU in another way.
void define_evaluator(pybind11::module_ module);

}  // namespace wengert::bind
