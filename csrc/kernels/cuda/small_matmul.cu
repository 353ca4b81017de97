#include "kernels/cuda/small_matmul.h"

#include "kernels/cuda/static_kernel.cuh"

namespace wengert::kernels::cuda {
namespace {

enum View { kA, kB, kScale, kOut };

// Exact while n * divisor < 2^32, which elements of shared memory and areas of small matrices keep by far.
__device__ __forceinline__ int quotient(int n, int divisor, std::uint32_t magic) {
  return divisor == 1 ? n : static_cast<int>(__umulhi(static_cast<unsigned>(n), magic));
}

// Copies the matrices of a block's products to shared memory, scaled if asked for.
template <class T>
__device__ __forceinline__ void stage(const StagedMatrix& matrix, const SmallMatmulParameters& parameters, int products,
                                      const std::int64_t* offsets, const std::int64_t* scale_offsets, T* place) {
  const T* data = static_cast<const T*>(matrix.data);
  const T* scale = static_cast<const T*>(parameters.scale);
  const int elements = (matrix.matrices == 1 ? 1 : products) * matrix.area;
  for (int e = static_cast<int>(threadIdx.x); e < elements; e += kSmallMatmulThreads) {
    const int product = quotient(e, matrix.area, matrix.area_magic), within = e - product * matrix.area;
    const int slow = quotient(within, matrix.fast, matrix.fast_magic), fast = within - slow * matrix.fast;
    T value = data[offsets[product] + slow * matrix.slow_stride + fast * matrix.fast_stride];
    if (matrix.scaled) value *= scale[scale_offsets[product] + (matrix.fast_is_k ? fast : slow) * parameters.scale_stride];
    place[product * matrix.place + slow * matrix.slow_place + fast * matrix.fast_place] = value;
  }
}

// See NOTE [Threads of a small product].
template <class T, int rows>
__device__ __forceinline__ void small_matmul(const SmallMatmulParameters& parameters) {
  constexpr int kVector = rows * sizeof(T) < 16 ? rows : 16 / sizeof(T);
  struct alignas(kVector * sizeof(T)) Vector {
    T elements[kVector];
  };
  extern __shared__ uint4 shared[];
  __shared__ std::int64_t offsets[4][kSmallMatmulThreads];
  T* as = reinterpret_cast<T*>(shared);
  T* bs = as + parameters.a.matrices * parameters.a.place;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * parameters.products, left = parameters.batches - first;
  const int products = left < parameters.products ? static_cast<int>(left) : parameters.products;

  if (thread < products) {
    std::int64_t rest = first + thread, sums[4] = {};
#pragma unroll
    for (int l = kSmallMatmulBatchLoops - 1; l >= 0; --l) {
      if (l < parameters.first_loop) continue;
      std::int64_t digit = rest;
      if (l > parameters.first_loop) {
        rest = digit / parameters.extents[l];
        digit -= rest * parameters.extents[l];
      }
      for (int v = 0; v < 4; ++v) sums[v] += digit * parameters.strides[v][l];
    }
    for (int v = 0; v < 4; ++v) offsets[v][thread] = sums[v];
  }
  __syncthreads();
  stage(parameters.a, parameters, products, offsets[kA], offsets[kScale], as);
  stage(parameters.b, parameters, products, offsets[kB], offsets[kScale], bs);
  __syncthreads();

  const int column = thread % parameters.column_lanes, rest = thread / parameters.column_lanes;
  const int row = rest % parameters.row_lanes * rows, product = rest / parameters.row_lanes;
  if (product >= products || column >= parameters.n) return;
  const T* a = as + (parameters.a.matrices == 1 ? 0 : product * parameters.a.place) + row;
  const T* b = bs + (parameters.b.matrices == 1 ? 0 : product * parameters.b.place) + column;
  const int a_column = parameters.a.fast_is_k ? parameters.a.fast_place : parameters.a.slow_place;
  T sums[rows] = {};
  for (int k = 0; k < parameters.k; ++k, a += a_column, b += parameters.n) {
    const T factor = *b;
#pragma unroll
    for (int r = 0; r < rows; r += kVector) {
      const Vector vector = *reinterpret_cast<const Vector*>(a + r);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[r + v] = fma(vector.elements[v], factor, sums[r + v]);
    }
  }
  T* out = static_cast<T*>(parameters.out) + offsets[kOut][product] + column * parameters.column_stride;
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (row + r < parameters.m) out[(row + r) * parameters.row_stride] = sums[r];
  }
}

}  // namespace

#define WENGERT_SMALL_MATMUL(name, T, rows)                            \
  extern "C" __global__ void __launch_bounds__(kSmallMatmulThreads)    \
      name(const __grid_constant__ SmallMatmulParameters parameters) { \
    small_matmul<T, rows>(parameters);                                 \
  }
WENGERT_SMALL_MATMUL(small_matmul_f32_1, float, 1)
WENGERT_SMALL_MATMUL(small_matmul_f32_2, float, 2)
WENGERT_SMALL_MATMUL(small_matmul_f32_4, float, 4)
WENGERT_SMALL_MATMUL(small_matmul_f32_8, float, 8)
WENGERT_SMALL_MATMUL(small_matmul_f64_1, double, 1)
WENGERT_SMALL_MATMUL(small_matmul_f64_2, double, 2)
WENGERT_SMALL_MATMUL(small_matmul_f64_4, double, 4)
WENGERT_SMALL_MATMUL(small_matmul_f64_8, double, 8)
#undef WENGERT_SMALL_MATMUL

cudaError_t launch_small_matmul(const StaticLaunch& launch, cudaStream_t stream) {
  static const NamedKernel kernels[] = {
      WENGERT_NAMED(small_matmul_f32_1), WENGERT_NAMED(small_matmul_f32_2), WENGERT_NAMED(small_matmul_f32_4),
      WENGERT_NAMED(small_matmul_f32_8), WENGERT_NAMED(small_matmul_f64_1), WENGERT_NAMED(small_matmul_f64_2),
      WENGERT_NAMED(small_matmul_f64_4), WENGERT_NAMED(small_matmul_f64_8),
  };
  return launch_named(kernels, launch, stream);
}

cudaError_t find_small_matmul() { return find_kernel(&small_matmul_f32_1); }

}  // namespace wengert::kernels::cuda
