// Sums of rows with equal targets (index_add, scatter_add) in a fixed order, without atomics.
//
// NOTE [Shape of a segment sum]
// The rows of a segment are `order[starts[s]] ... order[starts[s + 1] - 1]`.  A group of threads, inner lanes x position lanes,
// owns a segment and a tile of inner elements.  Lane p adds the positions p, p + lanes, ... one after the other; the lanes' sums
// meet in a tree of fixed shape, first within a warp by shuffles, then warp by warp.  The shape follows from extents alone, so
// the same inputs give the same bits.  Wide rows take all 32 lanes of a warp side by side (coalesced), narrow rows share a warp,
// and long segments get more position lanes, up to a whole block.
#pragma once
#include <optional>

#include "kernels/cuda/static_launch.h"

namespace wengert::kernels::cuda {

// for s, i:  out[target(s) * target_stride + i . out_strides]  =  sum_p values[order[p] * position_stride + i . value_strides]
struct SegmentSum {
  fused::Dtype dtype;  // of values and out
  const void* values;
  std::int64_t position_stride;  // in elements, as all strides
  const std::int64_t* order;     // positions sorted by target, stably
  std::int64_t positions;
  const std::int64_t* starts;   // segments + 1 of them, ascending; segments may be empty
  const std::int64_t* targets;  // distinct, one per segment; null: segment s goes to target s
  std::int64_t segments;
  void* out;
  std::int64_t target_stride;
  std::vector<std::int64_t> inner, value_strides, out_strides;  // the loops of a row
  bool accumulate;                                              // add to what is there; else targets of empty segments become 0
};

inline constexpr int kSegmentThreads = 256, kSegmentLoops = 4;

// Nothing if the kernel does not take the sum: rows with too many loops or elements.  Dtypes are f32, f64, bf16 and f16; the
// latter are summed in float.
std::optional<StaticLaunch> plan_segment_sum(const SegmentSum& sum);

struct SegmentSumParameters {
  const void* values;
  const std::int64_t *order, *starts, *targets;
  void* out;
  std::int64_t position_stride, target_stride, segments;
  std::uint32_t inner, inner_tiles;
  std::int32_t inner_lanes, position_lanes;  // powers of two; inner lanes at most a warp
  std::int32_t first_loop, accumulate;
  // Loops are aligned at the end: the innermost is the last.
  std::uint32_t extents[kSegmentLoops];
  std::int64_t value_strides[kSegmentLoops], out_strides[kSegmentLoops];
};

}  // namespace wengert::kernels::cuda
