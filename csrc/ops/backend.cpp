#include "ops/backend.h"

#include <ATen/Parallel.h>

#include <array>
#include <atomic>
#include <list>
#include <mutex>

#include "kernels/cpu/loop_nest.h"
#include "kernels/cuda/compiler.h"
#include "kernels/cuda/launch_plan.h"

namespace wengert::ops {
namespace {

std::atomic<std::uint64_t> launches{0};

std::atomic<const Backend*>& entry(at::DeviceType type) {
  static std::array<std::atomic<const Backend*>, static_cast<std::size_t>(at::COMPILE_TIME_MAX_DEVICE_TYPES)> table{};
  return table[static_cast<std::size_t>(type)];
}

const Backend& backend(at::DeviceType type) {
  static const Backend none;
  const Backend* found = entry(type).load(std::memory_order_acquire);
  return found ? *found : none;
}

// Below this many iterations a nest is not shared out: waking a thread costs more.
constexpr std::int64_t kSerialElements = 32768;

// Threaded through at::parallel_for, with the same bits for any number of threads.
void evaluate_on_cpu(at::Device, const fused::Program& program, std::span<const std::int64_t> extents,
                     std::span<const OperandView> operands, std::span<const OutputView> outputs) {
  thread_local kernels::LoopNest scratch;
  kernels::LoopNest& nest = scratch;
  nest.prepare(program, extents, operands, outputs);
  if (nest.chunks() <= 1 || nest.elements() < kSerialElements) {
    nest.run(0, nest.chunks());
  } else {
    at::parallel_for(0, nest.chunks(), 1, [&nest](std::int64_t first, std::int64_t last) { nest.run(first, last); });
  }
  nest.finish();
}

[[maybe_unused]] const Backend before = exchange_backend(at::kCPU, {.evaluate = evaluate_on_cpu});

}  // namespace

Backend exchange_backend(at::DeviceType type, Backend backend) {
  static std::mutex mutex;
  static auto* all = new std::list<Backend>;  // another thread may still be at one before
  std::lock_guard lock(mutex);
  const Backend* old = entry(type).exchange(&all->emplace_back(backend), std::memory_order_acq_rel);
  return old ? *old : Backend{};
}

bool can_evaluate(at::DeviceType type) { return backend(type).evaluate != nullptr; }

bool can_launch(at::Device device) {
  const Backend& at = backend(device.type());
  return at.launch != nullptr && (at.can_launch == nullptr || at.can_launch(device));
}

bool is_capturing(c10::Stream stream) {
  const Backend& at = backend(stream.device_type());
  return at.is_capturing != nullptr && at.is_capturing(stream);
}

void evaluate(at::Device device, const fused::Program& program, std::span<const std::int64_t> extents,
              std::span<const OperandView> operands, std::span<const OutputView> outputs) {
  const Evaluator evaluator = backend(device.type()).evaluate;
  TORCH_CHECK(evaluator != nullptr, "wengert::fused: this build has no kernels for ", device);
  launches.fetch_add(1, std::memory_order_relaxed);
  evaluator(device, program, extents, operands, outputs);
}

void launch(at::Device device, const kernels::cuda::StaticLaunch& launch, at::TensorList touched) {
  if (launch.empty()) return;
  const StaticLauncher launcher = backend(device.type()).launch;
  TORCH_CHECK(launcher != nullptr, "wengert: this build launches no kernels on ", device);
  launches.fetch_add(1, std::memory_order_relaxed);
  launcher(device, launch, touched);
}

std::size_t kernel_bytes() {
  const Backend& gpu = backend(at::kCUDA);
  return kernels::cuda::kernel_bytes() + static_cast<std::size_t>(kernels::cuda::compiler_statistics().bytes) +
         (gpu.loaded_bytes ? gpu.loaded_bytes() : 0);
}

void clear_kernels() {
  kernels::cuda::forget_kernels();
  kernels::cuda::forget_outcomes();
  if (const Backend& gpu = backend(at::kCUDA); gpu.unload) gpu.unload();
}

std::uint64_t launch_count() { return launches.load(std::memory_order_relaxed); }

}  // namespace wengert::ops
