#include "kernels/cuda/launcher_cuda.h"

#include <mutex>
#include <string_view>
#include <unordered_map>

#include "kernels/cuda/compiler.h"
#include "kernels/cuda/static_launchers.h"

namespace wengert::kernels::cuda {
namespace {

// A kernel that was loaded for one architecture; it serves every such device.  Never unloaded: launches may be under way.
struct Loaded {
  std::shared_ptr<const Kernel> source;  // keeps the id, by which it is found again, in use
  Bytes image;
  cudaLibrary_t library = nullptr;
  cudaKernel_t kernel = nullptr;
};

struct Cache {
  std::mutex mutex;
  std::unordered_map<std::uint64_t, Loaded> kernels;  // by id and architecture
  std::unordered_map<int, DeviceFacts> devices;
};

Cache& cache() {
  static Cache* instance = new Cache;  // never destroyed: threads may outlive static destructors
  return *instance;
}

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
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  Cache& c = cache();
  std::lock_guard lock(c.mutex);
  auto found = c.devices.find(device);
  if (found == c.devices.end()) {
    DeviceFacts read;
    if (const cudaError_t status = read_facts(device, read); status != cudaSuccess) return status;
    found = c.devices.emplace(device, read).first;
  }
  facts = found->second;
  return cudaSuccess;
}

cudaError_t load(const std::shared_ptr<const Kernel>& kernel, int arch, cudaKernel_t& loaded) {
  constexpr std::uint64_t kArchs = 4096;
  const std::uint64_t key = kernel->id * kArchs + static_cast<std::uint64_t>(arch);
  Cache& c = cache();
  {
    std::lock_guard lock(c.mutex);
    if (auto found = c.kernels.find(key); found != c.kernels.end()) {
      loaded = found->second.kernel;
      return cudaSuccess;
    }
  }
  // Compiled without the lock, so that other kernels can be launched meanwhile.
  Loaded entry{.source = kernel, .image = compile(kernel->source, arch, Artifact::cubin)};
  std::lock_guard lock(c.mutex);
  if (auto found = c.kernels.find(key); found != c.kernels.end()) {  // another thread was faster
    loaded = found->second.kernel;
    return cudaSuccess;
  }
  const RelaxedCapture relaxed;
  cudaError_t status = cudaLibraryLoadData(&entry.library, entry.image->data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (status == cudaSuccess) status = cudaLibraryGetKernel(&entry.kernel, entry.library, kernel->entry.c_str());
  if (status != cudaSuccess) return status;
  loaded = entry.kernel;
  c.kernels.emplace(key, std::move(entry));
  return cudaSuccess;
}

cudaError_t launch(const Launch& launch, cudaKernel_t loaded, const void* workspace, cudaStream_t stream) {
  std::vector<char> parameters = launch.parameters_at(workspace);
  void* arguments[] = {parameters.data()};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
  config.blockDim = dim3(launch.block[0], launch.block[1], launch.block[2]);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(loaded), arguments);
}

cudaError_t launch_static(const StaticLaunch& launch, cudaStream_t stream) {
  const std::string_view entry = launch.entry;
  if (entry.starts_with("materialize")) return launch_materialize(launch, stream);
  if (entry.starts_with("segment_sum")) return launch_segment_sum(launch, stream);
  return launch_small_matmul(launch, stream);  // an error where it does not know the name
}

}  // namespace wengert::kernels::cuda
