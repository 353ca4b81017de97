#include "accumulate/sweep.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <set>
#include <utility>

#include "blocks/pull.h"
#include "blocks/verify.h"
#include "kernels/cuda/small_matmul.h"
#include "ops/backend.h"
#include "ops/fused.h"
#include "tape/custom.h"

namespace wengert::accumulate {

namespace {

using blocks::Block;
using blocks::BlockList;
using blocks::Builder;
using blocks::Coord;
using blocks::Loss;
using blocks::numel;
using blocks::Part;
using blocks::Shape;

// A value this large is forced before it is multiplied into several pulls, which would each compute it again.
constexpr int kMaxShared = 24;

std::atomic<std::int64_t> total_blocks{0}, total_densified{0};

class Sweep {
 public:
  Sweep(const tape::Tape& tape, Builder& builder, bool by_sample, Report* report)
      : tape_(tape), builder_(builder), by_sample_(by_sample), report_(report), lists_(tape.nodes.size()) {
    for (std::size_t n = 0; n < tape.nodes.size(); ++n) lists_[n].resize(tape.nodes[n].outputs.size());
  }

  // Forgets the last one.
  void begin(Shape row_shape, bool watch_batch) {
    row_shape_ = std::move(row_shape);
    watch_batch_ = watch_batch;
    coupling_node_.clear();
    coupling_read_ = false;
    for (const tape::Value& input : tape_.inputs) {
      if (input.node >= 0) captured_[{input.node, input.output}] = State{};
    }
  }

  void seed(tape::Value value, Block block) {
    State& state = reach(value);
    state.list.add(builder_, std::move(block));
  }

  // Nodes stand in topological order.
  void run() {
    while (!waiting_.empty()) {
      const std::int32_t node = *waiting_.begin();
      waiting_.erase(waiting_.begin());
      visit(node);
    }
  }

  bool reached(tape::Value input) const { return input.node >= 0 && captured_.at({input.node, input.output}).reached; }
  const std::vector<Block>& result(tape::Value input) const { return captured_.at({input.node, input.output}).list.blocks(); }
  // (node, edge) along which the expressions of a node that is also called were pulled.
  std::vector<std::pair<std::int32_t, std::size_t>> reads_of_called() const {
    std::vector<std::pair<std::int32_t, std::size_t>> out;
    std::ranges::copy_if(reads_, std::back_inserter(out), [this](const auto& read) { return called_.contains(read.first); });
    return out;
  }
  CoupledSamples coupled() const { return {coupling_node_.empty() ? "the graph" : coupling_node_, coupling_read_}; }

 private:
  struct State {
    BlockList list;
    bool reached = false;  // structurally, even if every block vanished on the way
  };

  State& reach(tape::Value value) {
    State& state = lists_[value.node][value.output];
    if (!std::exchange(state.reached, true)) waiting_.insert(value.node);
    return state;
  }

