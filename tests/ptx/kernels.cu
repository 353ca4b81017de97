// Kernels that the tests of the PTX executor run. kernels.ptx is made from this file by
//   nvcc -std=c++17 -ptx -arch=compute_75 kernels.cu -o kernels.ptx
// and committed, so that the tests need no CUDA toolkit.
#include <cassert>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define KERNEL extern "C" __global__ void

__device__ int64_t global_index() { return blockIdx.x * int64_t{blockDim.x} + threadIdx.x; }

// Elementwise mathematics: what nvcc emits for the functions of the CUDA mathematics library.

#define UNARY(name, T, expression)                    \
  KERNEL name(int64_t n, const T* input, T* output) { \
    const int64_t i = global_index();                 \
    if (i < n) {                                      \
      const T x = input[i];                           \
      output[i] = expression;                         \
    }                                                 \
  }
UNARY(sin_f32, float, sinf(x))
UNARY(exp_f32, float, expf(x))
UNARY(log_f32, float, logf(x))
UNARY(tanh_f32, float, tanhf(x))
UNARY(erf_f32, float, erff(x))
UNARY(power_f32, float, powf(fabsf(x), 1.7f))
UNARY(sigmoid_f32, float, 1 / (1 + expf(-x)))
UNARY(root_f32, float, rsqrtf(fabsf(x) + 1))
UNARY(sin_f64, double, sin(x))
UNARY(exp_f64, double, exp(x))
UNARY(log_f64, double, log(x))
UNARY(tanh_f64, double, tanh(x))
UNARY(erf_f64, double, erf(x))
UNARY(power_f64, double, pow(fabs(x), 1.7))

KERNEL scaled_sum(int n, float scale, const float* x, float* y) {
  const int64_t i = global_index();
  if (i < n) y[i] = scale * x[i] + y[i];
}

KERNEL half_product(int n, const __half* x, const __half* y, __half* output) {
  const int64_t i = global_index();
  if (i < n) output[i] = __hmul(x[i], y[i]);
}
KERNEL half_through_float(int n, const __half* x, __half* output) {
  const int64_t i = global_index();
  if (i < n) output[i] = __float2half_rn(expf(__half2float(x[i])));
}
KERNEL half_pairs(int n, const __half2* x, const __half2* y, __half2* output) {
  const int64_t i = global_index();
  if (i < n) output[i] = __hfma2(x[i], y[i], y[i]);
}
KERNEL bfloat_through_float(int n, const __nv_bfloat16* x, __nv_bfloat16* output) {
  const int64_t i = global_index();
  if (i < n) output[i] = __float2bfloat16_rn(expf(__bfloat162float(x[i])));
}

// Memory.

KERNEL vectors_of_4(int n, const float4* __restrict__ x, float4* __restrict__ y) {
  const int64_t i = global_index();
  if (i >= n) return;
  float4 v = x[i];
  v.x *= 2;
  v.y += 1;
  v.z = -v.z;
  v.w *= v.w;
  y[i] = v;
}
KERNEL vectors_of_2(int n, const double2* x, double2* y) {
  const int64_t i = global_index();
  if (i < n) y[i] = make_double2(x[i].y, x[i].x);
}
KERNEL bytes(int n, const int8_t* x, const bool* mask, uint8_t* y) {
  const int64_t i = global_index();
  if (i < n) y[i] = mask[i] ? static_cast<uint8_t>(x[i] * 3 + 1) : 0;
}
KERNEL local_array(int n, const int* choice, float* output) {
  const int64_t i = global_index();
  if (i >= n) return;
  float local[8];
  for (int k = 0; k < 8; ++k) local[k] = k * 1.5f + i;
  output[i] = local[choice[i] & 7];
}
__constant__ float constants[4] = {1, 2, 3, 4};
__device__ int launches = 5;
KERNEL module_variables(int n, float* output) {
  const int64_t i = global_index();
  if (i < n) output[i] = constants[i & 3] + launches;
  if (i == n - 1) ++launches;
}
KERNEL three_dimensions(float* output) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  const int z = blockIdx.z * blockDim.z + threadIdx.z;
  const int width = gridDim.x * blockDim.x, height = gridDim.y * blockDim.y;
  output[(int64_t{z} * height + y) * width + x] = x + 100 * y + 10000 * z;
}

struct Nest {
  const float* source;
  float* target;
  int64_t extent[3], source_step[3], target_step[3];
  int axes;
};
KERNEL strided_copy(int64_t n, Nest nest) {
  for (int64_t i = global_index(); i < n; i += int64_t{gridDim.x} * blockDim.x) {
    int64_t rest = i, from = 0, to = 0;
    for (int axis = nest.axes - 1; axis >= 0; --axis) {
      const int64_t at = rest % nest.extent[axis];
      rest /= nest.extent[axis];
      from += at * nest.source_step[axis];
      to += at * nest.target_step[axis];
    }
    nest.target[to] = nest.source[from];
  }
}

__device__ __noinline__ float square_plus_one(float x) { return x * x + 1; }
__device__ __noinline__ float twice_called(float x) { return square_plus_one(x) - square_plus_one(-2 * x); }
KERNEL calls(int n, const float* x, float* output) {
  const int64_t i = global_index();
  if (i < n) output[i] = twice_called(x[i]);
}
KERNEL jump_table(int n, const int* choice, float* output) {
  const int64_t i = global_index();
  if (i >= n) return;
  float x = i;
  switch (choice[i]) {
    case 0:
      x = sqrtf(x);
      break;
    case 1:
      x = x * x;
      break;
    case 2:
      x = 1 / (x + 1);
      break;
    case 3:
      output[i] = 7;
      return;
    case 4:
      x -= 3;
      break;
    case 5:
      x = fmodf(x, 5);
      break;
    default:
      x = -1;
  }
  output[i] = x;
}

