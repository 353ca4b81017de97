// What CUDA devices do: generated kernels for nests and the library's own kernels, launched the way PyTorch expects it of an op.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <nvtx3/nvToolsExt.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
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

// An error of loading or launching: where the device is well, PyTorch can do the work instead.
void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (!cuda::is_harmless(status)) C10_CUDA_CHECK(status);
  (void)cudaGetLastError();
  throw cuda::KernelUnavailable(std::string("wengert: ") + what + " failed (" + cudaGetErrorName(status) + ": " +
                                cudaGetErrorString(status) + ")");
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t status = cudaStreamIsCapturing(stream, &capture);
  if (status == cudaErrorStreamCaptureImplicit) {  // the default stream, while one that waits for it captures
    (void)cudaGetLastError();
    return false;
  }
  C10_CUDA_CHECK(status);
  return capture != cudaStreamCaptureStatusNone;
}

cuda::LaunchSite site_of(const c10::cuda::CUDAStream& stream) {
  // The id of a stream that was made elsewhere is its address.
  const bool foreign = stream.stream() != nullptr && stream.id() == reinterpret_cast<c10::StreamId>(stream.stream());
  return {.device = stream.device_index(), .stream = stream.stream(), .forever = foreign || is_capturing(stream)};
}

void evaluate_on_cuda(at::Device device, const fused::Program& program, std::span<const std::int64_t> extents,
                      std::span<const OperandView> operands, std::span<const OutputView> outputs) {
  const c10::cuda::CUDAGuard guard(device);
  const Range range("wengert::fused");
  cuda::DeviceFacts facts;
  C10_CUDA_CHECK(cuda::current_device(facts));
  try {
    const cuda::Plan plan = cuda::plan(program, extents, operands, outputs, facts.limits);
    if (plan.launches.empty()) return;
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
    const cuda::LaunchSite site = site_of(stream);
    // Freed when this returns, to be taken again by later work of the same stream only.
    c10::DataPtr workspace;
    if (plan.workspace_bytes > 0) workspace = c10::cuda::CUDACachingAllocator::get()->allocate(plan.workspace_bytes);
    for (const cuda::Launch& launch : plan.launches) {
      std::shared_ptr<const cuda::Module> module;
      check(cuda::load(launch.kernel, facts.arch, site, module), "loading a CUDA kernel");
      const Range inner(launch.kernel->entry.c_str());
      check(cuda::launch(launch, *module, workspace.get(), stream), "launching a CUDA kernel");
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  } catch (const std::length_error& error) {  // more outputs or elements than one kernel takes
    throw cuda::KernelUnavailable(error.what());
  }
}

void queue_on_cuda(at::Device device, const cuda::StaticLaunch& launch, at::TensorList) {
  const c10::cuda::CUDAGuard guard(device);
  const Range range(launch.entry);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device.index());
  check(cuda::launch_static(launch, stream), "launching a CUDA kernel");
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The library is compiled for some architectures only, the kernels of nests for the device at hand.
bool can_launch_on_cuda(at::Device device) {
  enum : std::uint8_t { unknown, no, yes };
  static std::array<std::atomic<std::uint8_t>, C10_COMPILE_TIME_MAX_GPUS> known{};
  std::atomic<std::uint8_t>& answer = known[static_cast<std::size_t>(device.index())];
  if (answer == unknown) {
    const c10::cuda::CUDAGuard guard(device);
    const cudaError_t status = cuda::find_static_kernels();
    if (status != cudaSuccess && !cuda::is_harmless(status)) C10_CUDA_CHECK(status);
    answer = status == cudaSuccess ? yes : no;
  }
  return answer == yes;
}

bool is_capturing_on_cuda(c10::Stream stream) {
  return is_capturing(c10::cuda::CUDAStream(c10::cuda::CUDAStream::UNCHECKED, stream));
}

[[maybe_unused]] const Backend before = exchange_backend(at::kCUDA, {.evaluate = evaluate_on_cuda,
                                                                     .launch = queue_on_cuda,
                                                                     .can_launch = can_launch_on_cuda,
                                                                     .is_capturing = is_capturing_on_cuda,
                                                                     .loaded_bytes = cuda::loaded_bytes,
                                                                     .unload = cuda::unload_kernels});

}  // namespace

}  // namespace wengert::ops