  void visit(std::int32_t n) {
    const tape::Node& node = tape_.nodes[n];
    std::vector<State>& states = lists_[n];
    bool any = false;
    for (std::size_t o = 0; o < states.size(); ++o) {
      any = any || states[o].reached;
      auto captured = captured_.find({n, static_cast<std::int32_t>(o)});
      if (captured != captured_.end()) captured->second = states[o];
    }
    if (!any) return;
    std::vector<std::size_t> active;
    for (std::size_t j = 0; j < node.inputs.size(); ++j) {
      if (node.inputs[j].node >= 0) active.push_back(j);
    }
    if (active.empty()) {
      for (State& state : states) state = State{};
      return;
    }
    const auto losses_before = builder_.losses();
    NodeReport row = report_ ? begin_report(node, states) : NodeReport{};

    std::vector<std::vector<tape::Pullback>> pullbacks(active.size());
    std::size_t uses = 0;
    std::vector<bool> opaque(active.size(), false);
    std::vector<bool> costly(states.size(), false);
    const bool single_row = numel(row_shape_) == 1;
    for (std::size_t e = 0; e < active.size(); ++e) {
      for (std::size_t o = 0; o < states.size(); ++o) {
        pullbacks[e].push_back(
            states[o].reached ? tape::describe(tape_, node, static_cast<int>(o), static_cast<int>(active[e]), builder_.pool())
                              : tape::Pullback{.kind = tape::Kind::none, .terms = {}, .after = {}, .local = {}});
        tape::Pullback& pullback = pullbacks[e].back();
        // With one row there is nothing to keep tied, and one call serves all inputs.
        if (pullback.kind == tape::Kind::local && single_row) pullback.kind = tape::Kind::opaque;
        opaque[e] = opaque[e] || pullback.kind == tape::Kind::opaque;
        costly[o] = costly[o] || pullback.kind == tape::Kind::local || contracts(pullback);
        uses += pullback.kind <= tape::Kind::zero ? 0 : std::max<std::size_t>(1, pullback.terms.size());
      }
    }
    for (std::size_t o = 0; o < states.size(); ++o) {
      if (single_row) states[o].list.settle_indices(builder_);
      states[o].list.reduce(builder_, costly[o]);
      if (uses > 1) force_shared(states[o].list);
    }
    const bool was_tied = watch_batch_ && coupling_node_.empty() && all_tied(states);
    for (std::size_t e = 0; e < active.size(); ++e) {
      const tape::Value target = node.inputs[active[e]];
      const auto arrives = [](const tape::Pullback& pullback) { return pullback.kind != tape::Kind::none; };
      if (!std::ranges::any_of(pullbacks[e], arrives)) continue;
      reach(target);
      if (opaque[e]) continue;
      for (std::size_t o = 0; o < states.size(); ++o) {
        const tape::Pullback& pullback = pullbacks[e][o];
        if (pullback.kind <= tape::Kind::zero) continue;
        BlockList sum;  // of the terms, where something comes after it
        for (Block& block : states[o].list.blocks()) {
          if (pullback.kind == tape::Kind::local) {
            deliver(call_local(n, o, active[e], pullback.local, block), target);
            continue;
          }
          reads_.emplace(n, active[e]);
          for (const tape::Term& term : pullback.terms) {
            Block given = uses == 1 ? std::move(block) : block;  // a chain's operands are many, and copied at every node
            for (Block& pulled : blocks::pull(builder_, std::move(given), term)) {
              if (pullback.after.empty()) {
                deliver(std::move(pulled), target);
              } else {
                sum.add(builder_, std::move(pulled));
              }
            }
          }
        }
        for (Block& block : sum.blocks()) {
          for (Block& pulled : blocks::pull(builder_, std::move(block), pullback.after)) deliver(std::move(pulled), target);
        }
      }
    }
    if (std::find(opaque.begin(), opaque.end(), true) != opaque.end()) call_opaque(n, states, active, opaque);
    if (was_tied) watch_coupling(node, active, is_read(pullbacks) && builder_.losses() == losses_before);
    if (report_) finish_report(std::move(row), pullbacks, losses_before);
    for (State& state : states) state = State{};  // free the expressions' operand tables early
  }

  // Sums over axes of a factor, as a matrix product does.
  static bool contracts(const tape::Pullback& pullback) {
    return std::ranges::any_of(pullback.terms, [](const tape::Term& term) {
      return std::ranges::any_of(term, [](const tape::Step& step) {
        const auto* gather = std::get_if<tape::Gather>(&step);
        return gather != nullptr && !gather->loops.empty() && !gather->factor.operands.empty();
      });
    });
  }

  // Adds a block to a value's list, converting to the value's dtype as PyTorch's engine does at every edge.
  void deliver(Block block, tape::Value target) {
    const tape::Meta& meta = tape_.nodes[target.node].outputs[target.output];
    const fused::Dtype dtype = to_fused(meta.dtype);
    if (block.dtype != dtype) {
      block.value = builder_.force(block.value, block.extents, block.dtype);
      block.dtype = dtype;
    }
    if (block.col_shape != meta.shape) throw tape::Unsupported("a block that does not fit the input it was pulled to");
    lists_[target.node][target.output].list.add(builder_, std::move(block));
  }

