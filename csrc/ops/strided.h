// What the kernels of wengert::fused for the memory of one device have in common.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "ops/fused.h"

namespace wengert::ops {

// The op on strided tensors of one device: checks, windows and outputs for evaluate().
std::vector<at::Tensor> fused_strided(at::TensorList operands, std::string_view text);

// How evaluate() reaches memory other than the CPU's.  A build without CUDA has none.
using Evaluator = void (*)(const fused::Program& program, std::span<const std::int64_t> extents,
                           std::span<const OperandView> operands, std::span<const OutputView> outputs, at::Device device);
// Called while the library is loaded, before any evaluation.
void set_cuda_evaluator(Evaluator evaluator);

}  // namespace wengert::ops
