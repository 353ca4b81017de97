#include "blocks/plan.h"

namespace wengert::blocks {

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
