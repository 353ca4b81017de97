// Many products of small matrices, where a library's product is bound by its launches or by tiles larger than the matrices.
//
// NOTE [Threads of a small product]
// A block stages several products' matrices in shared memory (a matrix that all products share once) and synchronises once.  A
// thread owns one column and up to 8 rows of one product: for each k it reads one element of b, up to 8 of a with 128-bit loads,
// and does up to 8 fused multiply-adds.  Sums run over k in ascending order, so results have the same bits for any batch size.
// The optional factor scale[batch, k] is multiplied in while staging: onto a's columns, or onto b's rows where only a is shared.
//
// NOTE [When a fused scale pays]
// One step of a batched Jacobian of dense layers is J'[b, o, n] = sum_k J[b, o, k] * s[b, k] * W[k, n].  Let J have R bytes
// and k = n: two calls (scale, then cuBLAS with b and o as rows) move 4 R, the fused kernel 2 R; both do n R / 2 flops in
// float32, n R / 4 in float64.  On an H100 (3 TB/s reached; float32: cuBLAS 47 Tflop/s; here at most 8 multiply-adds per 3 shared
// loads, so taken as 27 Tflop/s) in picoseconds per byte of J:
//
//     n     two calls                          fused                        B = 10000, o = n, float32
//    16     0.67 + max(0.67, 0.17) = 1.33      max(0.67, 0.30) = 0.67       10 MB:    14 us ->   7 us, and a launch less
//    32     0.67 + max(0.67, 0.34) = 1.33      max(0.67, 0.59) = 0.67       41 MB:    55 us ->  27 us
//    64     0.67 + max(0.67, 0.68) = 1.35      max(0.67, 1.19) = 1.19      164 MB:   221 us -> 194 us
//   128     0.67 + max(0.67, 1.36) = 2.03      max(0.67, 2.37) = 2.37      655 MB:  1330 us -> 1550 us
//
// The gain is a factor 2 up to n = 36, where arithmetic hides behind memory, is within the error of these rates at 64, and a loss
// beyond 84.  Float64 crosses near 69, an A100 near 44, and where TF32 or 16-bit matrix units may be used cuBLAS is bound by
// memory at every n, so that the crossing is near 72.  A scaled copy of up to some 20 MB stays in the level-2 cache, which takes
// most of the gain but the launch.  Hence the limit of 32, and two calls above it.  These are estimates, not timings.
#pragma once
#include <optional>

#include "kernels/cuda/static_launch.h"

namespace wengert::kernels::cuda {

// out[l, i, j] = sum_k a[l, i, k] * scale[l, k] * b[l, k, j].  Strides in elements: those of the batch's loops, then the matrix's
// two (one for the scale).  Stride 0 repeats.
struct SmallMatmul {
  fused::Dtype dtype;  // f32 or f64
  std::vector<std::int64_t> batch;
  std::int64_t m, n, k;
  const void *a, *b, *scale;  // no scale: null, strides unused
  void* out;
  std::vector<std::int64_t> a_strides, b_strides, scale_strides, out_strides;
};

inline constexpr int kSmallMatmulThreads = 128, kSmallMatmulLimit = 32, kSmallMatmulBatchLoops = 4, kSmallMatmulRows = 8;

// Nothing if the kernel does not take the product: a matrix side above the limit, or too many batch loops.
std::optional<StaticLaunch> plan_small_matmul(const SmallMatmul& product);

// How a matrix is copied to shared memory, its axis of the smaller stride first.
struct StagedMatrix {
  const void* data;
  std::int64_t fast_stride, slow_stride;
  std::int32_t matrices;  // per block: one if shared
  std::int32_t fast, area;
  std::uint32_t fast_magic, area_magic;        // see quotient() in the kernel
  std::int32_t fast_place, slow_place, place;  // strides in shared memory; of the matrices
  std::int32_t scaled, fast_is_k;
};

struct SmallMatmulParameters {
  StagedMatrix a, b;
  const void* scale;
  void* out;
  std::int64_t scale_stride, row_stride, column_stride, batches;
  std::int64_t extents[kSmallMatmulBatchLoops];
  std::int64_t strides[4][kSmallMatmulBatchLoops];  // of a, b, scale, out
  std::int32_t first_loop, m, n, k;
  std::int32_t products;                 // per block
  std::int32_t column_lanes, row_lanes;  // powers of two
};

}  // namespace wengert::kernels::cuda
