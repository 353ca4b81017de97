#include "kernels/cuda/pass_geometry.h"

#include <algorithm>
#include <cstdlib>

#include "fused/sections.h"

namespace wengert::kernels::cuda {

using fused::KernelShape;

namespace {

constexpr int kVectorBytes = 16;          // of the widest memory instruction
constexpr int kShortVector = 4;           // elements; long programs gain nothing from more
constexpr int kSumLimit = 32;             // sums a thread carries
constexpr std::size_t kHeldOperands = 8;  // more are read one by one: see kStreamed in fused/nest_kernel.h
constexpr std::size_t kBodyLimit = 64;    // instructions of the program, for all elements a thread takes together

// Distinct elements a view touches: overlapping windows span fewer than they visit.
std::int64_t distinct_bytes(const GpuLoops& loops, const LoopView& view) {
  std::int64_t visits = 1, span = 1;
  for (int k = 0; k < loops.rank_; ++k) {
    if (view.strides[k] == 0) continue;
    visits *= loops.extents_[k];
    span += (loops.extents_[k] - 1) * std::abs(view.strides[k]);
  }
  return std::min(visits, span) * view.bytes;
}

bool fits_narrow_index(const GpuLoops& loops, const Limits& limits) {
  auto fits = [&](const LoopView& view) {
    std::int64_t reach = 0;
    for (int k = 0; k < loops.rank_; ++k) reach += (loops.extents_[k] - 1) * std::abs(view.strides[k]);
    return reach <= limits.narrow_index;
  };
  return loops.elements_ <= limits.narrow_index && std::all_of(loops.operands_.begin(), loops.operands_.end(), fits) &&
         std::all_of(loops.outputs_.begin(), loops.outputs_.end(), fits);
}

// Whether `width` neighbours along the innermost loop are one aligned memory access (or one element) everywhere in the nest.
bool takes_groups(const GpuLoops& loops, const LoopView& view, int width) {
  const int inner = loops.rank_ - 1;
  if (view.strides[inner] == 0) return true;
  if (view.strides[inner] != 1 || width * view.bytes > kVectorBytes) return false;
  if (reinterpret_cast<std::uintptr_t>(view.data) % (width * view.bytes) != 0) return false;
  for (int k = 0; k < inner; ++k) {
    if (view.strides[k] % width != 0) return false;
  }
  return true;
}

KernelShape::Load load_of(const GpuLoops& loops, const LoopView& view) {
  const bool moves = loops.rank_ > 0 && view.strides[loops.rank_ - 1] != 0;
  return {.dtype = view.dtype, .moves = moves, .immediate = view.in_host_memory};
}

}  // namespace

void count_traffic(const GpuLoops& loops, std::int64_t* read, std::int64_t* written) {
  for (const LoopView& view : loops.operands_) *read += view.in_host_memory ? 0 : distinct_bytes(loops, view);
  for (const LoopOutput& view : loops.outputs_) {
    *written += distinct_bytes(loops, view);
    if (view.accumulate) *read += distinct_bytes(loops, view);
  }
}

std::size_t code_size(const fused::Program& program, const GpuLoops& loops) {
  const fused::Bytecode& code = program.bytecode();
  if (code.instructions.size() <= fused::kOneStretch) return code.instructions.size();
  std::vector<std::uint8_t> kinds;
  for (const LoopView& view : loops.operands_) kinds.push_back(load_of(loops, view).kind());
  return static_cast<std::size_t>(fused::Listing(code, kinds).instructions());
}

int choose_width(const GpuLoops& loops, std::size_t instructions, int sums) {
  if (loops.rank_ == 0 || instructions > fused::kOneStretch) return 1;
  const int inner = loops.rank_ - 1;
  for (int width = kVectorBytes; width > 1; width /= 2) {
    if (loops.rank_ > 1 && loops.extents_[inner] % width != 0) continue;
    if (loops.extents_[inner] < width) continue;
    if (width > kShortVector && width * instructions > kBodyLimit) continue;
    if (width * sums > kSumLimit) continue;
    auto takes = [&](const LoopView& view) { return takes_groups(loops, view, width); };
    auto takes_or_sums = [&](const LoopOutput& view) { return view.reduced != 0 || takes(view); };
    if (!std::all_of(loops.operands_.begin(), loops.operands_.end(), takes)) continue;
    if (!std::all_of(loops.outputs_.begin(), loops.outputs_.end(), takes_or_sums)) continue;
    return width;
  }
  return 1;
}

int choose_unroll(const KernelShape& shape, std::size_t instructions, bool sums) {
  if (shape.streamed || (shape.width > 1 && !sums)) return 1;
  int unroll = shape.loads.size() > 4 ? 2 : 4;
  while (unroll > 1 && unroll * shape.width * instructions > kBodyLimit) unroll /= 2;
  return unroll;
}

KernelShape shape_of(const fused::Program& program, const GpuLoops& loops, const Limits& limits, int width) {
  KernelShape shape;
  shape.wide_index = !fits_narrow_index(loops, limits);
  shape.width = width;
  shape.streamed = loops.operands_.size() > kHeldOperands || program.bytecode().instructions.size() > fused::kOneStretch;
  for (const LoopView& view : loops.operands_) {
    shape.loads.push_back(load_of(loops, view));
    if (width == 1) shape.loads.back().moves = true;  // it makes no difference, so that the kernels are the same
  }
  for (const LoopOutput& view : loops.outputs_) shape.stores.push_back({view.dtype, view.accumulate});
  return shape;
}

SomeLoops select_loops(const GpuLoops& loops, std::uint32_t reduced, bool wanted) {
  SomeLoops some;
  for (int k = 0; k < loops.rank_; ++k) {
    if ((reduced >> k & 1) != wanted) continue;
    some.loops.push_back(k);
    some.elements *= loops.extents_[k];
  }
  return some;
}

}  // namespace wengert::kernels::cuda
