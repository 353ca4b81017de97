// The submodule wengert._C.cuda: plans and compilation of CUDA kernels, which need no GPU.
#pragma once
#include <pybind11/pybind11.h>

namespace wengert::bind {

void define_cuda(pybind11::module_ module);

}  // namespace wengert::bind
