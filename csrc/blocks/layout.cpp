#include "blocks/layout.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace wengert::blocks {

namespace {

using Order = std::vector<std::size_t>;

std::int64_t window_size(const std::vector<std::int64_t>& steps, const Shape& extents) {
  std::int64_t size = 1;
  for (std::size_t k = 0; k < steps.size(); ++k) size *= steps[k] != 0 ? extents[k] : 1;
  return size;
}

// Backwards through the plan every nest chooses the order of its loops: that of its arrays which are as they are, and that in
// which later nests read what it makes.  What it reads from free arrays is a vote on how they should lie.
class Orientation {
 public:
  explicit Orientation(Plan& plan) : plan_(plan), arrays_(plan.slots.size()), runs_(plan.steps.size()) {}

  void run() {
    find_free();
    for (std::size_t i = plan_.steps.size(); i-- > 0;) {
      if (const auto* nest = std::get_if<Evaluate>(&plan_.steps[i])) runs_[i] = choose(*nest);
    }
    for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
      std::visit([&](auto& step) { turn(step, runs_[i]); }, plan_.steps[i]);
    }
    drop_copies();
  }

 private:
  struct Votes {
    std::vector<std::pair<Order, double>> counted;

    void add(Order order, double weight) {
      const auto at = std::ranges::find(counted, order, &std::pair<Order, double>::first);
      if (at == counted.end()) {
        counted.emplace_back(std::move(order), weight);
      } else {
        at->second += weight;
      }
    }
    const Order* most() const {
      const auto at = std::ranges::max_element(counted, {}, &std::pair<Order, double>::second);
      return at == counted.end() ? nullptr : &at->first;
    }
  };

  struct Array {
    bool free = false;  // made by one step, whose axes can change places
    int readers = 0;
    Votes votes;  // by axes, outer ones first
    Order axes;   // which of its former axes its axes are; empty: as before
  };

  // Whether each axis is a loop of its own, from one end to the other.
  bool covers(const Target& target, const Evaluate& nest) const {
    const Slot& slot = plan_.slots[target.slot];
    if (target.accumulate || slot.zero_filled) return false;
    std::vector<bool> taken(nest.extents.size(), false);
    for (std::size_t a = 0; a < target.axes.size(); ++a) {
      const Affine& axis = target.axes[a];
      if (axis.start != 0) return false;
      std::int64_t length = 1;
      for (std::size_t k = 0; k < taken.size(); ++k) {
        if (!axis.moves(k)) continue;
        if (taken[k] || length != 1 || axis.step[k] != 1) return false;
        taken[k] = true;
        length = nest.extents[k];
      }
      if (length != slot.shape[a]) return false;
    }
    return true;
  }

  void find_free() {
    for (const Step& step : plan_.steps) {
      if (const auto* product = std::get_if<Matmul>(&step)) arrays_[product->out].free = !product->scale;
      if (const auto* nest = std::get_if<Evaluate>(&step)) {
        for (const Target& target : nest->targets) {
          arrays_[target.slot].free = covers(target, *nest) && plan_.slots[target.slot].requires_grad;
        }
      }
    }
    for (std::int32_t result : plan_.results) {
      if (result >= 0) arrays_[result].free = false;
    }
    for (const Step& step : plan_.steps) {
      for (std::int32_t slot : touched(step).read) ++arrays_[slot].readers;
      // Whoever reads a slot as a whole says how it has to lie.
      if (const auto* take = std::get_if<Take>(&step)) arrays_[take->source].free = arrays_[take->index].free = false;
      if (const auto* put = std::get_if<PutAdd>(&step)) {
        if (!put->puts_rows()) arrays_[put->index.slot].free = false;
        if (put->axis) arrays_[put->axis->index.slot].free = false;
      }
      if (const auto* call = std::get_if<CallNode>(&step)) {
        for (std::int32_t slot : call->cotangents) {
          if (slot >= 0) arrays_[slot].free = false;
        }
      }
    }
  }

  // The order of the loops, outer ones first; empty: as they are.
  Order choose(const Evaluate& nest) {
    const std::size_t n = nest.extents.size();
    if (n < 2) return {};
    Order as_is(n);
    std::iota(as_is.begin(), as_is.end(), 0);
    const std::int64_t size = numel(nest.extents);
    Votes votes;
    const auto as_it_lies = [&](std::int32_t slot, const std::vector<Affine>& axes) {
      const std::vector<std::int64_t> steps = memory_steps(plan_.slots[slot], axes, n);
      if (window_size(steps, nest.extents) != size) return;
      Order order = as_is;
      std::ranges::stable_sort(order, std::ranges::greater(), [&](std::size_t k) { return steps[k]; });
      votes.add(std::move(order), static_cast<double>(size));
    };
    for (const Target& target : nest.targets) {
      const Array& array = arrays_[target.slot];
      if (!array.free) {
        as_it_lies(target.slot, target.axes);
      } else if (target.axes.size() == n) {
        for (const auto& [axes, weight] : array.votes.counted) {
          Order order;
          for (std::size_t a : axes) {
            for (std::size_t k = 0; k < n; ++k) {
              if (target.axes[a].moves(k)) order.push_back(k);
            }
          }
          if (order.size() == n) votes.add(std::move(order), weight);
        }
      }
    }
    for (const Read& read : nest.operands) {
      if (!arrays_[read.slot].free) as_it_lies(read.slot, read.axes);
    }
    const Order* most = votes.most();
    const Order order = most == nullptr ? as_is : *most;
    std::vector<std::size_t> place(n);
    for (std::size_t q = 0; q < n; ++q) place[order[q]] = q;
    for (const Read& read : nest.operands) {
      Array& array = arrays_[read.slot];
      if (array.free) array.votes.add(sorted_axes(read.axes, place, nest.extents), static_cast<double>(size));
    }
    return order == as_is ? Order() : order;
  }

