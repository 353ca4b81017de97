#include "blocks/join_nests.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace wengert::blocks {
namespace {

constexpr std::size_t kMostOutputs = 8;  // of a joined nest: a thread holds their values until it stores them
constexpr int kMostSideBySide = 256;     // instructions of nests that only read the same
constexpr std::size_t kMostPassed = 16;  // steps that a nest overtakes

// Which called nodes a value was computed from: a bit for each call, of which the 65th shares that of the first, and so on.
using CallSet = std::uint64_t;

// A step, and what its program became if it is a nest that took in others.
struct Placed {
  Step step;
  Touched touched;
  CallSet calls = 0;
  std::optional<fused::ExprPool> pool;
  std::vector<fused::OutputSpec> outputs;
};

bool meet(const std::vector<std::int32_t>& a, const std::vector<std::int32_t>& b) {
  return std::ranges::any_of(a, [&](std::int32_t slot) { return std::ranges::find(b, slot) != b.end(); });
}

// The loop that alone moves the coordinate, or `none`.
std::size_t only_loop(const Affine& axis, std::size_t none) {
  std::size_t loop = none;
  for (std::size_t k = 0; k < axis.step.size(); ++k) {
    if (!axis.moves(k)) continue;
    if (loop != none) return none;
    loop = k;
  }
  return loop;
}

// Loop k of the second nest is loop order[k] of the first one, going by a slot that both touch; nothing: they differ.
std::optional<std::vector<std::size_t>> match_loops(const Evaluate& first, const Evaluate& second) {
  const std::size_t n = first.extents.size();
  if (second.extents.size() != n) return std::nullopt;
  std::optional<std::vector<std::size_t>> best;
  std::size_t most = 0;
  const auto compare = [&](const std::vector<Affine>& in_first, const std::vector<Affine>& in_second) {
    std::vector<std::size_t> order(n, n);
    std::vector<bool> taken(n, false);
    std::size_t matched = 0;
    const auto match = [&](std::size_t k, std::size_t l) {
      if (k == n || l == n || order[k] != n || taken[l] || first.extents[l] != second.extents[k]) return false;
      order[k] = l;
      taken[l] = true;
      return true;
    };
    for (std::size_t a = 0; a < in_second.size(); ++a) matched += match(only_loop(in_second[a], n), only_loop(in_first[a], n));
    for (std::size_t k = 0; k < n; ++k) {
      for (std::size_t l = 0; order[k] == n && l < n; ++l) match(k, l);
      if (order[k] == n) return;
    }
    if (!best || matched > most) best = std::move(order), most = matched;
  };
  for (const Read& read : second.operands) {
    for (const Read& other : first.operands) {
      if (other.slot == read.slot) compare(other.axes, read.axes);
    }
    for (const Target& target : first.targets) {
      if (target.slot == read.slot) compare(target.axes, read.axes);
    }
  }
  return best;
}

class Joiner {
 public:
  Joiner(Plan& plan, const Abilities& abilities)
      : plan_(plan), abilities_(abilities), readers_(plan.slots.size()), calls_(plan.slots.size()) {
    for (std::int32_t result : plan.results) {
      if (result >= 0) ++readers_[result];
    }
  }

  void run() {
    for (const Step& step : plan_.steps) {
      for (std::int32_t slot : touched(step).read) ++readers_[slot];
    }
    for (Step& step : plan_.steps) place(std::move(step));
    plan_.steps.clear();
    for (Placed& placed : placed_) {
      if (placed.pool) write_program(placed);
      plan_.steps.push_back(std::move(placed.step));
    }
  }

 private:
  void place(Step step) {
    Touched mine = touched(step);
    CallSet calls = 0;
    for (std::int32_t slot : mine.read) calls |= calls_[slot];
    if (std::holds_alternative<CallNode>(step)) calls |= CallSet(1) << (calls_made_++ % 64);
    for (std::int32_t slot : mine.written) calls_[slot] |= calls;
    std::vector<fused::OutputSpec> outputs;
    if (const auto* nest = std::get_if<Evaluate>(&step)) {
      outputs = nest->program->outputs();
      const std::size_t passed = std::min(kMostPassed, placed_.size());
      for (std::size_t back = 1; back <= passed; ++back) {
        Placed& other = placed_[placed_.size() - back];
        if (std::holds_alternative<Evaluate>(other.step) && take_in(other, *nest, mine, calls)) return;
        if (meet(mine.read, other.touched.written) || meet(mine.written, other.touched.read) ||
            meet(mine.written, other.touched.written)) {
          break;
        }
      }
    }
    placed_.push_back(
        {.step = std::move(step), .touched = std::move(mine), .calls = calls, .pool = {}, .outputs = std::move(outputs)});
  }

  // Copies into zeros are written together with the zeros.
  bool is_copy_into_zeros(const Evaluate& nest, bool grown) const {
    return !grown && nest.program->bytecode().instructions.empty() && plan_.slots[nest.targets[0].slot].zero_filled;
  }

  // One launch sums over one set of loops.
  static bool sum_alike(const std::vector<fused::OutputSpec>& a, const std::vector<fused::OutputSpec>& b) {
    std::uint32_t reduced = 0;
    for (const auto* outputs : {&a, &b}) {
      for (const fused::OutputSpec& output : *outputs) {
        if (output.reduced == 0) continue;
        if (reduced != 0 && output.reduced != reduced) return false;
        reduced = output.reduced;
      }
    }
    return true;
  }