  void force_shared(BlockList& list) {
    std::map<std::pair<Shape, fused::Dtype>, std::vector<blocks::Value*>> groups;
    for (Block& block : list.blocks()) {
      if (builder_.pool().size(block.value.expr) > kMaxShared) groups[{block.extents, block.dtype}].push_back(&block.value);
    }
    for (auto& [key, values] : groups) builder_.force_together(values, key.first, key.second);
  }

  // The node is called with everything that arrives at it: all outputs, all rows.  Where only zeros arrive PyTorch passes a
  // tensor of them: so does this to code of the user's, which may do with them what it likes; to other nodes they mean the same
  // as nothing, except where nothing makes them give nothing (see Calls).
  void call_opaque(std::int32_t n, std::vector<State>& states, const std::vector<std::size_t>& active,
                   const std::vector<bool>& opaque) {
    const tape::Node& node = tape_.nodes[n];
    const std::size_t rank = row_shape_.size();
    if (numel(row_shape_) > 1) builder_.lose(Loss::opaque);
    blocks::CallNode step{
        .node = n, .batch = rank, .cotangents = {}, .results = std::vector<std::int32_t>(node.inputs.size(), -1), .zeros = {}};
    const bool custom = tape::is_custom(*node.fn);
    for (std::size_t o = 0; o < states.size(); ++o) {
      std::int32_t slot = -1;
      if (states[o].reached && states[o].list.empty() && !custom) step.zeros.push_back(static_cast<std::int32_t>(o));
      if (!states[o].list.empty() || (states[o].reached && custom)) {
        const tape::Meta& meta = node.outputs[o];
        Shape shape = row_shape_;
        shape.insert(shape.end(), meta.shape.begin(), meta.shape.end());
        std::vector<Part> parts;
        for (const Block& block : states[o].list.blocks()) {
          for (std::size_t k = 0; k < block.loops(); ++k) {
            if (block.moves_col(k)) check_samples(n, block, k);
          }
          parts.push_back(blocks::as_part(block));
        }
        slot = argument(shape, to_fused(meta.dtype), std::move(parts));
      }
      step.cotangents.push_back(slot);
    }
    const bool live = std::any_of(step.cotangents.begin(), step.cotangents.end(), [](std::int32_t s) { return s >= 0; });
    std::vector<std::pair<tape::Value, std::int32_t>> made;
    for (std::size_t e = 0; e < active.size(); ++e) {
      if (!opaque[e]) continue;
      const tape::Value target = node.inputs[active[e]];
      if (!live) continue;
      const tape::Meta& meta = tape_.nodes[target.node].outputs[target.output];
      Shape shape = row_shape_;
      shape.insert(shape.end(), meta.shape.begin(), meta.shape.end());
      if (numel(row_shape_) == 0) continue;
      step.results[active[e]] = builder_.new_slot(shape, to_fused(meta.dtype));
      made.emplace_back(target, step.results[active[e]]);
    }
    if (made.empty()) return;
    call(std::move(step));
    for (auto [target, slot] : made) {
      const tape::Meta& meta = tape_.nodes[target.node].outputs[target.output];
      if (numel(meta.shape) != 0) deliver(dense_block(slot, meta), target);
    }
  }

  // Before the node is called with what lies along all of a tied loop, for each row of it.
  void check_samples(std::int32_t n, const Block& block, std::size_t loop) const {
    if (by_sample_ && !block.row.empty() && block.extents[loop] > 1 && block.row[0].moves(loop)) {
      throw tape::Unsupported(std::string("samples that would all be given to ") + tape::name(tape_.nodes[n]) + " for each");
    }
  }

  void call(blocks::CallNode step) {
    called_.insert(step.node);
    builder_.emit(std::move(step));
  }

