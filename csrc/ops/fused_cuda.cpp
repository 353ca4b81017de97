// What CUDA devices do: generated kernels for nests and the library's own kernels, launched the way PyTorch expects it of an op.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <nvtx3/nvToolsExt.h>

#include <cstdlib>
#include <string>

#include "kernels/cuda/compiler.h"
#include "kernels/cuda/launcher_cuda.h"
#include "kernels/cuda/static_launchers.h"
#include "ops/backend.h"

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

void evaluate_on_cuda(at::Device device, const fused::Program& program, std::span<const std::int64_t> extents,
                      std::span<const OperandView> operands, std::span<const OutputView> outputs) {
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
  } catch (const std::length_error& error) {  // more operands or elements than one kernel takes
    throw cuda::CompileError(error.what());
  }
}

void queue_on_cuda(at::Device device, const cuda::StaticLaunch& launch, at::TensorList) {
  const c10::cuda::CUDAGuard guard(device);
  const Range range(launch.entry);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device.index());
  C10_CUDA_CHECK(cuda::launch_static(launch, stream));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

[[maybe_unused]] const Backend before = exchange_backend(at::kCUDA, {.evaluate = evaluate_on_cuda, .launch = queue_on_cuda});

}  // namespace

}  // namespace wengert::ops
