// Adds the plans of the kernels that nvcc compiles to the submodule wengert._C.cuda.
#pragma once
#include <pybind11/pybind11.h>

#include "kernels/cuda/static_launch.h"

namespace wengert::bind {

pybind11::dict to_python(const kernels::cuda::StaticLaunch& launch);

void define_cuda_static(pybind11::module_ module);

}  // namespace wengert::bind
