// The gradient of a convolution by its data, by another algorithm where PyTorch's is slow.
//
// NOTE [Few channels]
// oneDNN, which PyTorch runs float32 convolutions with on the CPU, works on blocks of 8 or 16 channels, and its gradient by the
// data takes up to 8 times as long as others where channels are few.  The same sums, measured over some 3,000 convolutions of 1
// to 32 channels in, 1 to 96 out, kernels of 1x3 to 15x15, steps of 1 to 4 and dilations (one thread, AVX2; time of PyTorch's
// divided by ours, geometric mean):
//
//     step 1, less than 9 channels out (16)    a convolution of the cotangent with the turned kernel     3.0 (1.2)
//     step 1, 1 to 3 channels in, more out     a matrix product, whose columns are added (col2im)        2.1
//     longer steps, few channels in, more out  the same                                                  2.7
//
// Columns are as many as the kernel has places: of large kernels, and with dilation, PyTorch's is the faster.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "common/node_ptr.h"

namespace wengert::accumulate {

// `cotangent` has any number of leading axes, results too; undefined where PyTorch's own is to be taken.  Adds the number of
// portions it was computed in to `calls`.
at::Tensor convolution_gradient(const common::NodePtr& fn, const at::Tensor& cotangent, std::int64_t& calls);

}  // namespace wengert::accumulate
