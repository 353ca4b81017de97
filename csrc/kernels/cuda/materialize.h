// A dense array from a few strided blocks in one pass: zeros and values are written together, every byte once.
//
// NOTE [Chunks of a materialised array]
// A thread block owns 16 KiB of the output, builds them in shared memory and stores them with 128-bit instructions.  Which
// iterations of a block fall into the chunk follows from arithmetic alone: with loops sorted by falling step, each step larger
// than all that the inner loops can reach, targets ascend with the iteration number, and the first iteration at or past a chunk's
// border is found digit by digit.  Blocks are added one after the other, so overlapping blocks always sum in the same order, each
// sum rounded to the dtype; where a block's range meets no earlier one its values are stored as they are.  The
// chunk grid starts at the last 16-byte border before the output, so misaligned outputs are stored with full vectors too.
#pragma once
#include <optional>

#include "kernels/cuda/static_launch.h"

namespace wengert::kernels::cuda {

// for i in extents:  out.flatten()[start + sum_k steps[k] * i_k]  +=  value[sum_k strides[k] * i_k]
struct MaterializeBlock {
  std::int64_t start;
  std::vector<std::int64_t> extents, steps, strides;  // in elements; stride 0 = the same value along the loop
  const void* value;
};

inline constexpr int kMaterializeBlocks = 8, kMaterializeLoops = 6;
inline constexpr int kMaterializeThreads = 256, kMaterializeChunkBytes = 16 * 1024;

// Nothing if the kernel does not take these blocks: too many, too many loops, or targets that do not ascend.  Dtypes are f32,
// f64, bf16 and f16.  Throws std::invalid_argument for targets outside of the output.
std::optional<StaticLaunch> plan_materialize(void* out, fused::Dtype dtype, std::int64_t count,
                                             const std::vector<MaterializeBlock>& blocks);

// Loops are aligned at the end: the innermost is the last, unused ones before the first have extent 1 and steps 0.
template <class Index>
struct MaterializeNest {
  const void* value;
  Index start, count;  // first target; iterations
  Index extents[kMaterializeLoops], steps[kMaterializeLoops], strides[kMaterializeLoops];
  Index inner[kMaterializeLoops];  // iterations of the loops within
  Index jump[kMaterializeLoops];   // kMaterializeThreads in the mixed radix of the extents
  std::int32_t first_loop;
  std::int32_t adds;  // an earlier block may have written to the same elements
};

template <class Index>
struct MaterializeParameters {
  void* out;
  Index count;        // elements of the output
  std::int32_t lead;  // elements between the 16-byte border and the output
  std::int32_t blocks;
  MaterializeNest<Index> nests[kMaterializeBlocks];
};

}  // namespace wengert::kernels::cuda
