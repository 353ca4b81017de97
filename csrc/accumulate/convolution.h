// The gradient of a convolution by its data, by another algorithm where PyTorch's is slow.
//
// NOTE [Few channels]
// oneDNN, which PyTorch runs float32 convolutions with on the CPU, works on blocks of 8 or 16 channels, and its gradient by the
// data takes up to 8 times as long as others where channels are few.  The same sums, measured with kernels of 3x3 over 1 to 32
// channels on either side (one thread, AVX2; time of PyTorch's divided by ours):
//
//     step 1, less than 16 channels out     a convolution of the cotangent with the turned kernel     1.2 to 8
//     step 1, 1 to 3 channels in, more out  a matrix product, whose columns are added (col2im)        1.2 to 5
//     longer steps, up to 8 channels in     the same                                                  1.2 to 6
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "common/node_ptr.h"

namespace wengert::accumulate {

// `cotangent` has any number of leading axes, results too; undefined where PyTorch's own is to be taken.  Adds the number of
// portions it was computed in to `calls`.
at::Tensor convolution_gradient(const common::NodePtr& fn, const at::Tensor& cotangent, std::int64_t& calls);

}  // namespace wengert::accumulate
