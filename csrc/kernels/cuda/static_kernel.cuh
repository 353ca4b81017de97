// What the kernels that nvcc compiles share: arithmetic on storage types, and launching by name.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/static_launch.h"
#include "kernels/cuda/static_launchers.h"

namespace wengert::kernels::cuda {

// 16-bit floats are summed in float, as PyTorch does.
template <class T>
struct Sum {
  using Type = float;
};
template <>
struct Sum<double> {
  using Type = double;
};

template <class T>
__device__ __forceinline__ typename Sum<T>::Type widen(T value) {
  return static_cast<typename Sum<T>::Type>(value);
}
template <>
__device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}
template <>
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T narrow(typename Sum<T>::Type value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

struct NamedKernel {
  const char* name;
  const void* kernel;
};

#define WENGERT_NAMED(name) \
  NamedKernel { #name, reinterpret_cast<const void*>(&name) }

template <std::size_t count>
cudaError_t launch_named(const NamedKernel (&kernels)[count], const StaticLaunch& launch, cudaStream_t stream) {
  if (launch.empty()) return cudaSuccess;
  for (const NamedKernel& kernel : kernels) {
    if (std::strcmp(kernel.name, launch.entry) != 0) continue;
    void* parameters[] = {const_cast<char*>(launch.parameters.data())};
    const dim3 grid(launch.grid[0], launch.grid[1], launch.grid[2]), block(launch.block[0], launch.block[1], launch.block[2]);
    // What <<<>>> expands to, for a kernel known by its address.
    (void)cudaLaunchKernel(kernel.kernel, grid, block, parameters, launch.shared_bytes, stream);
    return cudaGetLastError();
  }
  return cudaErrorInvalidDeviceFunction;
}

template <class Kernel>
cudaError_t find_kernel(Kernel* kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess) (void)cudaGetLastError();
  return status;
}

}  // namespace wengert::kernels::cuda
