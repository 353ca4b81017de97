// What each type of device can do: evaluate fused loop nests and, where it has them, launch the kernels compiled with the
// library.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "fused/program.h"
#include "kernels/cuda/static_launch.h"
#include "kernels/views.h"

namespace wengert::ops {

using OperandView = kernels::OperandView;
using OutputView = kernels::OutputView;

// Evaluates the program over the nest in a device's memory, straight from and into the given windows; below autograd,
// deterministic.  Windows of different outputs must not overlap, nor an output's window and an operand's.
using Evaluator = void (*)(at::Device device, const fused::Program& program, std::span<const std::int64_t> extents,
                           std::span<const OperandView> operands, std::span<const OutputView> outputs);

// Queues a launch that was planned for this device's memory, behind what was queued before.  `touched` is all memory that the
// kernel may read or write.
using StaticLauncher = void (*)(at::Device device, const kernels::cuda::StaticLaunch& launch, at::TensorList touched);

struct Backend {
  Evaluator evaluate = nullptr;
  StaticLauncher launch = nullptr;              // none: ATen does what the kernels would
  bool (*can_launch)(at::Device) = nullptr;     // whether this device has code of the static kernels; none: all have
  bool (*is_capturing)(c10::Stream) = nullptr;  // none: no stream ever does
  std::size_t (*loaded_bytes)() = nullptr;      // of code that was loaded on devices
  void (*unload)() = nullptr;                   // what can be without waiting
};

// Returns the one before; tests put another in the place of the CPU's.
Backend exchange_backend(at::DeviceType type, Backend backend);
bool can_evaluate(at::DeviceType type);
bool can_launch(at::Device device);
bool is_capturing(c10::Stream stream);

void evaluate(at::Device device, const fused::Program& program, std::span<const std::int64_t> extents,
              std::span<const OperandView> operands, std::span<const OutputView> outputs);
void launch(at::Device device, const kernels::cuda::StaticLaunch& launch, at::TensorList touched);

// What generated kernels take, as source, compiled and loaded; and to be rid of them.
std::size_t kernel_bytes();
void clear_kernels();

// Number of nests evaluated and kernels launched so far by this process.
std::uint64_t launch_count();

}  // namespace wengert::ops
