// The dispatcher op wengert::fused and the direct evaluation of a program on strided windows.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "fused/program.h"

namespace wengert::ops {

// wengert::fused(Tensor[] operands, str program) -> Tensor[] through the dispatcher (autograd, vmap, meta, profiling).
// Every operand has the rank of the nest, size 1 meaning broadcast; outputs keep that rank, size 1 meaning reduced.
std::vector<at::Tensor> fused(at::TensorList operands, const std::string& program);

struct OperandView {
  const void* data;
  fused::Dtype dtype;
  const std::int64_t* strides;  // one per loop, in elements; 0 = broadcast
};

struct OutputView {
  void* data;
  fused::Dtype dtype;
  const std::int64_t* strides;  // one per loop, in elements; ignored on reduced axes
  bool accumulate;              // add to what is there instead of storing
};

// Evaluates the program over the nest on CPU memory, straight from and into the given windows; below autograd, threaded through
// at::parallel_for, deterministic for any number of threads.  Windows of different outputs must not overlap.
void evaluate(const fused::Program& program, std::span<const std::int64_t> extents, std::span<const OperandView> operands,
              std::span<const OutputView> outputs);

}  // namespace wengert::ops