  // Axes in the order of the innermost loops that move them; what moves nowhere stays outside.
  static Order sorted_axes(const std::vector<Affine>& axes, const std::vector<std::size_t>& place, const Shape& extents) {
    std::vector<std::size_t> innermost(axes.size(), 0);
    for (std::size_t a = 0; a < axes.size(); ++a) {
      for (std::size_t k = 0; k < place.size(); ++k) {
        if (axes[a].moves(k) && extents[k] != 1) innermost[a] = std::max(innermost[a], place[k] + 1);
      }
    }
    Order order(axes.size());
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, {}, [&](std::size_t a) { return innermost[a]; });
    return order;
  }

  void turn(Evaluate& nest, const Order& run) {
    for (Read& read : nest.operands) follow(read);
    if (run.empty()) return;
    const std::size_t n = run.size();
    std::vector<std::size_t> place(n);
    for (std::size_t q = 0; q < n; ++q) place[run[q]] = q;
    nest = with_loops_at(std::move(nest), place);
    const std::vector<fused::OutputSpec> outputs = with_loops_at(nest.program->outputs(), place);
    if (std::ranges::any_of(outputs, [](const fused::OutputSpec& output) { return output.reduced != 0; })) {
      nest.text = fused::to_text(nest.program->pool(), {.rank = static_cast<int>(n),
                                                        .operands = static_cast<int>(nest.operands.size()),
                                                        .compute = nest.program->compute(),
                                                        .outputs = outputs});
      nest.program = fused::intern(nest.text);
    }
    std::iota(place.begin(), place.end(), 0);
    for (Target& target : nest.targets) {
      if (!arrays_[target.slot].free) continue;
      Order axes = sorted_axes(target.axes, place, nest.extents);
      std::vector<Affine> sorted;
      for (std::size_t a : axes) sorted.push_back(target.axes[a]);
      target.axes = std::move(sorted);
      relabel(target.slot, std::move(axes));
    }
  }

  // The product's loops in the order in which its sides lie by now, the sides in the order in which it is read.
  void turn(Matmul& step, const Order&) {
    follow(step.a), follow(step.b);
    if (step.scale) {
      follow(*step.scale);
      return;
    }
    const std::vector<bool> none(plan_.slots.size(), false);
    const auto sort = [&](const Read& side, Order& loops) { sort_by_memory(plan_.slots, none, {&side, 1}, loops); };
    const Array& array = arrays_[step.out];
    if (array.free) {
      const Order before = axes_of(step);
      sort(step.a, step.batch), sort(step.a, step.m), sort(step.b, step.n);
      if (by_columns(array.votes, step)) {
        std::swap(step.a, step.b);
        std::swap(step.m, step.n);
      }
      Order axes;
      for (std::size_t loop : axes_of(step)) {
        axes.push_back(static_cast<std::size_t>(std::ranges::find(before, loop) - before.begin()));
      }
      relabel(step.out, std::move(axes));
    }
    sort(step.a, step.k);
  }

  void turn(PutAdd& step, const Order&) { follow(step.value); }
  template <class Other>
  void turn(Other&, const Order&) {}

  // Whether most that is read of a product, with its axes as they were, is read along the rows of a^T.
  static bool by_columns(const Votes& votes, const Matmul& step) {
    if (step.m.empty() || step.n.empty()) return false;
    const std::size_t first = step.batch.size() + step.m.size();  // of the axes of n
    double columns = 0;
    for (const auto& [axes, weight] : votes.counted) {
      if (axes.back() >= step.batch.size()) columns += axes.back() < first ? weight : -weight;
    }
    return columns > 0;
  }

  static Order axes_of(const Matmul& step) {
    Order loops = step.batch;
    loops.insert(loops.end(), step.m.begin(), step.m.end());
    loops.insert(loops.end(), step.n.begin(), step.n.end());
    return loops;
  }

  void relabel(std::int32_t slot, Order axes) {
    if (std::ranges::is_sorted(axes)) return;
    Shape shape;
    for (std::size_t a : axes) shape.push_back(plan_.slots[slot].shape[a]);
    plan_.slots[slot].shape = std::move(shape);
    arrays_[slot].axes = std::move(axes);
  }

  void follow(Read& read) const {
    const Order& order = arrays_[read.slot].axes;
    if (order.empty()) return;
    std::vector<Affine> axes;
    for (std::size_t a : order) axes.push_back(std::move(read.axes[a]));
    read.axes = std::move(axes);
  }

  // A copy of a whole array, which nothing else reads, to one of the same shape: the array is made there.
  void drop_copies() {
    std::vector<std::int32_t> made_as(plan_.slots.size(), -1);
    std::erase_if(plan_.steps, [&](const Step& step) {
      const auto* nest = std::get_if<Evaluate>(&step);
      if (nest == nullptr || nest->targets.size() != 1 || nest->operands.size() != 1) return false;
      const fused::Bytecode& code = nest->program->bytecode();
      if (!code.instructions.empty() || code.loads.empty() || nest->program->outputs()[0].reduced != 0) return false;
      const Read& read = nest->operands[0];
      const Target& target = nest->targets[0];
      const Slot &from = plan_.slots[read.slot], &to = plan_.slots[target.slot];
      const Array& array = arrays_[read.slot];
      if (!array.free || array.readers != 1 || from.dtype != to.dtype || from.shape != to.shape || read.axes != target.axes ||
          !covers(target, *nest)) {
        return false;
      }
      made_as[read.slot] = target.slot;
      return true;
    });
    const auto rename = [&](std::int32_t& slot) {
      while (made_as[slot] >= 0) slot = made_as[slot];
    };
    for (Step& step : plan_.steps) {
      if (auto* product = std::get_if<Matmul>(&step)) rename(product->out);
      if (auto* nest = std::get_if<Evaluate>(&step)) {
        for (Target& target : nest->targets) rename(target.slot);
      }
    }
  }

  Plan& plan_;
  std::vector<Array> arrays_;  // per slot
  std::vector<Order> runs_;    // per step
};

}  // namespace

