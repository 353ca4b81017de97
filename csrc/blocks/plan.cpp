#include "blocks/plan.h"

#include <utility>

namespace wengert::blocks {

namespace {

Affine with_loops_at(const Affine& affine, const std::vector<std::size_t>& place) {
  Affine out{.start = affine.start, .step = std::vector<std::int64_t>(place.size())};
  for (std::size_t k = 0; k < place.size(); ++k) out.step[place[k]] = affine.step[k];
  return out;
}

}  // namespace

Evaluate with_loops_at(Evaluate nest, const std::vector<std::size_t>& place) {
  const Shape extents = nest.extents;
  for (std::size_t k = 0; k < place.size(); ++k) nest.extents[place[k]] = extents[k];
  for (Read& read : nest.operands) {
    for (Affine& axis : read.axes) axis = with_loops_at(axis, place);
  }
  for (Target& target : nest.targets) {
    for (Affine& axis : target.axes) axis = with_loops_at(axis, place);
  }
  return nest;
}

std::vector<fused::OutputSpec> with_loops_at(std::vector<fused::OutputSpec> outputs, const std::vector<std::size_t>& place) {
  for (fused::OutputSpec& output : outputs) {
    const std::uint32_t reduced = std::exchange(output.reduced, 0);
    for (std::size_t k = 0; k < place.size(); ++k) output.reduced |= (reduced >> k & 1) << place[k];
  }
  return outputs;
}

Touched touched(const Step& step) {
  Touched slots;
  const auto add = [](std::vector<std::int32_t>& to, std::int32_t slot) {
    if (slot >= 0) to.push_back(slot);
  };
  const auto reads = [&](std::int32_t slot) { add(slots.read, slot); };
  const auto writes = [&](std::int32_t slot) { add(slots.written, slot); };
  std::visit(
      [&](const auto& s) {
        using T = std::decay_t<decltype(s)>;
        if constexpr (std::is_same_v<T, Evaluate>) {
          for (const Read& read : s.operands) reads(read.slot);
          for (const Target& target : s.targets) writes(target.slot);
        } else if constexpr (std::is_same_v<T, Matmul>) {
          reads(s.a.slot), reads(s.b.slot), writes(s.out);
          if (s.scale) reads(s.scale->slot);
        } else if constexpr (std::is_same_v<T, Take>) {
          reads(s.source), reads(s.index), writes(s.out);
        } else if constexpr (std::is_same_v<T, PutAdd>) {
          reads(s.value.slot), reads(s.index.slot), writes(s.out);
          if (s.axis) reads(s.axis->index.slot);
        } else if constexpr (std::is_same_v<T, Arange>) {
          writes(s.out);
        } else {
          for (std::int32_t slot : s.cotangents) reads(slot);
          for (std::int32_t slot : s.results) writes(slot);
        }
      },
      step);
  return slots;
}

}  // namespace wengert::blocks
