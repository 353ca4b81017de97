#include "kernels/cuda/segment_sum.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "fused/program.h"
#include "kernels/cuda/strided_loops.h"

namespace wengert::kernels::cuda {

using fused::Dtype;

namespace {

enum View { kValue, kOut };

constexpr std::int64_t kPositionsPerLane = 4;  // loads a lane keeps in flight; fewer are not worth another lane

const char* entry_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
      return "segment_sum_f32";
    case Dtype::f64:
      return "segment_sum_f64";
    case Dtype::bf16:
      return "segment_sum_bf16";
    case Dtype::f16:
      return "segment_sum_f16";
    case Dtype::i64:
    case Dtype::i32:
    case Dtype::i16:
    case Dtype::i8:
    case Dtype::u8:
    case Dtype::b8:
      break;
  }
  throw std::invalid_argument("segment_sum takes floating dtypes only");
}

}  // namespace

std::optional<StaticLaunch> plan_segment_sum(const SegmentSum& sum) {
  const std::size_t rank = sum.inner.size();
  if (sum.value_strides.size() != rank || sum.out_strides.size() != rank) {
    throw std::invalid_argument("the loops and strides of a row differ in number");
  }
  StridedLoops<2> loops;
  for (std::size_t k = 0; k < rank; ++k) loops.push_back({sum.inner[k], {sum.value_strides[k], sum.out_strides[k]}});
  std::stable_sort(loops.begin(), loops.end(),
                   [](const auto& a, const auto& b) { return std::abs(a.strides[kValue]) > std::abs(b.strides[kValue]); });
  collapse(loops);
  const std::int64_t inner = iterations(loops);
  if (loops.size() > kSegmentLoops || inner > std::numeric_limits<std::int32_t>::max()) return std::nullopt;

  SegmentSumParameters parameters{};
  parameters.values = sum.values;
  parameters.order = sum.order;
  parameters.starts = sum.starts;
  parameters.targets = sum.targets;
  parameters.out = sum.out;
  parameters.position_stride = sum.position_stride;
  parameters.target_stride = sum.target_stride;
  parameters.segments = sum.segments;
  parameters.accumulate = sum.accumulate;
  int inner_lanes = 1, position_lanes = 1;
  while (inner_lanes < 32 && inner_lanes < inner) inner_lanes *= 2;
  const std::int64_t average = sum.segments > 0 ? sum.positions / sum.segments : 0;
  while (inner_lanes * position_lanes < kSegmentThreads && 2 * position_lanes * kPositionsPerLane <= average) position_lanes *= 2;
  parameters.inner = static_cast<std::uint32_t>(inner);
  parameters.inner_tiles = static_cast<std::uint32_t>((inner + inner_lanes - 1) / inner_lanes);
  parameters.inner_lanes = inner_lanes;
  parameters.position_lanes = position_lanes;
  parameters.first_loop = kSegmentLoops - static_cast<std::int32_t>(loops.size());
  for (std::size_t k = 0; k < loops.size(); ++k) {
    const std::size_t at = static_cast<std::size_t>(parameters.first_loop) + k;
    parameters.extents[at] = static_cast<std::uint32_t>(loops[k].extent);
    parameters.value_strides[at] = loops[k].strides[kValue];
    parameters.out_strides[at] = loops[k].strides[kOut];
  }

  const std::int64_t groups = kSegmentThreads / (inner_lanes * position_lanes);  // per block
  const std::int64_t blocks = (sum.segments + groups - 1) / groups;
  if (inner > 0 && blocks > kMostBlocks / parameters.inner_tiles) return std::nullopt;
  const std::int64_t size = fused::size_in_bytes(sum.dtype), written = sum.segments * inner * size;
  const std::int64_t rows = sum.position_stride == 0 ? std::min<std::int64_t>(sum.positions, 1) : sum.positions;
  const std::int64_t indices = sum.positions + sum.segments + 1 + (sum.targets ? sum.segments : 0);
  const bool empty = written == 0;
  return StaticLaunch{.entry = entry_of(sum.dtype),
                      .grid = {static_cast<unsigned>(blocks * parameters.inner_tiles), 1, 1},
                      .block = {kSegmentThreads, 1, 1},
                      .shared_bytes = 0,
                      .parameters = bytes_of(parameters),
                      .bytes_read = empty ? 0
                                          : rows * distinct(loops, kValue) * size + indices * std::int64_t{sizeof(std::int64_t)} +
                                                (sum.accumulate ? written : 0),
                      .bytes_written = written};
}

}  // namespace wengert::kernels::cuda