std::vector<std::int64_t> memory_steps(const Slot& slot, const std::vector<Affine>& axes, std::size_t loops) {
  std::vector<std::int64_t> steps(loops, 0);
  std::int64_t stride = 1;
  for (std::size_t a = slot.shape.size(); a-- > 0;) {
    const std::int64_t along = slot.strides.empty() ? stride : slot.strides[a];
    for (std::size_t k = 0; k < loops; ++k) steps[k] += axes[a].step[k] * along;
    stride *= slot.shape[a];
  }
  for (std::int64_t& step : steps) step = std::abs(step);
  return steps;
}

void sort_by_memory(const std::vector<Slot>& slots, const std::vector<bool>& turnable, std::span<const Read> operands,
                    std::vector<std::size_t>& loops) {
  if (loops.size() < 2) return;
  const std::size_t n = *std::ranges::max_element(loops) + 1;
  struct Lie {
    std::int64_t size;
    bool turns;
    std::vector<std::int64_t> steps;
    bool alike(const Lie& other) const { return size == other.size && turns == other.turns; }
  };
  std::vector<Lie> lies;
  for (const Read& read : operands) {
    const Slot& slot = slots[read.slot];
    lies.push_back({numel(slot.shape), turnable[read.slot], memory_steps(slot, read.axes, n)});
  }
  std::ranges::stable_sort(lies,
                           [](const Lie& a, const Lie& b) { return std::pair(a.size, !a.turns) > std::pair(b.size, !b.turns); });
  const auto leaders = std::ranges::find_if_not(lies, [&](const Lie& lie) { return lie.alike(lies[0]); }) - lies.begin();
  const auto sorted_by = [&](std::size_t first) {
    // Per loop: which operand decides, the first one to move, and how far it moves.
    std::vector<std::pair<std::int64_t, std::int64_t>> keys(n);
    for (std::size_t k : loops) {
      for (std::size_t r = 0; r < lies.size(); ++r) {
        const std::size_t at = r == 0 ? first : r <= first ? r - 1 : r;
        if (lies[at].steps[k] == 0) continue;
        keys[k] = {-static_cast<std::int64_t>(r), -lies[at].steps[k]};
        break;
      }
    }
    Order order = loops;
    std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return keys[a] < keys[b]; });
    return order;
  };
  std::vector<std::pair<Order, int>> orders;
  for (std::int64_t r = 0; r < std::max<std::int64_t>(leaders, 1) && r < static_cast<std::int64_t>(lies.size()); ++r) {
    Order order = sorted_by(static_cast<std::size_t>(r));
    const auto at = std::ranges::find(orders, order, &std::pair<Order, int>::first);
    if (at == orders.end()) {
      orders.emplace_back(std::move(order), 1);
    } else {
      ++at->second;
    }
  }
  if (!orders.empty()) loops = std::ranges::max_element(orders, {}, &std::pair<Order, int>::second)->first;
}

void orient(Plan& plan) { Orientation(plan).run(); }

}  // namespace wengert::blocks
