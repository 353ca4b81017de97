#include "kernels/cuda/launcher_cuda.h"

#include <mutex>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kernels/cuda/compiler.h"
#include "kernels/cuda/static_launchers.h"

namespace wengert::kernels::cuda {
namespace {

// Loading is allowed while this thread captures a graph: it is no work of a stream's.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int load_image(const std::vector<char>& image, const std::string& entry, Module& module) {
  const RelaxedCapture relaxed;
  cudaLibrary_t library = nullptr;
  cudaKernel_t kernel = nullptr;
  cudaError_t status = cudaLibraryLoadData(&library, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (status != cudaSuccess) return status;
  status = cudaLibraryGetKernel(&kernel, library, entry.c_str());
  if (status != cudaSuccess) {
    cudaLibraryUnload(library);
    return status;
  }
  module = {.library = library, .kernel = kernel};
  return cudaSuccess;
}

// The device of a site, for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    int now = before_;
    cudaGetDevice(&now);
    if (now != before_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
};

void* record_event(const LaunchSite& site) {
  const RelaxedCapture relaxed;
  const OnDevice on(site.device);
  const auto stream = static_cast<cudaStream_t>(site.stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusActive;
  cudaEvent_t event = nullptr;
  if (cudaStreamIsCapturing(stream, &capture) == cudaSuccess && capture == cudaStreamCaptureStatusNone &&
      cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess) {
    if (cudaEventRecord(event, stream) == cudaSuccess) return event;
    cudaEventDestroy(event);
  }
  (void)cudaGetLastError();
  return nullptr;
}

bool has_passed(void* recorded) {
  const RelaxedCapture relaxed;
  const auto event = static_cast<cudaEvent_t>(recorded);
  if (cudaEventQuery(event) != cudaSuccess) {
    (void)cudaGetLastError();  // cudaErrorNotReady is one
    return false;
  }
  cudaEventDestroy(event);
  return true;
}

void unload_module(Module& module) {
  const RelaxedCapture relaxed;
  cudaLibraryUnload(static_cast<cudaLibrary_t>(module.library));
}

constexpr std::size_t kMostLoadedBytes = std::size_t{128} << 20;

// Never destroyed: threads may outlive static destructors.
ModuleCache& modules() {
  static auto* instance = new ModuleCache(
      {.load = load_image, .unload = unload_module, .record = record_event, .passed = has_passed}, kMostLoadedBytes);
  return *instance;
}

cudaError_t read_facts(int device, DeviceFacts& facts) {
  int major = 0, minor = 0;
  cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&facts.limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&facts.limits.threads_per_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  facts.arch = 10 * major + minor;
  return status;
}

}  // namespace

cudaError_t current_device(DeviceFacts& facts) {
  static std::mutex mutex;
  static auto* devices = new std::unordered_map<int, DeviceFacts>;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  std::lock_guard lock(mutex);
  auto found = devices->find(device);
  if (found == devices->end()) {
    DeviceFacts read;
    if (const cudaError_t status = read_facts(device, read); status != cudaSuccess) return status;
    found = devices->emplace(device, read).first;
  }
  facts = found->second;
  return cudaSuccess;
}

cudaError_t load(const std::shared_ptr<const Kernel>& kernel, int arch, const LaunchSite& site,
                 std::shared_ptr<const Module>& module) {
  constexpr std::uint64_t kArchs = 4096;
  const std::uint64_t key = kernel->id * kArchs + static_cast<std::uint64_t>(arch);
  module = modules().find(key, site);
  if (module) return cudaSuccess;
  // Compiled without the lock, so that other kernels can be launched meanwhile.
  const Bytes image = compile(kernel->source, arch, Artifact::cubin);
  return static_cast<cudaError_t>(modules().load(key, *image, kernel->entry, site, module));
}

std::size_t loaded_bytes() { return modules().bytes(); }
void unload_kernels() { modules().clear(); }

cudaError_t launch(const Launch& launch, const Module& module, const void* workspace, cudaStream_t stream) {
  std::vector<char> parameters = launch.parameters_at(workspace);
  void* arguments[] = {parameters.data()};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
  config.blockDim = dim3(launch.block[0], launch.block[1], launch.block[2]);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelExC(&config, module.kernel, arguments);
}

cudaError_t find_static_kernels() {
  const RelaxedCapture relaxed;
  for (auto* find : {find_materialize, find_segment_sum, find_small_matmul}) {
    if (const cudaError_t status = find(); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

bool is_harmless(cudaError_t status) {
  switch (status) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorSymbolNotFound:
    case cudaErrorSharedObjectInitFailed:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidValue:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorMemoryAllocation:
    case cudaErrorNotSupported:
      return true;
    default:
      return false;
  }
}

cudaError_t launch_static(const StaticLaunch& launch, cudaStream_t stream) {
  const std::string_view entry = launch.entry;
  if (entry.starts_with("materialize")) return launch_materialize(launch, stream);
  if (entry.starts_with("segment_sum")) return launch_segment_sum(launch, stream);
  return launch_small_matmul(launch, stream);  // an error where it does not know the name
}

}  // namespace wengert::kernels::cuda
