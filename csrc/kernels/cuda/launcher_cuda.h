// Loads compiled kernels and launches plans: the only part of this room that calls the CUDA runtime.  Every function works on the
// current device, never waits for it, and returns the runtime's status.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/launch_plan.h"

namespace wengert::kernels::cuda {

struct DeviceFacts {
  int arch = 0;  // 10 * major + minor of the compute capability
  Limits limits;
};
cudaError_t current_device(DeviceFacts& facts);

// Compiles the kernel for `arch` and loads it at its first use by the process; throws CompileError.  Any thread.
cudaError_t load(const std::shared_ptr<const Kernel>& kernel, int arch, cudaKernel_t& loaded);

// Queues a launch whose workspace begins at `workspace`.
cudaError_t launch(const Launch& launch, cudaKernel_t loaded, const void* workspace, cudaStream_t stream);

}  // namespace wengert::kernels::cuda
