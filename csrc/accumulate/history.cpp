#include "accumulate/history.h"

#include <ATen/Functions.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <map>
#include <set>
#include <typeinfo>

#include "ops/fused_autograd.h"
#include "ops/tether.h"

namespace wengert::accumulate {

namespace {

namespace autograd = torch::autograd;
using autograd::Edge;

Edge edge_of(const at::Tensor& tensor) { return tensor.requires_grad() ? autograd::impl::gradient_edge(tensor) : Edge(); }

// The edges on which a cotangent of this output may go on; all, but for our own nodes, which compute several results at once.
std::vector<bool> onwards(const Edge& edge) {
  autograd::Node& fn = *edge.function;
  std::vector<bool> all(fn.num_outputs(), true);
  if (const auto* fused = dynamic_cast<const ops::FusedBackward*>(&fn)) {
    const auto effect = ops::effects(fused->program_);
    for (std::size_t k = 0; k < all.size(); ++k) all[k] = (*effect)[edge.input_nr * all.size() + k];
  }
  if (dynamic_cast<ops::TetherBackward*>(&fn) != nullptr) {
    for (std::uint32_t k = 0; k < fn.num_inputs(); ++k) all[k] = k == edge.input_nr;
  }
  return all;
}

// What PyTorch warns of it warns of in the user's own calls, and what it saves meanwhile is nothing to the user's hooks.
class Unnoticed : c10::WarningHandler {
 public:
  Unnoticed() : guard_(this), without_hooks_(at::SavedTensorDefaultHooks::set_tracing(true)) {}
  ~Unnoticed() override { at::SavedTensorDefaultHooks::set_tracing(without_hooks_); }
  Unnoticed(const Unnoticed&) = delete;
  Unnoticed& operator=(const Unnoticed&) = delete;

 private:
  void process(const c10::Warning&) override {}
  c10::WarningUtils::WarningHandlerGuard guard_;
  bool without_hooks_;
};

bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

// The number of the first of equal ends, for each; -1 for what does not require grad.
std::vector<std::int32_t> numbered(const std::vector<Edge>& ends) {
  std::map<std::pair<autograd::Node*, std::uint32_t>, std::int32_t> first;
  std::vector<std::int32_t> numbers;
  for (const Edge& end : ends) {
    const auto number = static_cast<std::int32_t>(numbers.size());
    numbers.push_back(end.is_valid() ? first.try_emplace({end.function.get(), end.input_nr}, number).first->second : -1);
  }
  return numbers;
}

// Hooks would see a gradient that nobody asked for.
bool has_hooks(autograd::Node& fn) { return !fn.tensor_pre_hooks().empty() || !fn.retains_grad_hooks().empty(); }

// Ends that a tensor's graph leads to, and whether a gradient is certain to arrive at each.
struct Reach {
  std::set<std::int32_t> ends;
  bool certain = true;
};

// Whether a gradient goes on along every edge of `onwards`: nodes of PyTorch may give none, even for their only edge.
bool feeds_all(const autograd::Node& fn) {
  return dynamic_cast<const ops::FusedBackward*>(&fn) != nullptr || dynamic_cast<const ops::TetherBackward*>(&fn) != nullptr;
}

class EndEdges {
 public:
  explicit EndEdges(const std::vector<Edge>& ends) : edges_(ends) {
    const std::vector<std::int32_t> numbers = numbered(ends);
    for (std::size_t k = 0; k < ends.size(); ++k) {
      if (numbers[k] == static_cast<std::int32_t>(k))
        numbers_.emplace(std::pair(ends[k].function.get(), ends[k].input_nr), numbers[k]);
    }
  }

  const Edge& at(std::int32_t end) const { return edges_[end]; }

