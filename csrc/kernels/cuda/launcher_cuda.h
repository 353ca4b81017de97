// Loads compiled kernels and launches plans: the only part of this room that calls the CUDA runtime.  Every function works on the
// current device, never waits for it, and returns the runtime's status.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/launch_plan.h"
#include "kernels/cuda/module_cache.h"

namespace wengert::kernels::cuda {

struct DeviceFacts {
  int arch = 0;  // 10 * major + minor of the compute capability
  Limits limits;
};
cudaError_t current_device(DeviceFacts& facts);

// The kernel for `arch`, to be launched at `site`; compiled and loaded at its first use.  To be held until the launch has been
// queued.  Throws CompileError.  Any thread.
cudaError_t load(const std::shared_ptr<const Kernel>& kernel, int arch, const LaunchSite& site,
                 std::shared_ptr<const Module>& module);
std::size_t loaded_bytes();
// Unloads what no launch needs any more, see NOTE [Unloading kernels].
void unload_kernels();

// Queues a launch whose workspace begins at `workspace`.
cudaError_t launch(const Launch& launch, const Module& module, const void* workspace, cudaStream_t stream);

// Whether the static kernels have code for the current device, or code that its driver can compile.
cudaError_t find_static_kernels();

// Whether the device and its other work are none the worse for this error of loading or launching a kernel.
bool is_harmless(cudaError_t status);

}  // namespace wengert::kernels::cuda
