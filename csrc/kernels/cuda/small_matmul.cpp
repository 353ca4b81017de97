#include "kernels/cuda/small_matmul.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

#include "fused/program.h"
#include "kernels/cuda/strided_loops.h"

namespace wengert::kernels::cuda {

using fused::Dtype;

namespace {

enum View { kA, kB, kScale, kOut };
using Loops = StridedLoops<4>;

constexpr std::int64_t kSharedBytes = 32 * 1024;  // of matrices; beyond, fewer blocks fit on a multiprocessor

const char* entry_of(Dtype dtype, int rows) {
  static constexpr const char* kSingle[] = {"small_matmul_f32_1", "small_matmul_f32_2", "small_matmul_f32_4",
                                            "small_matmul_f32_8"};
  static constexpr const char* kDouble[] = {"small_matmul_f64_1", "small_matmul_f64_2", "small_matmul_f64_4",
                                            "small_matmul_f64_8"};
  if (dtype != Dtype::f32 && dtype != Dtype::f64) throw std::invalid_argument("small_matmul takes f32 and f64 only");
  return (dtype == Dtype::f32 ? kSingle : kDouble)[std::countr_zero(static_cast<unsigned>(rows))];
}

std::uint32_t magic_of(std::int32_t divisor) {
  return divisor <= 1 ? 0 : static_cast<std::uint32_t>((std::uint64_t{1} << 32) / static_cast<std::uint32_t>(divisor) + 1);
}

bool is_shared(const Loops& loops, View view) {
  return std::all_of(loops.begin(), loops.end(), [view](const auto& loop) { return loop.strides[view] == 0; });
}

// A matrix whose second axis lies next to each other in shared memory if `rows_apart` is the first's distance there.
StagedMatrix stage(const void* data, const std::int64_t* strides, std::int64_t rows, std::int64_t columns, int row_place,
                   int column_place, bool k_is_column) {
  const bool columns_fast = std::abs(strides[1]) <= std::abs(strides[0]);
  StagedMatrix out{};
  out.data = data;
  out.fast = static_cast<std::int32_t>(columns_fast ? columns : rows);
  out.area = static_cast<std::int32_t>(rows * columns);
  out.fast_stride = strides[columns_fast ? 1 : 0];
  out.slow_stride = strides[columns_fast ? 0 : 1];
  out.fast_place = columns_fast ? column_place : row_place;
  out.slow_place = columns_fast ? row_place : column_place;
  out.fast_magic = magic_of(out.fast);
  out.area_magic = magic_of(out.area);
  out.fast_is_k = columns_fast == k_is_column;
  return out;
}

std::int64_t axis(std::int64_t extent, std::int64_t stride) { return stride == 0 && extent > 0 ? 1 : extent; }

Loops batch_loops(const SmallMatmul& p) {
  const std::size_t rank = p.batch.size();
  const bool agree = p.a_strides.size() == rank + 2 && p.b_strides.size() == rank + 2 && p.out_strides.size() == rank + 2 &&
                     (p.scale == nullptr || p.scale_strides.size() == rank + 1);
  if (!agree) throw std::invalid_argument("the strides of a small product do not match its axes");
  Loops loops;
  for (std::size_t l = 0; l < rank; ++l) {
    loops.push_back({p.batch[l], {p.a_strides[l], p.b_strides[l], p.scale ? p.scale_strides[l] : 0, p.out_strides[l]}});
  }
  collapse(loops);
  return loops;
}

}  // namespace

std::optional<StaticLaunch> plan_small_matmul(const SmallMatmul& p) {
  const Loops loops = batch_loops(p);
  const std::size_t rank = p.batch.size();
  if (std::max({p.m, p.n, p.k}) > kSmallMatmulLimit || loops.size() > kSmallMatmulBatchLoops) return std::nullopt;
  const std::int64_t batches = iterations(loops), size = fused::size_in_bytes(p.dtype);
  const bool empty = batches == 0 || p.m == 0 || p.n == 0;

  // Geometry of a product: rows of a thread x row lanes >= m, column lanes >= n.
  const int padded_m = static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(p.m)));
  const int rows = std::min(padded_m, kSmallMatmulRows), row_lanes = padded_m / rows;
  const int column_lanes = static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(p.n)));
  const int vector = static_cast<int>(16 / size);
  // Columns of a are read as 128-bit vectors; the distance of one vector more spreads them over the banks while staging.
  const int a_column = padded_m < vector ? padded_m : padded_m + vector;

  SmallMatmulParameters parameters{};
  parameters.a = stage(p.a, &p.a_strides[rank], p.m, p.k, 1, a_column, true);
  parameters.b = stage(p.b, &p.b_strides[rank], p.k, p.n, static_cast<int>(p.n), 1, false);
  auto aligned = [&](std::int64_t elements) { return (elements + vector - 1) / vector * vector; };
  parameters.a.place = static_cast<std::int32_t>(aligned(p.k * a_column));
  parameters.b.place = static_cast<std::int32_t>(aligned(p.k * p.n));
  const bool a_shared = is_shared(loops, kA), b_shared = is_shared(loops, kB);
  const bool scale_varies = p.scale != nullptr && !is_shared(loops, kScale);
  const bool scale_b = p.scale != nullptr && a_shared && !b_shared;
  parameters.a.scaled = p.scale != nullptr && !scale_b;
  parameters.b.scaled = scale_b;
  const bool one_a = a_shared && !(parameters.a.scaled && scale_varies), one_b = b_shared && !parameters.b.scaled;
  const std::int64_t once = ((one_a ? parameters.a.place : 0) + (one_b ? parameters.b.place : 0)) * size;
  const std::int64_t each = ((one_a ? 0 : parameters.a.place) + (one_b ? 0 : parameters.b.place)) * size;
  const std::int64_t fitting = each == 0 ? kSmallMatmulThreads : (kSharedBytes - once) / each;
  const std::int64_t products =
      std::max<std::int64_t>(1, std::min({std::int64_t{kSmallMatmulThreads / (row_lanes * column_lanes)}, fitting, batches}));
  parameters.a.matrices = static_cast<std::int32_t>(one_a ? 1 : products);
  parameters.b.matrices = static_cast<std::int32_t>(one_b ? 1 : products);

  parameters.scale = p.scale;
  parameters.out = p.out;
  parameters.scale_stride = p.scale ? p.scale_strides[rank] : 0;
  parameters.row_stride = p.out_strides[rank];
  parameters.column_stride = p.out_strides[rank + 1];
  parameters.batches = batches;
  parameters.first_loop = kSmallMatmulBatchLoops - static_cast<std::int32_t>(loops.size());
  for (std::size_t l = 0; l < loops.size(); ++l) {
    const std::size_t at = static_cast<std::size_t>(parameters.first_loop) + l;
    parameters.extents[at] = loops[l].extent;
    for (std::size_t v = 0; v < 4; ++v) parameters.strides[v][at] = loops[l].strides[v];
  }
  parameters.m = static_cast<std::int32_t>(p.m);
  parameters.n = static_cast<std::int32_t>(p.n);
  parameters.k = static_cast<std::int32_t>(p.k);
  parameters.products = static_cast<std::int32_t>(products);
  parameters.column_lanes = column_lanes;
  parameters.row_lanes = row_lanes;

  const std::int64_t blocks = empty ? 0 : (batches + products - 1) / products;
  if (blocks > kMostBlocks) return std::nullopt;
  std::int64_t read = distinct(loops, kA) * axis(p.m, p.a_strides[rank]) * axis(p.k, p.a_strides[rank + 1]) +
                      distinct(loops, kB) * axis(p.k, p.b_strides[rank]) * axis(p.n, p.b_strides[rank + 1]);
  if (p.scale != nullptr) read += distinct(loops, kScale) * axis(p.k, p.scale_strides[rank]);
  return StaticLaunch{.entry = entry_of(p.dtype, rows),
                      .grid = {static_cast<unsigned>(blocks), 1, 1},
                      .block = {kSmallMatmulThreads, 1, 1},
                      .shared_bytes = static_cast<unsigned>(
                          (parameters.a.matrices * parameters.a.place + parameters.b.matrices * parameters.b.place) * size),
                      .parameters = bytes_of(parameters),
                      .bytes_read = empty ? 0 : read * size,
                      .bytes_written = empty ? 0 : batches * p.m * p.n * size};
}

}  // namespace wengert::kernels::cuda