  // Those the tensor leads to.
  Reach reached_from(const at::Tensor& tensor) const {
    Reach reach;
    walk({edge_of(tensor)}, [&](const Edge& edge) {
      const auto end = numbers_.find({edge.function.get(), edge.input_nr});
      if (end == numbers_.end()) {
        reach.certain = reach.certain && feeds_all(*edge.function);
        return true;
      }
      reach.ends.insert(end->second);
      return false;
    });
    return reach;
  }

  // Those of the ends that receive a gradient from the tensors: a node need not give one for everything it leads to.
  std::vector<std::int32_t> receiving(const std::vector<at::Tensor>& tensors, const std::vector<std::int32_t>& ends) const {
    std::vector<std::int32_t> out, asked;
    for (const std::int32_t end : ends) (has_hooks(*at(end).function) ? out : asked).push_back(end);
    if (asked.empty()) return out;
    const Unnoticed unnoticed;
    autograd::variable_list ones;
    autograd::edge_list from, to;
    for (const at::Tensor& tensor : tensors) {
      ones.push_back(at::ones_like(tensor));
      from.push_back(edge_of(tensor));
    }
    for (const std::int32_t end : asked) to.push_back(at(end));
    try {
      const auto found = autograd::Engine::get_default_engine().execute(from, ones, /*keep_graph=*/true, /*create_graph=*/false,
                                                                        /*accumulate_grad=*/false, to);
      for (std::size_t k = 0; k < asked.size(); ++k) {
        if (found[k].defined()) out.push_back(asked[k]);
      }
    } catch (const c10::Error&) {  // there is no derivative of this derivative
    }
    std::ranges::sort(out);
    return out;
  }

 private:
  // Calls f with every edge that can be arrived at; goes on beyond those where it says so.
  template <class F>
  static void walk(std::vector<Edge> stack, F f) {
    std::set<std::pair<const autograd::Node*, std::uint32_t>> seen;
    std::reverse(stack.begin(), stack.end());
    while (!stack.empty()) {
      const Edge edge = std::move(stack.back());
      stack.pop_back();
      if (!edge.is_valid() || !f(edge)) continue;
      if (!seen.emplace(edge.function.get(), edge.input_nr).second) continue;
      const std::vector<bool> follow = onwards(edge);
      for (std::size_t k = follow.size(); k-- > 0;) {
        if (follow[k]) stack.push_back(edge.function->next_edge(k));
      }
    }
  }