// Reductions and other work of several threads.

__device__ float warp_sum(float value) {
  for (int step = 16; step > 0; step >>= 1) value += __shfl_down_sync(0xffffffff, value, step);
  return value;
}
KERNEL block_sum(int64_t n, const float* x, float* output) {
  __shared__ float partial[32];
  float total = 0;
  for (int64_t i = global_index(); i < n; i += int64_t{gridDim.x} * blockDim.x) total += x[i];
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x < 32) {
    total = warp_sum(threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0);
    if (threadIdx.x == 0) output[blockIdx.x] = total;
  }
}
template <bool kSynchronize>
__device__ void tree_sum(const double* x, double* output) {
  extern __shared__ double tree[];
  tree[threadIdx.x] = x[global_index()];
  for (int half = blockDim.x / 2; half > 0; half >>= 1) {
    if (kSynchronize) __syncthreads();
    if (threadIdx.x < half) tree[threadIdx.x] += tree[threadIdx.x + half];
  }
  if (threadIdx.x == 0) output[blockIdx.x] = tree[0];
}
KERNEL synchronized_sum(const double* x, double* output) { tree_sum<true>(x, output); }
KERNEL unsynchronized_sum(const double* x, double* output) { tree_sum<false>(x, output); }

KERNEL warp_operations(const int* x, unsigned* ballots, int* totals, int* sources) {
  const unsigned all = 0xffffffff;
  const int value = x[threadIdx.x];
  const unsigned ballot = __ballot_sync(all, value > 0);
  const bool any = __any_sync(all, value == 7), every = __all_sync(all, value > -100);
  int total = value;
  for (int step = 1; step < 32; step <<= 1) total += __shfl_xor_sync(all, total, step);
  sources[threadIdx.x] = __shfl_sync(all, value, threadIdx.x + 5, 8) * 1000 + __shfl_up_sync(all, value, 3);
  __syncwarp();
  if (threadIdx.x % 32 == 0) ballots[threadIdx.x / 32] = ballot, totals[threadIdx.x / 32] = total * 4 + any * 2 + every;
}
KERNEL count_positive(const int* x, int* output) {
  const int count = __syncthreads_count(x[threadIdx.x] > 0);
  const int all = __syncthreads_and(x[threadIdx.x] > 0), any = __syncthreads_or(x[threadIdx.x] > 0);
  output[threadIdx.x] = count * 4 + all * 2 + any;
}

KERNEL histograms(int n, const int* bin, const float* weight, float* sums, double* precise, int* highest, unsigned* turns) {
  const int64_t i = global_index();
  if (i >= n) return;
  atomicAdd(&sums[bin[i]], weight[i]);
  atomicAdd(&precise[bin[i]], static_cast<double>(weight[i]));
  atomicMax(&highest[bin[i]], static_cast<int>(i));
  atomicInc(turns, 6);
}
KERNEL add_by_swapping(int n, const float* x, float* output) {
  const int64_t i = global_index();
  if (i >= n) return;
  auto* word = reinterpret_cast<unsigned*>(output);
  unsigned seen = *word, expected;
  do {
    expected = seen;
    seen = atomicCAS(word, expected, __float_as_uint(__uint_as_float(expected) + x[i]));
  } while (seen != expected);
}
KERNEL half_atomics(int n, const __half* x, __half* output) {
  const int64_t i = global_index();
  if (i < n) atomicAdd(output, x[i]);
}

// Faults.

KERNEL write_at(float* x, int64_t at) { x[at + threadIdx.x] = 1; }
KERNEL read_at(const float* x, int64_t at, float* output) { output[threadIdx.x] = x[at]; }
KERNEL read_misaligned(const char* x, int* output) { output[0] = *reinterpret_cast<const int*>(x + 2); }
KERNEL shared_overrun(float* output, int at) {
  __shared__ float values[32];
  values[threadIdx.x + at] = threadIdx.x;
  __syncthreads();
  output[threadIdx.x] = values[31 - threadIdx.x];
}
KERNEL missing_barrier(int* output) {
  __shared__ int value;
  if (threadIdx.x % 2 == 0) return;
  if (threadIdx.x < 48) {
    value = threadIdx.x;
    __syncthreads();
  } else {
    __syncwarp(0xaaaa0000);
    value = 1;
    __shfl_sync(0x0000aaaa, value, 0);
  }
  output[threadIdx.x] = value;
}
KERNEL barriers_apart(int* output) {
  if (threadIdx.x % 2) {
    output[threadIdx.x] = 1;
    __syncthreads();
  } else {
    __syncthreads();
    output[threadIdx.x] = 2;
  }
}
KERNEL exited_lane(int* output) {
  if (threadIdx.x == 3) return;
  output[threadIdx.x] = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x), 0);
}
KERNEL half_waits(int* output) {
  if (threadIdx.x < 32) {
    output[threadIdx.x] = __shfl_xor_sync(0xffffffff, static_cast<int>(threadIdx.x), 1);
  } else if (threadIdx.x < 48) {
    output[threadIdx.x] = __shfl_xor_sync(0xffffffff, static_cast<int>(threadIdx.x), 1);
  } else {
    __syncthreads();
  }
}
KERNEL failing_assert(const int* x) { assert(x[threadIdx.x] >= 0); }
