#include "ops/backend.h"

#include <ATen/Parallel.h>

#include <array>
#include <atomic>

#include "kernels/cpu/loop_nest.h"

namespace wengert::ops {
namespace {

std::atomic<std::uint64_t> launches{0};

struct Entry {
  std::atomic<Evaluator> evaluate{nullptr};
  std::atomic<StaticLauncher> launch{nullptr};
};

Entry& entry(at::DeviceType type) {
  static std::array<Entry, static_cast<std::size_t>(at::COMPILE_TIME_MAX_DEVICE_TYPES)> table{};
  return table[static_cast<std::size_t>(type)];
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
  Entry& at = entry(type);
  return {.evaluate = at.evaluate.exchange(backend.evaluate), .launch = at.launch.exchange(backend.launch)};
}

bool can_evaluate(at::DeviceType type) { return entry(type).evaluate.load(std::memory_order_relaxed) != nullptr; }
bool can_launch(at::DeviceType type) { return entry(type).launch.load(std::memory_order_relaxed) != nullptr; }

void evaluate(at::Device device, const fused::Program& program, std::span<const std::int64_t> extents,
              std::span<const OperandView> operands, std::span<const OutputView> outputs) {
  const Evaluator evaluator = entry(device.type()).evaluate.load(std::memory_order_relaxed);
  TORCH_CHECK(evaluator != nullptr, "wengert::fused: this build has no kernels for ", device);
  launches.fetch_add(1, std::memory_order_relaxed);
  evaluator(device, program, extents, operands, outputs);
}

void launch(at::Device device, const kernels::cuda::StaticLaunch& launch, at::TensorList touched) {
  if (launch.empty()) return;
  const StaticLauncher launcher = entry(device.type()).launch.load(std::memory_order_relaxed);
  TORCH_CHECK(launcher != nullptr, "wengert: this build launches no kernels on ", device);
  launches.fetch_add(1, std::memory_order_relaxed);
  launcher(device, launch, touched);
}

std::uint64_t launch_count() { return launches.load(std::memory_order_relaxed); }

}  // namespace wengert::ops
