// Adds the plans of the kernels that nvcc compiles to the submodule wengert._C.cuda.
#pragma once
#include <pybind11/pybind11.h>

namespace wengert::bind {

void define_cuda_static(pybind11::module_ module);

}  // namespace wengert::bind