  const std::vector<Edge>& edges_;
  std::map<std::pair<autograd::Node*, std::uint32_t>, std::int32_t> numbers_;
};

// PyTorch's answers, or none where it cannot give them: ours are then taken as they are.
template <class F>
Counterparts asked(const Question& question, F f) {
  if (!std::ranges::all_of(question.inputs, [](const at::Tensor& input) { return input.requires_grad(); })) return {};
  const Unnoticed unnoticed;
  const autograd::AutoGradMode with_grad(true);
  try {
    return f();
  } catch (const c10::Error&) {
    return {};
  }
}

// The gradient of the tensor's first element.
std::vector<at::Tensor> first_row(const at::Tensor& tensor, at::TensorList inputs) {
  if (!requires_grad(tensor) || tensor.numel() == 0) return std::vector<at::Tensor>(inputs.size());
  return autograd::grad({tensor.reshape(-1)[0]}, inputs.vec(), {}, true, true, true);
}

Counterparts by_pairs(const std::vector<std::vector<at::Tensor>>& rows, std::size_t width, bool at_once) {
  Counterparts out;
  for (const std::vector<at::Tensor>& row : rows) {
    for (std::size_t j = 0; j < width; ++j) {
      out.emplace_back();
      if (at_once) {  // one tensor for each input, which is split
        for (const std::vector<at::Tensor>& other : rows) out.back().push_back(other[j]);
      } else {
        out.back().push_back(row[j]);
      }
    }
  }
  return out;
}

// What each tensor reaches. Those that lead to the same ends are tried together, as one pass tells of all of them; only leaves
// are tried, since a pass to what lies behind another end would run that end's node, which nobody has looked at.
std::vector<std::set<std::int32_t>> ends_of(const EndEdges& edges, const std::vector<at::Tensor>& tensors, bool confirm) {
  std::vector<std::set<std::int32_t>> out(tensors.size());
  std::map<std::set<std::int32_t>, std::vector<std::size_t>> uncertain;
  for (std::size_t r = 0; r < tensors.size(); ++r) {
    if (!tensors[r].defined()) continue;
    Reach reach = edges.reached_from(tensors[r]);
    const auto is_leaf = [&](std::int32_t end) { return edges.at(end).function->num_outputs() == 0; };
    if (confirm && !reach.certain && std::ranges::all_of(reach.ends, is_leaf)) uncertain[reach.ends].push_back(r);
    out[r] = std::move(reach.ends);
  }
  for (const auto& [ends, alike] : uncertain) {
    std::vector<at::Tensor> group;
    for (const std::size_t r : alike) group.push_back(tensors[r]);
    const std::vector<std::int32_t> found = edges.receiving(group, {ends.begin(), ends.end()});
    for (const std::size_t r : alike) out[r] = {found.begin(), found.end()};
  }
  return out;
}

}  // namespace

History::History(const Question& question, const Counterparts& theirs, const std::vector<at::Tensor>& ours, bool confirm) {
  const EndEdges edges(question.ends);
  const std::vector<std::set<std::int32_t>> reached = ends_of(edges, ours, confirm);
  std::map<std::vector<std::int32_t>, std::vector<std::int32_t>> groups;
  for (std::size_t r = 0; r < theirs.size(); ++r) {
    std::set<std::int32_t> wanted;
    for (const at::Tensor& tensor : theirs[r]) {
      if (requires_grad(tensor)) wanted.merge(edges.reached_from(tensor).ends);
    }
    const bool has = std::ranges::any_of(theirs[r], requires_grad);
    const std::int32_t result = static_cast<std::int32_t>(r);
    if (!ours[r].defined()) {
      if (!has || question.rows.empty()) continue;
      absent_.push_back(result);
    }
    if (!has) {
      const bool none = std::ranges::none_of(theirs[r], [](const at::Tensor& tensor) { return tensor.defined(); });
      if (ours[r].requires_grad() && (none || reached[r].empty())) detached_.push_back(result);
      continue;
    }
    std::vector<std::int32_t> missing;
    std::ranges::set_difference(wanted, reached[r], std::back_inserter(missing));
    if (!missing.empty() || !ours[r].defined() || !ours[r].requires_grad()) groups[missing].push_back(result);
  }
  std::map<std::vector<std::int32_t>, std::vector<std::int32_t>> confirmed;
  for (const auto& [missing, results] : groups) {
    std::vector<at::Tensor> rows;
    for (const std::int32_t r : results) std::ranges::copy_if(theirs[r], std::back_inserter(rows), requires_grad);
    std::vector<std::int32_t>& same = confirmed[confirm ? edges.receiving(rows, missing) : missing];
    same.insert(same.end(), results.begin(), results.end());
  }
  for (auto& [ends, results] : confirmed) groups_.push_back({.results = results, .ends = ends});
}

void History::apply(const Question& question, std::vector<at::Tensor>& results) const {
  for (const std::int32_t r : absent_) {
    const std::int64_t width = std::ssize(question.inputs);
    const at::Tensor& input = question.inputs[r % width];
    std::vector<std::int64_t> shape = question.rows[r / width].sizes().vec();
    shape.insert(shape.end(), input.sizes().begin(), input.sizes().end());
    results[r] = at::zeros(shape, input.options());
  }
  for (const std::int32_t r : detached_) results[r] = results[r].detach();
  for (const Group& group : groups_) {
    std::vector<at::Tensor> loose;
    for (const std::int32_t r : group.results) loose.push_back(results[r]);
    std::vector<Edge> to;
    for (const std::int32_t end : group.ends) to.push_back(question.ends[end]);
    std::vector<at::Tensor> tied = ops::tether(loose, to);
    for (std::size_t k = 0; k < tied.size(); ++k) results[group.results[k]] = std::move(tied[k]);
  }
}

const History& HistoryMemo::get(const std::function<std::unique_ptr<History>()>& find) const {
  {
    const std::lock_guard lock(mutex_);
    if (history_) return *history_;
  }
  std::unique_ptr<const History> found = find();  // PyTorch is not asked under a lock
  const std::lock_guard lock(mutex_);
  if (!history_) history_ = std::move(found);
  return *history_;
}

Counterparts jacobian_rows(const Question& question, bool at_once) {
  return asked(question, [&] {
    std::vector<std::vector<at::Tensor>> rows;
    for (const at::Tensor& output : question.outputs) rows.push_back(first_row(output, question.inputs));
    return by_pairs(rows, question.inputs.size(), at_once);
  });
}

Counterparts gradient_rows(const Question& question, bool batched) {
  return asked(question, [&] {
    std::vector<at::Tensor> outputs, cotangents;
    for (std::size_t i = 0; i < question.outputs.size(); ++i) {
      if (!question.outputs[i].requires_grad()) continue;
      const bool given = i < question.cotangents.size() && question.cotangents[i].defined();
      if (batched && (!given || question.cotangents[i].size(0) == 0)) return Counterparts();
      outputs.push_back(question.outputs[i]);
      cotangents.push_back(!given ? at::Tensor() : batched ? question.cotangents[i].select(0, 0) : question.cotangents[i]);
    }
    Counterparts out;
    for (at::Tensor& gradient : autograd::grad(outputs, question.inputs.vec(), cotangents, true, true, true)) {
      out.push_back({std::move(gradient)});
    }
    return out;
  });
}

Counterparts hessian_rows(const Question& question, bool at_once) {
  return asked(question, [&] {
    std::vector<std::vector<at::Tensor>> rows;
    for (const at::Tensor& gradient : first_row(question.outputs[0], question.inputs))
      rows.push_back(first_row(gradient, question.inputs));
    return by_pairs(rows, question.inputs.size(), at_once);
  });
}

Counterparts own_columns(const std::vector<at::Tensor>& results, std::size_t width) {
  std::vector<std::vector<at::Tensor>> rows;
  for (auto row = results.begin(); row != results.end(); row += static_cast<std::ptrdiff_t>(width))
    rows.emplace_back(row, row + static_cast<std::ptrdiff_t>(width));
  return by_pairs(rows, width, /*at_once=*/true);
}

std::vector<Edge> ends(const tape::Tape& tape, at::TensorList inputs, at::TensorList cotangents) {
  std::vector<Edge> out;
  for (const at::Tensor& input : inputs) out.push_back(edge_of(input));
  for (const at::Tensor& cotangent : cotangents) out.push_back(edge_of(cotangent));
  for (const tape::Node& node : tape.nodes) {
    const auto on_tape = [](const tape::Value& value) { return value.node >= 0; };
    if (std::ranges::none_of(node.inputs, on_tape)) continue;  // an input itself
    for (std::size_t k = 0; k < node.inputs.size(); ++k) {
      const Edge& edge = node.fn->next_edge(k);
      if (edge.is_valid() && !on_tape(node.inputs[k])) out.push_back(edge);
    }
  }
  return out;
}

void sign_edges(const tape::Tape& tape, const std::vector<Edge>& ends, common::KeyWriter& key) {
  for (const tape::Node& node : tape.nodes) {
    key.room(node.fn->num_outputs());
    for (const Edge& edge : node.fn->next_edges()) key.put(edge.is_valid());
  }
  const std::vector<std::int32_t> numbers = numbered(ends);
  key.room(key.length(numbers));
  key.put(numbers);
}

}  // namespace wengert::accumulate
