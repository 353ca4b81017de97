// What one instruction set provides: a table of plain functions on tiles.  The same source (tile_kernels.h) is compiled once per
// instruction set; everything that decides something lives in loop_nest.cpp and is compiled once.
#pragma once
#include <cstdint>

#include "fused/program.h"

namespace wengert::kernels {

// result[i] = prim(args[0][i], ...) for i in 0..n, n a multiple of the vector length.  Bit k of `varying`: argument k is a tile;
// otherwise it is one vector that stands for all.
using Kernel = void (*)(void* result, const void* const* args, unsigned varying, int n);
// `rows` rows that begin `step` apart, each of n elements `stride` apart; converted to the compute type, into a contiguous tile
struct Rows {
  std::int64_t step, stride;
  int rows, n;
};
using Load = void (*)(void* tile, const void* source, Rows rows);
using Store = void (*)(void* target, const void* tile, Rows rows, bool accumulate);

inline constexpr int kMaxColumns = 16;

struct Backend {
  const char* name;
  int vector_bytes;
  Kernel kernels[2][fused::kPrimCount];  // [compute type f32, f64]
  Load loads[2][fused::kDtypeCount];
  Store stores[2][fused::kDtypeCount];
  double (*sum[2])(const void* tile, int n);  // n any number
  void (*add_into[2])(double* sums, const void* tile, int n);
  // of `rows` rows of `length` elements, one after the other: sums[row] += its sum; sums[k] += the sum of column k
  void (*sum_rows[2])(double* sums, const void* tile, int rows, int length);
  void (*sum_columns[2])(double* sums, const void* tile, int rows, int length);  // length <= kMaxColumns
};

extern const Backend kBaseline;
#if defined(__x86_64__)
extern const Backend kAvx2;
extern const Backend kAvx512;
#endif

// The best backend this machine runs; WENGERT_CPU_CAPABILITY=baseline|avx2|avx512 asks for a lesser one.
const Backend& backend();

}  // namespace wengert::kernels
