// The submodule wengert._C.cuda: plans and compilation of CUDA kernels, which need no GPU.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "fused/program.h"

namespace wengert::bind {

// By the name programs use; throws std::invalid_argument.
fused::Dtype dtype_of(const std::string& name);

void define_cuda(pybind11::module_ module);

}  // namespace wengert::bind