  Block dense_block(std::int32_t slot, const tape::Meta& meta) {
    Shape extents = row_shape_;
    extents.insert(extents.end(), meta.shape.begin(), meta.shape.end());
    Block out{.extents = extents,
              .value = {},
              .row = {},
              .col = {},
              .row_shape = row_shape_,
              .col_shape = meta.shape,
              .dtype = to_fused(meta.dtype)};
    blocks::Read read{.slot = slot, .axes = {}};
    for (std::size_t k = 0; k < extents.size(); ++k) {
      (k < row_shape_.size() ? out.row : out.col).push_back(blocks::loop_coord(extents.size(), k));
      read.axes.push_back(blocks::loop_coord(extents.size(), k).affine);
    }
    out.value = blocks::Value{.expr = builder_.pool().operand(0), .operands = {std::move(read)}};
    blocks::normalize(out);
    return out;
  }

  // What of a block can be carried through a node that works on some axes element by element: the node leaves such a coordinate
  // as it is, so a loop that these coordinates determine needs no call of its own.
  struct Carried {
    std::vector<bool> axes;   // per output axis of the node
    std::vector<bool> loops;  // determined by the coordinates along those axes
  };

  static Carried carried(const Block& block, const tape::Local& local) {
    const std::size_t loops = block.loops();
    Carried out{.axes = std::vector<bool>(block.col.size()), .loops = {}};
    for (std::size_t a = 0; a < block.col.size(); ++a) out.axes[a] = local.tied[a] >= 0 && !block.col[a].has_index();
    for (bool changed = true; changed;) {
      changed = false;
      out.loops = blocks::determined_loops(block.extents, block.col, out.axes);
      for (std::size_t a = 0; a < block.col.size(); ++a) {
        for (std::size_t k = 0; k < loops && out.axes[a]; ++k) {
          if (!block.col[a].moves(k) || out.loops[k]) continue;
          out.axes[a] = false;
          changed = true;
        }
      }
    }
    return out;
  }

