// The dispatcher op wengert::fused and the direct evaluation of a program on strided windows.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
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

// What a device cannot do at the moment, with the reason (no compiler for its kernels, say); the message stands for itself.
struct Unavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Evaluates the program over the nest straight from and into the given windows of the device's memory; below autograd and
// deterministic.  On the CPU threaded through at::parallel_for, with the same bits for any number of threads; on a GPU queued on
// the current stream.  Windows of different outputs must not overlap, nor an output's window and an operand's.
void evaluate(const fused::Program& program, std::span<const std::int64_t> extents, std::span<const OperandView> operands,
              std::span<const OutputView> outputs, at::Device device = at::kCPU);

// Number of nests evaluated so far by this process.
std::uint64_t launch_count();

// fused::intern with a bad text reported as PyTorch's ValueError.
std::shared_ptr<const fused::Program> load(std::string_view text);

// Throws ValueError for a type the kernels do not have (complex, quantised, ...).
fused::Dtype to_dtype(at::ScalarType type);
bool is_supported(at::ScalarType type);
at::ScalarType to_scalar_type(fused::Dtype dtype);

}  // namespace wengert::ops
