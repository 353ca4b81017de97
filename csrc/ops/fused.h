// The dispatcher op wengert::fused.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string_view>
#include <vector>

#include "fused/program.h"
#include "ops/backend.h"

namespace wengert::ops {

// wengert::fused(Tensor[] operands, str program) -> Tensor[] through the dispatcher (autograd, vmap, meta, profiling).
// Every operand has the rank of the nest, size 1 meaning broadcast; outputs keep that rank, size 1 meaning reduced.
std::vector<at::Tensor> fused(at::TensorList operands, std::string_view program);

// fused::intern with a bad text reported as PyTorch's ValueError.
std::shared_ptr<const fused::Program> load(std::string_view text);

// Throws ValueError for a type the kernels do not have (complex, quantised, ...).
fused::Dtype to_dtype(at::ScalarType type);
bool is_supported(at::ScalarType type);
at::ScalarType to_scalar_type(fused::Dtype dtype);

}  // namespace wengert::ops