  // Calls the node on one block.  What is carried stays inside the tensors; all other row loops become batch axes.
  Block call_local(std::int32_t n, std::size_t output, std::size_t edge, const tape::Local& local, const Block& block) {
    const tape::Node& node = tape_.nodes[n];
    const tape::Value target = node.inputs[edge];
    const tape::Meta& in = tape_.nodes[target.node].outputs[target.output];
    const std::size_t loops = block.loops();
    const Carried kept = carried(block, local);
    std::vector<std::size_t> batch;
    for (std::size_t k = 0; k < loops; ++k) {
      if (kept.loops[k] || !block.moves_row(k)) continue;
      batch.push_back(k);
      if (!block.moves_col(k)) continue;
      check_samples(n, block, k);
      builder_.lose(Loss::local);  // a tied loop had to be untied
    }
    // In the order of the rows, as the result will have to lie.
    std::ranges::stable_sort(batch, {}, [&](std::size_t k) {
      return std::ranges::find_if(block.row, [k](const Coord& coord) { return coord.moves(k); }) - block.row.begin();
    });
    Part part = blocks::as_part(block);
    part.coords.assign(block.col.begin(), block.col.end());
    Shape shape;
    std::vector<Coord> lead;
    for (std::size_t k : batch) {
      shape.push_back(block.extents[k]);
      lead.push_back(blocks::loop_coord(loops, k));
    }
    part.coords.insert(part.coords.begin(), lead.begin(), lead.end());
    shape.insert(shape.end(), block.col_shape.begin(), block.col_shape.end());
    blocks::CallNode step{.node = n,
                          .batch = batch.size(),
                          .cotangents = std::vector<std::int32_t>(node.outputs.size(), -1),
                          .results = std::vector<std::int32_t>(node.inputs.size(), -1),
                          .zeros = {}};
    step.cotangents[output] = argument(shape, block.dtype, {std::move(part)});
    Shape result_shape(shape.begin(), shape.begin() + batch.size());
    result_shape.insert(result_shape.end(), in.shape.begin(), in.shape.end());
    const std::int32_t result = builder_.new_slot(result_shape, to_fused(in.dtype));
    step.results[edge] = result;
    call(std::move(step));

    // New loops: the batch loops, the carried ones, then one per input axis that nothing is carried along.
    std::vector<std::size_t> source(batch);  // loop of `block` behind a new loop, or `loops`
    for (std::size_t k = 0; k < loops; ++k) {
      if (kept.loops[k]) source.push_back(k);
    }
    Block out{.extents = {},
              .value = {},
              .row = {},
              .col = {},
              .row_shape = row_shape_,
              .col_shape = in.shape,
              .dtype = to_fused(in.dtype)};
    for (std::size_t k : source) out.extents.push_back(block.extents[k]);
    std::vector<std::size_t> carried_by(in.shape.size(), block.col.size());  // output axis behind an input axis
    for (std::size_t a = 0; a < block.col.size(); ++a) {
      if (kept.axes[a]) carried_by[local.tied[a]] = a;
    }
    for (std::size_t a = 0; a < in.shape.size(); ++a) {
      if (carried_by[a] < block.col.size()) continue;
      source.push_back(loops);
      out.extents.push_back(in.shape[a]);
    }
    const std::size_t total = out.extents.size();
    auto moved = [&](const blocks::Affine& old) {
      blocks::Affine affine{.start = old.start, .step = std::vector<std::int64_t>(total, 0)};
      for (std::size_t q = 0; q < total; ++q) {
        if (source[q] < loops) affine.step[q] = old.step[source[q]];
      }
      return affine;
    };
    for (const Coord& coord : block.row) {
      Coord next{.affine = moved(coord.affine), .index_scale = coord.index_scale, .index = coord.index};
      if (coord.has_index()) {
        for (blocks::Affine& axis : next.index.axes) axis = moved(axis);
      }
      out.row.push_back(std::move(next));
    }
    blocks::Read read{.slot = result, .axes = {}};
    for (std::size_t q = 0; q < batch.size(); ++q) read.axes.push_back(blocks::loop_coord(total, q).affine);
    std::size_t fresh = total - static_cast<std::size_t>(std::ranges::count(carried_by, block.col.size()));
    for (std::size_t a = 0; a < in.shape.size(); ++a) {
      Coord coord = carried_by[a] < block.col.size()
                        ? Coord{.affine = moved(block.col[carried_by[a]].affine), .index_scale = 0, .index = {}}
                        : blocks::loop_coord(total, fresh++);
      read.axes.push_back(coord.affine);
      out.col.push_back(std::move(coord));
    }
    out.value = blocks::Value{.expr = builder_.pool().operand(0), .operands = {std::move(read)}};
    blocks::normalize(out);
    return out;
  }

  // The sum of the parts as a node's argument: the result of the node before as it is, where it is just that.
  std::int32_t argument(const Shape& shape, fused::Dtype dtype, std::vector<Part> parts) {
    if (parts.size() == 1) {
      const std::int32_t whole = builder_.as_whole_slot(parts[0], shape, dtype);
      if (whole >= 0 && builder_.slot(whole).shape == shape) return whole;
    }
    return builder_.assemble(shape, dtype, std::move(parts));
  }

  // ---- explain and the watch on sample independence

  NodeReport begin_report(const tape::Node& node, const std::vector<State>& states) const {
    NodeReport row{.node = tape::name(node), .kind = {}, .structure = {}};
    for (std::size_t o = 0; o < states.size(); ++o) {
      if (!states[o].reached) continue;
      row.blocks += static_cast<std::int64_t>(states[o].list.size());
      for (const Block& block : states[o].list.blocks()) row.stored += block.stored();
      row.dense += numel(row_shape_) * numel(node.outputs[o].shape);
    }
    return row;
  }

