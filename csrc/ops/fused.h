// The dispatcher op wengert::fused and the direct evaluation of a program on strided windows.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "fused/program.h"
#include "kernels/views.h"

namespace wengert::ops {

// wengert::fused(Tensor[] operands, str program) -> Tensor[] through the dispatcher (autograd, vmap, meta, profiling).
// Every operand has the rank of the nest, size 1 meaning broadcast; outputs keep that rank, size 1 meaning reduced.
std::vector<at::Tensor> fused(at::TensorList operands, const std::string& program);

using OperandView = kernels::OperandView;
using OutputView = kernels::OutputView;

// Evaluates the program over the nest in a device's memory, straight from and into the given windows; below autograd,
// deterministic.  Windows of different outputs must not overlap, nor an output's window and an operand's.
using Evaluator = void (*)(at::Device device, const fused::Program& program, std::span<const std::int64_t> extents,
                           std::span<const OperandView> operands, std::span<const OutputView> outputs);
void evaluate(at::Device device, const fused::Program& program, std::span<const std::int64_t> extents,
              std::span<const OperandView> operands, std::span<const OutputView> outputs);

// Each type of device has one evaluator, or none.  Returns the one before; tests put another in the place of the CPU's.
Evaluator exchange_evaluator(at::DeviceType type, Evaluator evaluator);
bool can_evaluate(at::DeviceType type);

// Number of nests evaluated so far by this process.
std::uint64_t launch_count();

// fused::intern with a bad text reported as PyTorch's ValueError.
std::shared_ptr<const fused::Program> load(std::string_view text);

// Throws ValueError for a type the kernels do not have (complex, quantised, ...).
fused::Dtype to_dtype(at::ScalarType type);
bool is_supported(at::ScalarType type);
at::ScalarType to_scalar_type(fused::Dtype dtype);

}  // namespace wengert::ops
