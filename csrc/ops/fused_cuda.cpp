// wengert::fused on CUDA memory: plans and launches generated kernels.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <nvtx3/nvToolsExt.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "kernels/cuda/compiler.h"
#include "kernels/cuda/launcher_cuda.h"
#include "ops/strided.h"

namespace wengert::ops {
namespace {

namespace cuda = kernels::cuda;

// A range on the timeline of a profiler, under WENGERT_NVTX=1.
class Range {
 public:
  explicit Range(const char* name) : on_(enabled()) {
    if (on_) nvtxRangePushA(name);
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
  ~Range() {
    if (on_) nvtxRangePop();
  }

 private:
  static bool enabled() {
    static const bool asked = [] {
      const char* value = std::getenv("WENGERT_NVTX");
      return value != nullptr && *value != '\0' && std::string(value) != "0";
    }();
    return asked;
  }

  bool on_;
};

void evaluate_cuda(const fused::Program& program, std::span<const std::int64_t> extents, std::span<const OperandView> operands,
                   std::span<const OutputView> outputs, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const Range range("wengert::fused");
  cuda::DeviceFacts facts;
  C10_CUDA_CHECK(cuda::current_device(facts));
  try {
    const cuda::Plan plan = cuda::plan(program, extents, operands, outputs, facts.limits);
    if (plan.launches.empty()) return;
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device.index());
    // Freed when this returns, to be taken again by later work of the same stream only.
    c10::DataPtr workspace;
    if (plan.workspace_bytes > 0) workspace = c10::cuda::CUDACachingAllocator::get()->allocate(plan.workspace_bytes);
    for (const cuda::Launch& launch : plan.launches) {
      cudaKernel_t kernel = nullptr;
      C10_CUDA_CHECK(cuda::load(launch.kernel, facts.arch, kernel));
      const Range inner(launch.kernel->entry.c_str());
      C10_CUDA_CHECK(cuda::launch(launch, kernel, workspace.get(), stream));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  } catch (const cuda::CompileError& error) {
    throw Unavailable(error.what());
  } catch (const std::length_error& error) {  // more operands or elements than one kernel takes
    throw Unavailable(error.what());
  }
}

[[maybe_unused]] const bool registered = (set_cuda_evaluator(evaluate_cuda), true);

}  // namespace

TORCH_LIBRARY_IMPL(wengert, CUDA, m) { m.impl("fused", fused_strided); }

}  // namespace wengert::ops
