// Plans and blocks as text, for people.
#include <type_traits>

#include "blocks/plan.h"

namespace wengert::blocks {

namespace {

std::string text(const Shape& shape) {
  std::string out = "(";
  for (std::size_t a = 0; a < shape.size(); ++a) out += (a ? ", " : "") + std::to_string(shape[a]);
  return out + ")";
}

std::string text(const Affine& affine) {
  std::string out;
  for (std::size_t k = 0; k < affine.step.size(); ++k) {
    if (affine.step[k] == 0) continue;
    if (!out.empty()) out += '+';
    if (affine.step[k] != 1) out += std::to_string(affine.step[k]);
    out += static_cast<char>('i' + k % 17);
  }
  if (affine.start != 0 || out.empty()) out += (out.empty() ? "" : "+") + std::to_string(affine.start);
  return out;
}

std::string text(std::int32_t slot, const std::vector<Affine>& axes) {
  std::string out = "s" + std::to_string(slot) + "[";
  for (std::size_t a = 0; a < axes.size(); ++a) out += (a ? ", " : "") + text(axes[a]);
  return out + "]";
}

std::string text(const Step& step) {
  return std::visit(
      [](const auto& s) -> std::string {
        using T = std::decay_t<decltype(s)>;
        if constexpr (std::is_same_v<T, Evaluate>) {
          std::string out = "evaluate over " + text(s.extents) + ":";
          for (const Target& target : s.targets) out += " " + text(target.slot, target.axes) + (target.accumulate ? " +=" : " =");
          out += " program of";
          for (const Read& read : s.operands) out += " " + text(read.slot, read.axes);
          return out + " {" + std::to_string(s.program->bytecode().instructions.size()) + " instructions}";
        } else if constexpr (std::is_same_v<T, Matmul>) {
          return "matmul over " + text(s.extents) + ": s" + std::to_string(s.out) + " = " + text(s.a.slot, s.a.axes) +
                 (s.scale ? " * " + text(s.scale->slot, s.scale->axes) : "") + " x " + text(s.b.slot, s.b.axes);
        } else if constexpr (std::is_same_v<T, Take>) {
          return "take: s" + std::to_string(s.out) + " = s" + std::to_string(s.source) + " at s" + std::to_string(s.index) +
                 (s.axis ? " along axis " + std::to_string(*s.axis) : "");
        } else if constexpr (std::is_same_v<T, PutAdd>) {
          return "put: s" + std::to_string(s.out) + " += s" + std::to_string(s.value.slot) +
                 (s.distinct ? " at distinct " : " at ") +
                 (s.puts_rows() ? "rows s" + std::to_string(s.axis->index.slot) : "s" + std::to_string(s.index.slot));
        } else if constexpr (std::is_same_v<T, Arange>) {
          return "arange: s" + std::to_string(s.out);
        } else {
          return "call node " + std::to_string(s.node) + " with " + std::to_string(s.batch) + " batch axes";
        }
      },
      step);
}

}  // namespace

std::string to_string(const Plan& plan) {
  std::string out;
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    out += "s" + std::to_string(s) + " " + text(plan.slots[s].shape) + " " + fused::name(plan.slots[s].dtype);
    if (s < plan.given) out += " given";
    if (plan.slots[s].zero_filled) out += " zeros";
    out += '\n';
  }
  for (const Step& step : plan.steps) out += text(step) + '\n';
  out += "results:";
  for (std::int32_t s : plan.results) out += s < 0 ? std::string(" none") : " s" + std::to_string(s);
  return out + '\n';
}

}  // namespace wengert::blocks