  // The output of `first` that a read is, element by element; -1: it is something else; nothing: it is, but not as it stands.
  std::optional<int> output_read(const Placed& placed, const Read& read) const {
    const auto& first = std::get<Evaluate>(placed.step);
    if (std::ranges::find(placed.touched.written, read.slot) == placed.touched.written.end()) return -1;
    for (std::size_t o = 0; o < first.targets.size(); ++o) {
      const Target& target = first.targets[o];
      const Slot& slot = plan_.slots[target.slot];
      if (target.slot == read.slot && target.axes == read.axes && !target.accumulate && !slot.zero_filled &&
          placed.outputs[o].reduced == 0 && slot.dtype == first.program->compute()) {
        return static_cast<int>(o);
      }
    }
    return std::nullopt;
  }

  bool take_in(Placed& placed, const Evaluate& given, const Touched& mine, CallSet calls) {
    auto& first = std::get<Evaluate>(placed.step);
    const fused::Program& program = *given.program;
    if (first.program->compute() != program.compute()) return false;
    if (is_copy_into_zeros(first, placed.pool.has_value()) || is_copy_into_zeros(given, false)) return false;
    if (meet(mine.written, placed.touched.written) || meet(mine.written, placed.touched.read)) return false;
    const std::optional<std::vector<std::size_t>> order = match_loops(first, given);
    if (!order) return false;
    const Evaluate second = with_loops_at(given, *order);
    const std::vector<fused::OutputSpec> more = with_loops_at(program.outputs(), *order);
    if (!sum_alike(placed.outputs, more)) return false;

    std::vector<int> from;  // per operand: the output it is, or -1
    std::vector<Read> operands = first.operands;
    std::vector<std::int32_t> leaf;
    bool depends = false, shares = false;
    for (const Read& read : second.operands) {
      const std::optional<int> output = output_read(placed, read);
      if (!output) return false;
      from.push_back(*output);
      leaf.push_back(-1);
      depends = depends || *output >= 0;
      if (*output >= 0) continue;
      auto at = std::ranges::find(operands, read);
      if (at == operands.end()) {
        at = operands.insert(operands.end(), read);
      } else {
        shares = shares || std::ranges::any_of(read.axes, [](const Affine& axis) { return !axis.is_constant(); });
      }
      leaf.back() = static_cast<std::int32_t>(at - operands.begin());
    }
    if (!depends && !shares) return false;
    const int instructions = size_of(placed) + static_cast<int>(program.bytecode().instructions.size());
    if (instructions > (depends ? abilities_.instructions : std::min(kMostSideBySide, abilities_.instructions))) return false;
    if (operands.size() > abilities_.operands) return false;
    // Values that nothing else needs are not stored.
    std::vector<bool> dropped(first.targets.size());
    std::size_t stored = second.targets.size();
    for (std::size_t o = 0; o < first.targets.size(); ++o) {
      const std::int32_t slot = first.targets[o].slot;
      const bool read = std::ranges::find(mine.read, slot) != mine.read.end();
      dropped[o] = read && readers_[slot] == 1;
      stored += !dropped[o];
    }
    if (stored > kMostOutputs) return false;
    // A result that is differentiated again leads to what its nest reads, and where it leads to a call whose derivative PyTorch
    // does not have, that raises.
    if (stored > second.targets.size() && calls != placed.calls) return false;

    if (!placed.pool) placed.pool = first.program->pool();
    std::vector<fused::ExprId> leaves;
    for (std::size_t k = 0; k < from.size(); ++k) {
      leaves.push_back(from[k] >= 0 ? placed.outputs[from[k]].expr : placed.pool->operand(leaf[k]));
    }
    std::vector<fused::OutputSpec> outputs;
    std::vector<Target> targets;
    for (std::size_t o = 0; o < first.targets.size(); ++o) {
      if (dropped[o]) continue;
      outputs.push_back(placed.outputs[o]);
      targets.push_back(std::move(first.targets[o]));
    }
    for (std::size_t o = 0; o < second.targets.size(); ++o) {
      outputs.push_back(more[o]);
      outputs.back().expr = placed.pool->substitute(program.pool(), more[o].expr, leaves);
      targets.push_back(second.targets[o]);
    }
    first.operands = std::move(operands);
    first.targets = std::move(targets);
    placed.outputs = std::move(outputs);
    for (std::int32_t slot : mine.read) {
      const bool both = std::ranges::find(placed.touched.read, slot) != placed.touched.read.end();
      if (both || std::ranges::find(placed.touched.written, slot) != placed.touched.written.end()) --readers_[slot];
    }
    placed.touched = touched(placed.step);
    placed.calls = calls;
    return true;
  }

  static int size_of(const Placed& placed) {
    if (!placed.pool) return static_cast<int>(std::get<Evaluate>(placed.step).program->bytecode().instructions.size());
    std::vector<fused::ExprId> roots;
    for (const fused::OutputSpec& output : placed.outputs) roots.push_back(output.expr);
    return static_cast<int>(placed.pool->reachable(roots).size());  // with leaves: at most
  }

  void write_program(Placed& placed) const {
    auto& nest = std::get<Evaluate>(placed.step);
    nest.text = fused::to_text(*placed.pool, {.rank = static_cast<int>(nest.extents.size()),
                                              .operands = static_cast<int>(nest.operands.size()),
                                              .compute = nest.program->compute(),
                                              .outputs = placed.outputs});
    nest.program = fused::intern(nest.text);
  }

  Plan& plan_;
  const Abilities& abilities_;
  std::vector<int> readers_;    // per slot: steps that read it, and results that are it
  std::vector<CallSet> calls_;  // per slot
  int calls_made_ = 0;
  std::vector<Placed> placed_;
};

}  // namespace

void join_nests(Plan& plan, const Abilities& abilities) { Joiner(plan, abilities).run(); }

}  // namespace wengert::blocks
