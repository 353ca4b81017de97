// The launchers of the kernels that nvcc compiles; only builds with CUDA have them.  Each launches on the current device and
// returns the launch's error; an empty launch does nothing.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/static_launch.h"

namespace wengert::kernels::cuda {

cudaError_t launch_materialize(const StaticLaunch& launch, cudaStream_t stream);
cudaError_t launch_segment_sum(const StaticLaunch& launch, cudaStream_t stream);
cudaError_t launch_small_matmul(const StaticLaunch& launch, cudaStream_t stream);

// Whether the current device can run them: each asks for a kernel of its file.
cudaError_t find_materialize();
cudaError_t find_segment_sum();
cudaError_t find_small_matmul();

// Any of them: a kernel's name begins with its launcher's.
cudaError_t launch_static(const StaticLaunch& launch, cudaStream_t stream);

}  // namespace wengert::kernels::cuda
