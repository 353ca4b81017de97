#include "kernels/cuda/materialize.h"

#include "kernels/cuda/static_kernel.cuh"

namespace wengert::kernels::cuda {
namespace {

constexpr int kUnroll = 4;  // loads in flight per thread, enough to cover the latency of memory

// The number of iterations whose target lies before `border`.
template <class Index>
__device__ Index lower_bound(const MaterializeNest<Index>& nest, Index border) {
  if (border <= nest.start) return 0;
  Index rest = border - nest.start, count = 0;
  for (int k = nest.first_loop; k < kMaterializeLoops; ++k) {
    const Index digit = rest / nest.steps[k];
    if (digit >= nest.extents[k]) return count + nest.extents[k] * nest.inner[k];
    count += digit * nest.inner[k];
    rest -= digit * nest.steps[k];
  }
  return count + (rest > 0);
}

// Loop indices of an iteration, moved on by the number of threads without a division.
template <class Index>
struct Position {
  Index digits[kMaterializeLoops];

  __device__ __forceinline__ Position(const MaterializeNest<Index>& nest, Index iteration) {
#pragma unroll
    for (int k = 0; k < kMaterializeLoops; ++k) {
      digits[k] = 0;
      if (k < nest.first_loop) continue;
      digits[k] = iteration / nest.inner[k];
      iteration -= digits[k] * nest.inner[k];
    }
  }
  __device__ __forceinline__ void jump(const MaterializeNest<Index>& nest) {
    Index carry = 0;
#pragma unroll
    for (int k = kMaterializeLoops - 1; k >= 0; --k) {
      if (k < nest.first_loop) continue;
      digits[k] += nest.jump[k] + carry;
      carry = k > nest.first_loop && digits[k] >= nest.extents[k];
      if (carry) digits[k] -= nest.extents[k];
    }
  }
  __device__ __forceinline__ Index offset(const Index* strides) const {
    Index sum = 0;
#pragma unroll
    for (int k = 0; k < kMaterializeLoops; ++k) sum += digits[k] * strides[k];
    return sum;
  }
};

// Writes the iterations [first, last) of a block into the chunk that begins at element `begin` of the output.
template <class T, class Index>
__device__ __forceinline__ void put(const MaterializeNest<Index>& nest, Index first, Index last, Index begin, T* chunk) {
  const T* value = static_cast<const T*>(nest.value);
  Index iteration = first + static_cast<Index>(threadIdx.x);
  if (iteration >= last) return;
  Position<Index> position(nest, iteration);
  while (iteration < last) {
    T values[kUnroll];
    Index targets[kUnroll];
    Index ahead = iteration;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, ahead += kMaterializeThreads) {
      if (ahead < last) {
        values[u] = value[position.offset(nest.strides)];
        targets[u] = nest.start + position.offset(nest.steps) - begin;
      }
      position.jump(nest);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, iteration += kMaterializeThreads) {
      if (iteration >= last) continue;
      T& target = chunk[targets[u]];
      target = nest.adds ? narrow<T>(widen(target) + widen(values[u])) : values[u];
    }
  }
}

// See NOTE [Chunks of a materialised array].
template <class T, class Index>
__device__ __forceinline__ void materialize(const MaterializeParameters<Index>& parameters) {
  constexpr int kVector = 16 / sizeof(T), kChunk = kMaterializeChunkBytes / sizeof(T);
  constexpr int kVectors = kMaterializeChunkBytes / 16;
  static_assert(kVectors % kMaterializeThreads == 0, "every thread stores equally many vectors");
  static_assert(2 * kMaterializeBlocks <= kMaterializeThreads, "one thread finds one end of one block's range");
  __shared__ uint4 vectors[kVectors];
  __shared__ Index ends[2 * kMaterializeBlocks];
  T* chunk = reinterpret_cast<T*>(vectors);

  const int thread = static_cast<int>(threadIdx.x);
  const Index begin = static_cast<Index>(blockIdx.x) * kChunk - parameters.lead;  // before 0 in the first chunk
#pragma unroll
  for (int v = 0; v < kVectors; v += kMaterializeThreads) vectors[v + thread] = uint4{0, 0, 0, 0};
  if (thread < 2 * parameters.blocks) {
    ends[thread] = lower_bound(parameters.nests[thread / 2], begin + static_cast<Index>(thread % 2) * kChunk);
  }
  __syncthreads();
  for (int b = 0; b < parameters.blocks; ++b) {
    const Index first = ends[2 * b], last = ends[2 * b + 1];
    if (first >= last) continue;
    put(parameters.nests[b], first, last, begin, chunk);
    __syncthreads();
  }
  T* out = static_cast<T*>(parameters.out) + begin;
#pragma unroll
  for (int v = 0; v < kVectors; v += kMaterializeThreads) {
    const int element = (v + thread) * kVector;
    const Index at = begin + element;
    if (at >= 0 && at + kVector <= parameters.count) {
      *reinterpret_cast<uint4*>(out + element) = vectors[v + thread];
      continue;
    }
    for (int e = 0; e < kVector; ++e) {
      if (at + e >= 0 && at + e < parameters.count) out[element + e] = chunk[element + e];
    }
  }
}

}  // namespace

// Blocks that must fit a multiprocessor, 0 if ptxas may choose: for compute capability 12.0 it would spill 64-bit indices.
template <class Index>
constexpr int kSharing = sizeof(Index) > 4 ? 4 : 0;

#define WENGERT_MATERIALIZE(name, T, Index)                                          \
  extern "C" __global__ void __launch_bounds__(kMaterializeThreads, kSharing<Index>) \
      name(const __grid_constant__ MaterializeParameters<Index> parameters) {        \
    materialize<T>(parameters);                                                      \
  }
WENGERT_MATERIALIZE(materialize_f32, float, std::int32_t)
WENGERT_MATERIALIZE(materialize_f64, double, std::int32_t)
WENGERT_MATERIALIZE(materialize_bf16, __nv_bfloat16, std::int32_t)
WENGERT_MATERIALIZE(materialize_f16, __half, std::int32_t)
WENGERT_MATERIALIZE(materialize_f32_wide, float, std::int64_t)
WENGERT_MATERIALIZE(materialize_f64_wide, double, std::int64_t)
WENGERT_MATERIALIZE(materialize_bf16_wide, __nv_bfloat16, std::int64_t)
WENGERT_MATERIALIZE(materialize_f16_wide, __half, std::int64_t)
#undef WENGERT_MATERIALIZE

cudaError_t launch_materialize(const StaticLaunch& launch, cudaStream_t stream) {
  static const NamedKernel kernels[] = {
      WENGERT_NAMED(materialize_f32),       WENGERT_NAMED(materialize_f64),      WENGERT_NAMED(materialize_bf16),
      WENGERT_NAMED(materialize_f16),       WENGERT_NAMED(materialize_f32_wide), WENGERT_NAMED(materialize_f64_wide),
      WENGERT_NAMED(materialize_bf16_wide), WENGERT_NAMED(materialize_f16_wide),
  };
  return launch_named(kernels, launch, stream);
}

cudaError_t find_materialize() { return find_kernel(&materialize_f32); }

}  // namespace wengert::kernels::cuda
