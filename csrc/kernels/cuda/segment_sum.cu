#include "kernels/cuda/segment_sum.h"

#include "kernels/cuda/static_kernel.cuh"

namespace wengert::kernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kUnroll = 4;  // loads in flight per lane

// See NOTE [Shape of a segment sum].
template <class T>
__device__ __forceinline__ void segment_sum(const SegmentSumParameters& parameters) {
  using Total = typename Sum<T>::Type;
  __shared__ Total warps[kSegmentThreads];
  const int thread = static_cast<int>(threadIdx.x), inner_lanes = parameters.inner_lanes;
  const int group_threads = inner_lanes * parameters.position_lanes;
  const int group = thread / group_threads, member = thread % group_threads;
  const int inner_lane = member % inner_lanes, position_lane = member / inner_lanes;

  const std::uint32_t tile = blockIdx.x % parameters.inner_tiles, row = blockIdx.x / parameters.inner_tiles;
  const std::int64_t segment = static_cast<std::int64_t>(row) * (kSegmentThreads / group_threads) + group;
  std::uint32_t element = tile * static_cast<std::uint32_t>(inner_lanes) + static_cast<std::uint32_t>(inner_lane);
  const bool active = segment < parameters.segments && element < parameters.inner;
  std::int64_t value_offset = 0, out_offset = 0;
#pragma unroll
  for (int k = kSegmentLoops - 1; k >= 0; --k) {
    if (k < parameters.first_loop) continue;
    std::uint32_t digit = element;
    if (k > parameters.first_loop) {
      element = digit / parameters.extents[k];
      digit -= element * parameters.extents[k];
    }
    value_offset += digit * parameters.value_strides[k];
    out_offset += digit * parameters.out_strides[k];
  }

  // Inactive threads take part in the reductions below with an empty range.
  Total total = 0;
  std::int64_t position = active ? parameters.starts[segment] + position_lane : 0;
  const std::int64_t end = active ? parameters.starts[segment + 1] : 0;
  const T* values = static_cast<const T*>(parameters.values) + value_offset;
  while (position < end) {
    T loaded[kUnroll];
    std::int64_t ahead = position;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, ahead += parameters.position_lanes) {
      if (ahead < end) loaded[u] = values[parameters.order[ahead] * parameters.position_stride];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, position += parameters.position_lanes) {
      if (position < end) total += widen(loaded[u]);
    }
  }
  for (int lanes = inner_lanes; lanes < kWarp && lanes < group_threads; lanes *= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, lanes);
  }
  if (group_threads > kWarp) {
    warps[thread] = total;
    __syncthreads();
    if (member < inner_lanes) {
      for (int other = kWarp; other < group_threads; other += kWarp) total += warps[thread + other];
    }
  }
  if (!active || member >= inner_lanes) return;
  const std::int64_t target = parameters.targets ? parameters.targets[segment] : segment;
  T& out = static_cast<T*>(parameters.out)[target * parameters.target_stride + out_offset];
  out = narrow<T>(parameters.accumulate ? widen(out) + total : total);
}

}  // namespace

#define WENGERT_SEGMENT_SUM(name, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kSegmentThreads) name(const __grid_constant__ SegmentSumParameters parameters) { \
    segment_sum<T>(parameters);                                                                                                 \
  }
WENGERT_SEGMENT_SUM(segment_sum_f32, float)
WENGERT_SEGMENT_SUM(segment_sum_f64, double)
WENGERT_SEGMENT_SUM(segment_sum_bf16, __nv_bfloat16)
WENGERT_SEGMENT_SUM(segment_sum_f16, __half)
#undef WENGERT_SEGMENT_SUM

cudaError_t launch_segment_sum(const StaticLaunch& launch, cudaStream_t stream) {
  static const NamedKernel kernels[] = {WENGERT_NAMED(segment_sum_f32), WENGERT_NAMED(segment_sum_f64),
                                        WENGERT_NAMED(segment_sum_bf16), WENGERT_NAMED(segment_sum_f16)};
  return launch_named(kernels, launch, stream);
}

cudaError_t find_segment_sum() { return find_kernel(&segment_sum_f32); }

}  // namespace wengert::kernels::cuda
