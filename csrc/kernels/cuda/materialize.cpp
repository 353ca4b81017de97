#include "kernels/cuda/materialize.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "fused/program.h"
#include "kernels/cuda/strided_loops.h"

namespace wengert::kernels::cuda {

using fused::Dtype;

namespace {

enum View { kTarget, kValue };
using Loops = StridedLoops<2>;

struct Nest {
  Loops loops;
  std::int64_t start;
  const char* value;
};

const char* entry_of(Dtype dtype, bool wide) {
  switch (dtype) {
    case Dtype::f32:
      return wide ? "materialize_f32_wide" : "materialize_f32";
    case Dtype::f64:
      return wide ? "materialize_f64_wide" : "materialize_f64";
    case Dtype::bf16:
      return wide ? "materialize_bf16_wide" : "materialize_bf16";
    case Dtype::f16:
      return wide ? "materialize_f16_wide" : "materialize_f16";
    case Dtype::i64:
    case Dtype::i32:
    case Dtype::i16:
    case Dtype::i8:
    case Dtype::u8:
    case Dtype::b8:
      break;
  }
  throw std::invalid_argument("materialize takes floating dtypes only");
}

// The block with targets ascending along each loop, and loops by falling step.
Nest sorted(const MaterializeBlock& block, std::int64_t size) {
  const std::size_t rank = block.extents.size();
  if (block.steps.size() != rank || block.strides.size() != rank) {
    throw std::invalid_argument("a block's extents, steps and strides differ in number");
  }
  Nest nest{{}, block.start, static_cast<const char*>(block.value)};
  for (std::size_t k = 0; k < rank; ++k) {
    StridedLoop<2> loop{block.extents[k], {block.steps[k], block.strides[k]}};
    if (loop.strides[kTarget] < 0 && loop.extent > 0) {
      nest.start += loop.strides[kTarget] * (loop.extent - 1);
      nest.value += loop.strides[kValue] * (loop.extent - 1) * size;
      loop.strides = {-loop.strides[kTarget], -loop.strides[kValue]};
    }
    nest.loops.push_back(loop);
  }
  std::stable_sort(nest.loops.begin(), nest.loops.end(),
                   [](const auto& a, const auto& b) { return a.strides[kTarget] > b.strides[kTarget]; });
  collapse(nest.loops);
  return nest;
}

// True if every step is larger than what the loops within reach together.
bool ascends(const Loops& loops) {
  std::int64_t within = 0;
  for (std::size_t k = loops.size(); k-- > 0;) {
    if (loops[k].strides[kTarget] <= within) return false;
    within += loops[k].strides[kTarget] * (loops[k].extent - 1);
  }
  return true;
}

template <class Index>
MaterializeNest<Index> pack(const Nest& nest) {
  MaterializeNest<Index> out{};
  out.value = nest.value;
  out.start = static_cast<Index>(nest.start);
  out.count = static_cast<Index>(iterations(nest.loops));
  out.first_loop = kMaterializeLoops - static_cast<std::int32_t>(nest.loops.size());
  std::fill(std::begin(out.extents), std::end(out.extents), Index{1});
  std::int64_t inner = 1, jump = kMaterializeThreads;
  for (std::size_t k = nest.loops.size(); k-- > 0;) {
    const auto& loop = nest.loops[k];
    const std::size_t at = static_cast<std::size_t>(out.first_loop) + k;
    out.extents[at] = static_cast<Index>(loop.extent);
    out.steps[at] = static_cast<Index>(loop.strides[kTarget]);
    out.strides[at] = static_cast<Index>(loop.strides[kValue]);
    out.inner[at] = static_cast<Index>(inner);
    out.jump[at] = static_cast<Index>(k == 0 ? jump : jump % loop.extent);
    inner *= loop.extent;
    jump /= loop.extent;
  }
  return out;
}

template <class Index>
std::vector<char> pack(void* out, std::int64_t count, std::int32_t lead, const std::vector<Nest>& nests) {
  MaterializeParameters<Index> parameters{};
  parameters.out = out;
  parameters.count = static_cast<Index>(count);
  parameters.lead = lead;
  parameters.blocks = static_cast<std::int32_t>(nests.size());
  auto last = [](const Nest& nest) { return nest.start + reach(nest.loops, kTarget); };
  for (std::size_t i = 0; i < nests.size(); ++i) {
    parameters.nests[i] = pack<Index>(nests[i]);
    parameters.nests[i].adds =
        std::any_of(nests.begin(), nests.begin() + static_cast<std::ptrdiff_t>(i),
                    [&](const Nest& earlier) { return earlier.start <= last(nests[i]) && nests[i].start <= last(earlier); });
  }
  return bytes_of(parameters);
}

}  // namespace

std::optional<StaticLaunch> plan_materialize(void* out, Dtype dtype, std::int64_t count,
                                             const std::vector<MaterializeBlock>& blocks) {
  const std::int64_t size = fused::size_in_bytes(dtype), chunk = kMaterializeChunkBytes / size;
  const auto address = reinterpret_cast<std::uintptr_t>(out);
  if (address % static_cast<std::uintptr_t>(size) != 0) throw std::invalid_argument("an output that is not aligned to its dtype");
  std::vector<Nest> nests;
  std::int64_t read = 0, farthest = 0;
  for (const MaterializeBlock& block : blocks) {
    if (std::find(block.extents.begin(), block.extents.end(), 0) != block.extents.end()) continue;
    Nest nest = sorted(block, size);
    if (!ascends(nest.loops) || nest.loops.size() > kMaterializeLoops) return std::nullopt;
    if (nest.start < 0 || nest.start + reach(nest.loops, kTarget) >= count) {
      throw std::invalid_argument("a block outside of the output");
    }
    read += distinct(nest.loops, kValue) * size;
    farthest = std::max(farthest, reach(nest.loops, kValue));
    nests.push_back(std::move(nest));
  }
  if (nests.size() > kMaterializeBlocks) return std::nullopt;
  const auto lead = static_cast<std::int32_t>(address % 16 / static_cast<std::uintptr_t>(size));
  const std::int64_t chunks = count == 0 ? 0 : (lead + count + chunk - 1) / chunk;
  if (chunks > kMostBlocks) return std::nullopt;
  // Threads step past the last iteration by a few jumps.
  const std::int64_t narrow = std::numeric_limits<std::int32_t>::max() - 2 * chunk - 8 * kMaterializeThreads;
  const bool wide = count > narrow || farthest > narrow;
  return StaticLaunch{
      .entry = entry_of(dtype, wide),
      .grid = {static_cast<unsigned>(chunks), 1, 1},
      .block = {kMaterializeThreads, 1, 1},
      .shared_bytes = 0,
      .parameters = wide ? pack<std::int64_t>(out, count, lead, nests) : pack<std::int32_t>(out, count, lead, nests),
      .bytes_read = read,
      .bytes_written = count * size};
}

}  // namespace wengert::kernels::cuda
