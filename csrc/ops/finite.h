// Whether numbers are finite, in one pass over all of them.
#pragma once
#include <ATen/core/Tensor.h>

namespace wengert::ops {

// Undefined tensors are.  On a device it waits for them; large numbers whose squares overflow count as infinite there.
bool are_finite(at::TensorList tensors);

}  // namespace wengert::ops