  template <class Losses>
  void finish_report(NodeReport row, const std::vector<std::vector<tape::Pullback>>& pullbacks, const Losses& before) {
    tape::Kind kind = tape::Kind::zero;
    for (const auto& edge : pullbacks) {
      for (const tape::Pullback& pullback : edge) kind = std::max(kind, pullback.kind);
    }
    switch (kind) {
      case tape::Kind::none:
      case tape::Kind::zero:
        row.kind = "zero";
        break;
      case tape::Kind::terms:
        row.kind = "structured";
        break;
      case tape::Kind::local:
        row.kind = "local";
        break;
      case tape::Kind::opaque:
        row.kind = "opaque";
        break;
    }
    for (std::size_t l = 0; l < before.size(); ++l) {
      const std::int64_t times = builder_.losses()[l] - before[l];
      if (times == 0) continue;
      if (!row.structure.empty()) row.structure += ", ";
      row.structure += std::string("lost: ") + blocks::name(static_cast<Loss>(l));
      if (times > 1) row.structure += " x" + std::to_string(times);
    }
    if (row.structure.empty()) row.structure = "kept";
    report_->nodes.push_back(std::move(row));
  }

  // Every loop that moves the row's sample axis also moves the column side.
  static bool tied(const Block& block) {
    for (std::size_t k = 0; k < block.loops(); ++k) {
      if (block.row[0].moves(k) && !block.moves_col(k)) return false;
    }
    return !(block.col_shape.size() > 0 && block.col_shape[0] == block.row_shape[0]) || block.row[0] == block.col[0];
  }
  static bool all_tied(const std::vector<State>& states) {
    for (const State& state : states) {
      for (const Block& block : state.list.blocks()) {
        if (!tied(block)) return false;
      }
    }
    return true;
  }
  static bool is_read(const std::vector<std::vector<tape::Pullback>>& pullbacks) {
    return std::ranges::all_of(pullbacks, [](const std::vector<tape::Pullback>& edge) {
      return std::ranges::all_of(edge, [](const tape::Pullback& p) { return p.kind <= tape::Kind::terms; });
    });
  }
  void watch_coupling(const tape::Node& node, const std::vector<std::size_t>& active, bool read) {
    for (std::size_t j : active) {
      const tape::Value target = node.inputs[j];
      for (const Block& block : lists_[target.node][target.output].list.blocks()) {
        if (tied(block)) continue;
        coupling_node_ = tape::name(node);
        coupling_read_ = read;
        return;
      }
    }
  }

 public:
  // The blocks as one array; coords(block) gives its axes, by default (row, col).  Reuses a slot that already is that array.
  std::int32_t array(const std::vector<Block>& list, const Shape& shape, fused::Dtype dtype,
                     const std::vector<std::size_t>& order, std::vector<std::int32_t>* taken = nullptr) {
    std::vector<Part> parts;
    for (const Block& block : list) {
      Part part = blocks::as_part(block);
      if (!order.empty()) {
        std::vector<Coord> coords;
        for (std::size_t a : order) coords.push_back(part.coords[a]);
        part.coords = std::move(coords);
      }
      parts.push_back(std::move(part));
    }
    if (taken != nullptr && parts.size() == 1) {  // only results may differ from their slot in axes of extent 1
      const std::int32_t slot = builder_.as_whole_slot(parts[0], shape, dtype);
      if (slot >= 0 && std::find(taken->begin(), taken->end(), slot) == taken->end()) {
        taken->push_back(slot);
        return slot;
      }
    }
    return builder_.assemble(shape, dtype, std::move(parts));
  }

 private:
  const tape::Tape& tape_;
  Builder& builder_;
  Shape row_shape_;
  bool by_sample_;
  Report* report_;
  bool watch_batch_ = false;
  std::vector<std::vector<State>> lists_;
  std::set<std::int32_t> waiting_;  // nodes that were reached and not visited
  std::map<std::pair<std::int32_t, std::int32_t>, State> captured_;
  std::set<std::pair<std::int32_t, std::size_t>> reads_;
  std::set<std::int32_t> called_;
  std::string coupling_node_;
  bool coupling_read_ = false;
};

const tape::Meta& meta_of(const tape::Tape& tape, tape::Value value) { return tape.nodes[value.node].outputs[value.output]; }

// A called node takes and gives what its slots hold: batch axes, then the shape that the graph says.
void check_calls(const blocks::Plan& plan, const tape::Tape& tape) {
  for (const blocks::Step& step : plan.steps) {
    const auto* call = std::get_if<blocks::CallNode>(&step);
    if (call == nullptr) continue;
    const tape::Node& node = tape.nodes[call->node];
    const auto fits = [&](std::int32_t slot, const tape::Meta& meta) {
      if (slot < 0) return;
      const Shape& shape = plan.slots[slot].shape;
      if (!std::equal(shape.begin() + call->batch, shape.end(), meta.shape.begin(), meta.shape.end())) {
        throw tape::Unsupported(std::string("a plan that calls ") + tape::name(node) + " with another shape");
      }
    };
    for (std::size_t o = 0; o < call->cotangents.size(); ++o) fits(call->cotangents[o], node.outputs[o]);
    for (std::size_t j = 0; j < call->results.size(); ++j) {
      if (call->results[j] >= 0) fits(call->results[j], meta_of(tape, node.inputs[j]));
    }
  }
}

// Seeds over the rows of one output without its first axis: the sum over the samples.
Block summed_identity(const Shape& shape, fused::Dtype dtype) {
  Block block = blocks::identity(shape, dtype);
  block.row.erase(block.row.begin());
  block.row_shape.erase(block.row_shape.begin());
  return block;
}

}  // namespace

Totals totals() { return {.blocks = total_blocks, .densified = total_densified}; }
void reset_totals() { total_blocks = total_densified = 0; }

fused::Dtype to_fused(at::ScalarType dtype) {
  if (!ops::is_supported(dtype)) throw tape::Unsupported(std::string("element type ") + at::toString(dtype));
  return ops::to_dtype(dtype);
}

blocks::Plan make_plan(const tape::Tape& tape, const Request& request, Report* report) {
  std::vector<blocks::Slot> given;
  for (const at::Tensor& tensor : tape.slots) {
    const fused::Dtype dtype = to_fused(tensor.scalar_type());
    given.push_back({.shape = tensor.sizes().vec(), .dtype = dtype, .requires_grad = tensor.is_floating_point()});
    if (!tensor.is_contiguous()) given.back().strides = tensor.strides().vec();
  }
  std::vector<std::int32_t> cotangent_slots;
  for (const Cotangent& cotangent : request.cotangents) {
    cotangent_slots.push_back(cotangent.given ? static_cast<std::int32_t>(given.size()) : -1);
    if (cotangent.given) given.push_back({.shape = cotangent.shape, .dtype = to_fused(cotangent.dtype)});
  }
  blocks::Abilities abilities;
  if (ops::can_launch(tape.device)) {
    abilities = {.scaled_side = kernels::cuda::kSmallMatmulLimit,
                 .operands = std::numeric_limits<std::size_t>::max(),
                 .instructions = std::numeric_limits<int>::max()};
  }
  Builder builder(std::move(given), abilities);
  std::vector<std::int32_t> results, taken;
  std::vector<Shape> shapes;
  Sweep sweep(tape, builder, request.by_sample, report);
  auto finish = [&](tape::Value input, const Shape& row_shape, const std::vector<std::size_t>& order) {
    shapes.emplace_back();
    if (!sweep.reached(input)) {
      results.push_back(-1);
      return;
    }
    const tape::Meta& meta = meta_of(tape, input);
    Shape axes = row_shape;
    axes.insert(axes.end(), meta.shape.begin(), meta.shape.end());
    Shape& shape = shapes.back();
    if (order.empty()) shape = axes;
    for (std::size_t a : order) shape.push_back(axes[a]);
    total_blocks += static_cast<std::int64_t>(sweep.result(input).size());
    results.push_back(sweep.array(sweep.result(input), shape, to_fused(meta.dtype), order, &taken));
  };

  switch (request.seed) {
    case Seed::gradient:
    case Seed::batched_gradient: {
      const bool batched = request.seed == Seed::batched_gradient;
      Shape row_shape;
      if (batched) {
        for (const Cotangent& cotangent : request.cotangents) {
          if (cotangent.given) row_shape = {cotangent.shape[0]};
        }
      }
      sweep.begin(row_shape, false);
      for (std::size_t i = 0; i < tape.outputs.size(); ++i) {
        const tape::Value output = tape.outputs[i];
        if (output.node < 0) continue;
        const tape::Meta& meta = meta_of(tape, output);
        Shape extents = row_shape;
        extents.insert(extents.end(), meta.shape.begin(), meta.shape.end());
        const std::size_t n = extents.size(), rows = row_shape.size();
        Block block{.extents = extents,
                    .value = {},
                    .row = {},
                    .col = {},
                    .row_shape = row_shape,
                    .col_shape = meta.shape,
                    .dtype = to_fused(meta.dtype)};
        for (std::size_t k = 0; k < n; ++k) (k < rows ? block.row : block.col).push_back(blocks::loop_coord(n, k));
        if (cotangent_slots[i] >= 0) {
          blocks::Read read{.slot = cotangent_slots[i], .axes = {}};
          for (std::size_t k = 0; k < n; ++k) read.axes.push_back(blocks::loop_coord(n, k).affine);
          block.value = blocks::Value{.expr = builder.pool().operand(0), .operands = {std::move(read)}};
        }
        blocks::normalize(block);
        sweep.seed(output, std::move(block));
      }
      sweep.run();
      for (const tape::Value& input : tape.inputs) finish(input, row_shape, {});
      break;
    }
    case Seed::jacobian: {
      for (const tape::Value& output : tape.outputs) {
        if (output.node < 0) {
          results.insert(results.end(), tape.inputs.size(), -1);
          shapes.resize(results.size());
          continue;
        }
        const tape::Meta& meta = meta_of(tape, output);
        sweep.begin(meta.shape, false);
        sweep.seed(output, blocks::identity(meta.shape, to_fused(meta.dtype)));
        sweep.run();
        for (const tape::Value& input : tape.inputs) finish(input, meta.shape, {});
      }
      break;
    }
    case Seed::batch_summed:
    case Seed::batch_tied: {
      const bool summed = request.seed == Seed::batch_summed;
      for (const tape::Value& output : tape.outputs) {
        if (output.node < 0) {
          results.insert(results.end(), tape.inputs.size(), -1);
          shapes.resize(results.size());
          continue;
        }
        const tape::Meta& meta = meta_of(tape, output);
        Block seed =
            summed ? summed_identity(meta.shape, to_fused(meta.dtype)) : blocks::identity(meta.shape, to_fused(meta.dtype));
        const Shape row_shape = seed.row_shape;
        sweep.begin(row_shape, !summed);
        sweep.seed(output, std::move(seed));
        sweep.run();
        for (const tape::Value& input : tape.inputs) {
          std::vector<std::size_t> order;
          const std::size_t rows = row_shape.size();
          const std::size_t cols = input.node < 0 ? 0 : meta_of(tape, input).shape.size();
          if (summed) {  // axes (out, B, in) -> (B, out, in)
            order.push_back(rows);
            for (std::size_t a = 0; a < rows; ++a) order.push_back(a);
            for (std::size_t a = 1; a < cols; ++a) order.push_back(rows + a);
          } else {  // axes (B, out, B, in) with equal samples -> (B, out, in)
            for (std::size_t a = 0; a < rows; ++a) order.push_back(a);
            for (std::size_t a = 1; a < cols; ++a) order.push_back(rows + a);
            if (sweep.reached(input)) {
              for (const Block& block : sweep.result(input)) {
                if (block.row[0] != block.col[0]) throw sweep.coupled();
              }
            }
          }
          finish(input, row_shape, order);
        }
      }
      break;
    }
  }
  for (std::int64_t loss : builder.losses()) total_densified += loss;
  blocks::Plan plan = std::move(builder).finish(std::move(results), std::move(shapes));
  plan.reads = sweep.reads_of_called();
  plan.none_is_zero = request.none_is_zero;
  if (std::string why = blocks::violation(plan); !why.empty()) {
    throw tape::Unsupported("a plan that leaves its slots: " + why);
  }
  check_calls(plan, tape);
  return plan;
}

}  // namespace wengert::accumulate
