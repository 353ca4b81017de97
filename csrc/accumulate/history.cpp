#include "accumulate/history.h"

#include <ATen/Functions.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <compare>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <tuple>
#include <utility>

#include "common/node_ptr.h"
#include "ops/fused_autograd.h"
#include "tape/custom.h"

namespace wengert::accumulate {

namespace {

namespace autograd = torch::autograd;
using autograd::Edge;

Edge edge_of(const at::Tensor& tensor) { return tensor.requires_grad() ? autograd::impl::gradient_edge(tensor) : Edge(); }

bool differentiates_a_convolution(const autograd::Node& fn) {
  return dynamic_cast<const autograd::generated::ConvolutionBackwardBackward0*>(&fn) != nullptr;
}

// The edges on which a cotangent of this output may go on: all, but for those of nodes that compute several results at once,
// wengert::fused and the derivatives of a convolution.
std::vector<bool> onwards(const Edge& edge) {
  const autograd::Node& fn = *edge.function;
  if (const auto* fused = dynamic_cast<const ops::FusedBackward*>(&fn)) return fused->onwards(edge.input_nr);
  std::vector<bool> all(fn.num_outputs(), true);
  if (differentiates_a_convolution(fn)) {  // linear in the cotangent, the data and the weight: each derivative has two of them
    all[1] = edge.input_nr == 1;
    all[2] = edge.input_nr == 0;
  }
  return all;
}

// What PyTorch warns of it warns of in the user's own calls, and what it saves meanwhile is nothing to the user's hooks.  Nodes
// may have hooks of their own, as checkpointing does while it computes again.
class Unnoticed : c10::WarningHandler {
 public:
  Unnoticed() : guard_(this) {
    if (!at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true)) return;
    users_ = at::SavedTensorDefaultHooks::get_tls_state();
    at::SavedTensorDefaultHooks::set_tls_state({});
  }
  ~Unnoticed() override {
    if (users_) at::SavedTensorDefaultHooks::set_tls_state(*users_);
  }
  Unnoticed(const Unnoticed&) = delete;
  Unnoticed& operator=(const Unnoticed&) = delete;

 private:
  void process(const c10::Warning&) override {}
  c10::WarningUtils::WarningHandlerGuard guard_;
  std::optional<at::impl::SavedTensorDefaultHooksTLS> users_;
};

bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

// The number of the first of equal ends, for each; -1 for what does not require grad.
std::vector<std::int32_t> numbered(const Edges& ends) {
  std::map<std::pair<autograd::Node*, std::uint32_t>, std::int32_t> first;
  std::vector<std::int32_t> numbers;
  for (const Edge& end : ends) {
    const auto number = static_cast<std::int32_t>(numbers.size());
    numbers.push_back(end.is_valid() ? first.try_emplace({end.function.get(), end.input_nr}, number).first->second : -1);
  }
  return numbers;
}

// A node with a lower number than this leads to none of the ends.
std::uint64_t least(const Edges& ends) {
  std::uint64_t number = std::numeric_limits<std::uint64_t>::max();
  for (const Edge& end : ends) {
    if (end.is_valid()) number = std::min(number, common::topological_nr(*end.function));
  }
  return number;
}

// Some of the ends, by number.
class EndSet {
 public:
  bool contains(std::int32_t end) const { return word(end) < words_.size() && (words_[word(end)] >> (end % 64) & 1) != 0; }
  bool contains(const EndSet& other) const {
    for (std::size_t w = 0; w < other.words_.size(); ++w) {
      if ((other.words_[w] & ~(w < words_.size() ? words_[w] : 0)) != 0) return false;
    }
    return true;
  }
  void insert(std::int32_t end) {
    if (word(end) >= words_.size()) words_.resize(word(end) + 1);
    words_[word(end)] |= std::uint64_t{1} << (end % 64);
  }
  void erase(std::int32_t end) {
    if (!contains(end)) return;
    words_[word(end)] &= ~(std::uint64_t{1} << (end % 64));
    while (!words_.empty() && words_.back() == 0) words_.pop_back();
  }
  void merge(const EndSet& other) {
    if (words_.size() < other.words_.size()) words_.resize(other.words_.size());
    for (std::size_t w = 0; w < other.words_.size(); ++w) words_[w] |= other.words_[w];
  }
  std::vector<std::int32_t> without(const EndSet& other) const {
    std::vector<std::int32_t> out;
    for (std::size_t w = 0; w < words_.size(); ++w) {
      std::uint64_t left = words_[w] & ~(w < other.words_.size() ? other.words_[w] : 0);
      for (; left != 0; left &= left - 1) out.push_back(static_cast<std::int32_t>(64 * w) + std::countr_zero(left));
    }
    return out;
  }
  std::vector<std::int32_t> list() const { return without({}); }
  bool empty() const { return words_.empty(); }
  auto operator<=>(const EndSet&) const = default;

 private:
  static std::size_t word(std::int32_t end) { return static_cast<std::size_t>(end) / 64; }
  std::vector<std::uint64_t> words_;  // the last one is not zero
};

// Ends that a tensor's graph leads to, and whether a gradient is certain to arrive at each.
struct Reach {
  std::shared_ptr<const EndSet> ends = nothing();
  bool certain = true;

  // Both; what is the same is shared, as most nodes of a graph lead where their only successor does.
  void merge(const Reach& other) {
    certain = certain && other.certain;
    if (ends == other.ends || ends->contains(*other.ends)) return;
    if (other.ends->contains(*ends)) {
      ends = other.ends;
      return;
    }
    EndSet both = *ends;
    both.merge(*other.ends);
    ends = std::make_shared<const EndSet>(std::move(both));
  }

 private:
  static const std::shared_ptr<const EndSet>& nothing() {
    static const auto* empty = new std::shared_ptr<const EndSet>(std::make_shared<const EndSet>());
    return *empty;
  }
};

// Whether a gradient goes on along every edge of `onwards`.  Of PyTorch's nodes those of its table do whose operator has one
// output, and the derivatives of a convolution: others may give none.
bool feeds_all(const autograd::Node& fn) {
  if (dynamic_cast<const ops::FusedBackward*>(&fn) != nullptr || dynamic_cast<const ops::TetherBackward*>(&fn) != nullptr) {
    return true;
  }
  if (differentiates_a_convolution(fn)) return true;
  return fn.num_inputs() == 1 && dynamic_cast<const autograd::TraceableFunction*>(&fn) != nullptr;
}

// Nodes that may be run to ask about each of some tensors alone; where it were more, one pass has to tell of all.
constexpr std::size_t kMostRuns = 1 << 17;

class EndEdges {
 public:
  explicit EndEdges(const Edges& ends) : edges_(ends) {
    const std::vector<std::int32_t> numbers = numbered(ends);
    for (std::size_t k = 0; k < ends.size(); ++k) {
      if (numbers[k] != static_cast<std::int32_t>(k)) continue;
      const auto place = std::pair(ends[k].function.get(), ends[k].input_nr);
      numbers_.emplace(place, numbers[k]);
      EndSet itself;
      itself.insert(numbers[k]);
      reached_[place].ends = std::make_shared<const EndSet>(std::move(itself));
    }
    least_ = least(ends);
  }

  const Edge& at(std::int32_t end) const { return edges_[end]; }

  // Whether so many tensors may be asked about one by one, in a pass for each.
  bool may_ask(std::size_t tensors) const { return tensors * reached_.size() <= kMostRuns; }

  // Those the tensor leads to.
  const Reach& reached_from(const at::Tensor& tensor) {
    struct Frame {
      Edge edge;
      std::vector<bool> follow;
      std::size_t next;
    };
    std::vector<Frame> stack;
    const Edge root = edge_of(tensor);
    if (const Reach* known = look_up(root)) return *known;
    stack.push_back({root, onwards(root), 0});
    for (;;) {
      Frame& frame = stack.back();
      if (frame.next < frame.follow.size()) {
        const std::size_t k = frame.next++;
        if (!frame.follow[k]) continue;
        const Edge& edge = frame.edge.function->next_edge(k);
        if (look_up(edge) == nullptr) stack.push_back({edge, onwards(edge), 0});  // which may move the frame
        continue;
      }
      Reach reach;
      reach.certain = feeds_all(*frame.edge.function);
      for (std::size_t k = 0; k < frame.follow.size(); ++k) {
        if (frame.follow[k]) reach.merge(*look_up(frame.edge.function->next_edge(k)));
      }
      const Reach& made = reached_[{frame.edge.function.get(), frame.edge.input_nr}] = std::move(reach);
      stack.pop_back();
      if (stack.empty()) return made;
    }
  }

  // Those of some ends that a pass can be asked about: that do not lie behind another, as the pass would run the other's node,
  // which nobody has looked at.
  std::vector<std::int32_t> askable(EndSet ends) const {
    std::vector<Edge> beyond;
    for (const std::int32_t end : ends.list()) {
      const autograd::edge_list& next = at(end).function->next_edges();
      beyond.insert(beyond.end(), next.begin(), next.end());
    }
    walk(std::move(beyond), [&](const Edge& edge) {
      const auto end = numbers_.find({edge.function.get(), edge.input_nr});
      if (end != numbers_.end()) ends.erase(end->second);
      return true;
    });
    return ends.list();
  }

  // Those of the ends, to which the tensors lead, that receive no gradient from them all the same, as far as can be asked: a node
  // need not give one for everything it leads to.
  std::vector<std::int32_t> deprived(const std::vector<at::Tensor>& tensors, const EndSet& ends) const {
    std::vector<std::int32_t> asked = askable(ends);
    // Hooks would see a gradient that nobody asked for.
    std::erase_if(asked, [&](std::int32_t end) { return tape::has_tensor_hooks(*at(end).function); });
    if (asked.empty()) return {};
    const Unnoticed unnoticed;
    autograd::variable_list ones;
    autograd::edge_list from, to;
    for (const at::Tensor& tensor : tensors) {
      ones.push_back(at::ones_like(tensor));
      from.push_back(edge_of(tensor));
    }
    for (const std::int32_t end : asked) to.push_back(at(end));
    try {  // with a graph: without one some nodes give zeros for what they leave out with one (native_group_norm's, from 2.14 on)
      const auto found = autograd::Engine::get_default_engine().execute(from, ones, /*keep_graph=*/true, /*create_graph=*/true,
                                                                        /*accumulate_grad=*/false, to);
      std::vector<std::int32_t> out;
      for (std::size_t k = 0; k < asked.size(); ++k) {
        if (!found[k].defined()) out.push_back(asked[k]);
      }
      return out;
    } catch (const std::exception& error) {  // there is no derivative of this derivative
      if (!tape::may_retry(error)) throw;
      return asked;
    }
  }

 private:
  // What an edge leads to, as far as that is known without a walk.
  const Reach* look_up(const Edge& edge) const {
    static const Reach none;
    if (!edge.is_valid() || common::topological_nr(*edge.function) < least_) return &none;
    const auto found = reached_.find({edge.function.get(), edge.input_nr});
    return found != reached_.end() ? &found->second : nullptr;
  }

  // Calls f with every edge that can be arrived at; goes on beyond those where it says so.
  template <class F>
  void walk(std::vector<Edge> stack, F f) const {
    std::set<std::pair<const autograd::Node*, std::uint32_t>> seen;
    std::reverse(stack.begin(), stack.end());
    while (!stack.empty()) {
      const Edge edge = std::move(stack.back());
      stack.pop_back();
      if (!edge.is_valid() || common::topological_nr(*edge.function) < least_ || !f(edge)) continue;
      if (!seen.emplace(edge.function.get(), edge.input_nr).second) continue;
      const std::vector<bool> follow = onwards(edge);
      for (std::size_t k = follow.size(); k-- > 0;) {
        if (follow[k]) stack.push_back(edge.function->next_edge(k));
      }
    }
  }

  const Edges& edges_;
  std::map<std::pair<autograd::Node*, std::uint32_t>, std::int32_t> numbers_;
  std::map<std::pair<autograd::Node*, std::uint32_t>, Reach> reached_;  // by edges met so far; an end leads to itself
  std::uint64_t least_;
};

// Where the question of the result is known.
const ops::TetherBackward* with_origin(const autograd::Node& fn) {
  const auto* tether = dynamic_cast<const ops::TetherBackward*>(&fn);
  return tether != nullptr && tether->source.origin && tether->source.origin->is_known() ? tether : nullptr;
}

const Provenance& provenance(const ops::TetherBackward& tether) { return static_cast<const Provenance&>(*tether.source.origin); }

// Of every node met from some edges on, whether it leads to one of the others; not through results of ours unless `through`.
class Ways {
 public:
  Ways(const Edges& from, const Edges& to, bool through) : to_(to), through_(through), least_(least(to)) {
    for (const Edge& edge : from) arrives_ = meet(edge) || arrives_;
  }
  bool arrive() const { return arrives_; }
  bool lead(autograd::Node* fn) const {
    const auto found = leads_.find(fn);
    return found != leads_.end() && found->second;
  }
  std::size_t size() const { return leads_.size(); }
  template <class F>
  void each_node(F f) const {
    for (const auto& [fn, leads] : leads_) f(*fn, leads);
  }

 private:
  bool is_end(const Edge& edge) const { return std::ranges::find(to_, edge) != to_.end(); }

  bool meet(const Edge& root) {
    if (!root.is_valid()) return false;
    struct Frame {
      autograd::Node* fn;
      std::uint32_t edge;
    };
    std::vector<Frame> stack;
    const auto enter = [&](autograd::Node* fn) {
      if (common::topological_nr(*fn) < least_) return;
      if (leads_.try_emplace(fn, false).second && (through_ || with_origin(*fn) == nullptr)) stack.push_back({fn, 0});
    };
    enter(root.function.get());
    while (!stack.empty()) {
      Frame& frame = stack.back();
      autograd::Node* fn = frame.fn;
      if (frame.edge < fn->num_outputs()) {
        const Edge& edge = fn->next_edge(frame.edge++);
        if (edge.is_valid()) enter(edge.function.get());  // which may move the frame
        continue;
      }
      leads_[fn] = std::ranges::any_of(
          fn->next_edges(), [&](const Edge& edge) { return edge.is_valid() && (is_end(edge) || lead(edge.function.get())); });
      stack.pop_back();
    }
    return is_end(root) || lead(root.function.get());
  }

  const Edges& to_;
  bool through_, arrives_ = false;
  std::uint64_t least_;
  std::map<autograd::Node*, bool> leads_;
};

autograd::variable_list run_engine(const Edges& from, const autograd::variable_list& cotangents, const Edges& to) {
  return autograd::Engine::get_default_engine().execute(from, cotangents, /*keep_graph=*/true, /*create_graph=*/true,
                                                        /*accumulate_grad=*/false, to);
}

// Nodes that may be looked at behind results of ours, each time they are.  A history that takes more is left as it is: its
// question would take longer than what was asked for.
constexpr std::size_t kMostNodes = 1 << 13;

// The state of a question and of those that it leads to: what PyTorch has in the place of the results of earlier calls, asked for
// once each.
struct Asking {
  std::map<std::int64_t, Counterparts> known;  // by number
  std::size_t nodes = 0;
  bool behind = false;  // results of ours

  void look_at(std::size_t more) {
    if (behind) TORCH_CHECK((nodes += more) <= kMostNodes, "a history that is too long");
  }
};
Counterparts answer(const Question& question, Asking& asking);

void add_to(at::Tensor& sum, const at::Tensor& part) {
  if (part.defined()) sum = sum.defined() ? sum + part : part;
}

// What PyTorch computes, with what it has computed in the place of results of ours.  Values do not count, only histories do.
autograd::variable_list gradient(const Edges& from, const autograd::variable_list& cotangents, const Edges& to, Asking& asking) {
  struct Waiting {
    std::shared_ptr<const Question> question;
    std::int64_t number, result;
    at::Tensor cotangent;
  };
  // Results of ours that were arrived at, the latest first: none of them leads to one that was asked for later, so that each is
  // gone on from once, with all that arrives at it.
  std::map<std::pair<std::int64_t, std::int64_t>, Waiting, std::greater<>> waiting;
  autograd::variable_list sums(to.size());
  const auto pass = [&](const Edges& roots, const autograd::variable_list& given) {
    const Ways all(roots, to, true), own(roots, to, false);
    asking.look_at(all.size());
    all.each_node([](autograd::Node& fn, bool leads) {
      TORCH_CHECK(!leads || !(tape::is_custom(fn) || tape::has_tensor_hooks(fn)), "code of the user's");
    });
    Edges results;
    std::vector<const ops::TetherBackward*> tethers;
    own.each_node([&](autograd::Node& fn, bool) {
      if (const auto* tether = with_origin(fn); tether != nullptr && all.lead(&fn)) {
        tethers.push_back(tether);
        results.emplace_back(common::share(&fn), 0);
      }
    });
    if (results.empty() || own.arrive()) {
      const autograd::variable_list parts = run_engine(roots, given, to);
      for (std::size_t j = 0; j < to.size(); ++j) add_to(sums[j], parts[j]);
    }
    if (results.empty()) return;
    const autograd::variable_list arriving = run_engine(roots, given, results);
    for (std::size_t k = 0; k < tethers.size(); ++k) {
      if (!arriving[k].defined()) continue;
      const Provenance& origin = provenance(*tethers[k]);
      const std::int64_t number = origin.number(), result = tethers[k]->source.result;
      Waiting& place = waiting.try_emplace({number, result}, origin.question(), number, result, at::Tensor()).first->second;
      TORCH_CHECK(place.question, "a question that was forgotten meanwhile");
      add_to(place.cotangent, arriving[k]);
    }
  };
  pass(from, cotangents);
  const bool before = std::exchange(asking.behind, true);
  while (!waiting.empty()) {
    const Waiting next = std::move(waiting.extract(waiting.begin()).mapped());
    auto theirs = asking.known.find(next.number);
    if (theirs == asking.known.end()) theirs = asking.known.emplace(next.number, answer(*next.question, asking)).first;
    for (const at::Tensor& tensor : theirs->second[next.result]) {
      if (!requires_grad(tensor)) continue;
      pass({edge_of(tensor)}, {next.cotangent.sum().to(tensor.scalar_type()).expand(tensor.sizes())});  // it may be a row of many
    }
  }
  asking.behind = before;
  return sums;
}

// The gradient of the first element of what the edge stands for.
autograd::variable_list first_row(const Edge& edge, const Edges& to, Asking& asking) {
  if (!edge.is_valid()) return autograd::variable_list(to.size());
  const at::Tensor cotangent = edge.function->input_metadata(edge.input_nr).zeros_like();
  if (cotangent.numel() == 0) return autograd::variable_list(to.size());
  cotangent.view(-1).select(0, 0).fill_(1);
  return gradient({edge}, {cotangent}, to, asking);
}

Counterparts by_pairs(const std::vector<autograd::variable_list>& rows, std::size_t width, bool at_once) {
  Counterparts out;
  for (const autograd::variable_list& row : rows) {
    for (std::size_t j = 0; j < width; ++j) {
      out.emplace_back();
      if (at_once) {  // one tensor for each input, which is split
        for (const autograd::variable_list& other : rows) out.back().push_back(other[j]);
      } else {
        out.back().push_back(row[j]);
      }
    }
  }
  return out;
}

// What each tensor reaches. Of those that lead to the same ends, one pass tells what none of them reaches.
std::vector<std::shared_ptr<const EndSet>> ends_of(EndEdges& edges, const std::vector<at::Tensor>& tensors, bool confirm) {
  std::vector<std::shared_ptr<const EndSet>> out;
  std::map<EndSet, std::vector<std::size_t>> uncertain;
  for (std::size_t r = 0; r < tensors.size(); ++r) {
    const Reach reach = tensors[r].defined() ? edges.reached_from(tensors[r]) : Reach();
    if (confirm && !reach.certain) uncertain[*reach.ends].push_back(r);
    out.push_back(reach.ends);
  }
  for (const auto& [ends, alike] : uncertain) {
    const auto left = [&](const std::vector<at::Tensor>& group) {
      EndSet reached = ends;
      for (const std::int32_t end : edges.deprived(group, ends)) reached.erase(end);
      return std::make_shared<const EndSet>(std::move(reached));
    };
    if (edges.may_ask(alike.size())) {
      for (const std::size_t r : alike) out[r] = left({tensors[r]});
      continue;
    }
    std::vector<at::Tensor> group;
    for (const std::size_t r : alike) group.push_back(tensors[r]);
    const auto shared = left(group);
    for (const std::size_t r : alike) out[r] = shared;
  }
  return out;
}

Counterparts answer(const Question& question, Asking& asking) {
  using Of = Question::Of;
  const auto& [outputs, inputs, cotangents] = std::tie(question.outputs, question.inputs, question.cotangents);
  TORCH_CHECK(std::ranges::all_of(inputs, &Edge::is_valid), "inputs that do not require grad");
  std::vector<autograd::variable_list> rows;
  if (question.of == Of::jacobian) {
    for (const Edge& output : outputs) rows.push_back(first_row(output, inputs, asking));
  } else if (question.of == Of::hessian) {
    for (const at::Tensor& tensor : first_row(outputs[0], inputs, asking))
      rows.push_back(first_row(tensor.defined() ? edge_of(tensor) : Edge(), inputs, asking));
  } else {
    const bool batched = question.of == Of::batched_gradient;
    Edges from;
    autograd::variable_list given;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (!outputs[i].is_valid()) continue;
      const bool has = i < cotangents.size() && cotangents[i].given;
      TORCH_CHECK(!batched || (has && cotangents[i].shape[0] != 0), "a batch without a first row");
      from.push_back(outputs[i]);
      given.push_back(!has      ? outputs[i].function->input_metadata(outputs[i].input_nr).zeros_like().fill_(1)
                      : batched ? cotangents[i].stand_in().select(0, 0)
                                : cotangents[i].stand_in());
    }
    rows.push_back(gradient(from, given, inputs, asking));
  }
  return by_pairs(rows, inputs.size(), question.at_once);
}

}  // namespace

Counterparts counterparts(const Question& question) {
  const Unnoticed unnoticed;
  const autograd::AutoGradMode with_grad(true);
  Asking asking;
  try {
    return answer(question, asking);
  } catch (const std::exception& error) {  // ours are then taken as they are
    if (!tape::may_retry(error)) throw;
    return {};
  }
}

History::History(const Edges& ends, const Counterparts& theirs, const std::vector<at::Tensor>& ours, bool confirm)
    : ties_(ours.size()) {
  EndEdges edges(ends);
  const std::vector<std::shared_ptr<const EndSet>> reached = ends_of(edges, ours, confirm);
  struct Group {
    std::vector<std::int32_t> results;
    EndSet wanted;
  };
  std::map<std::vector<std::int32_t>, Group> groups;  // of results that lack the same
  for (std::size_t r = 0; r < theirs.size(); ++r) {
    Reach reach;
    for (const at::Tensor& tensor : theirs[r]) {
      if (requires_grad(tensor)) reach.merge(edges.reached_from(tensor));
    }
    const EndSet& wanted = *reach.ends;
    const bool has = std::ranges::any_of(theirs[r], requires_grad);
    const std::int32_t result = static_cast<std::int32_t>(r);
    if (!ours[r].defined() && has) absent_.push_back(result);
    if (!has) {
      const bool none = std::ranges::none_of(theirs[r], [](const at::Tensor& tensor) { return tensor.defined(); });
      if (requires_grad(ours[r]) && (none || reached[r]->empty())) detached_.push_back(result);
      continue;
    }
    const std::vector<std::int32_t> missing = wanted.without(*reached[r]);
    if (missing.empty() && requires_grad(ours[r])) continue;
    Group& group = groups[missing];
    group.results.push_back(result);
    group.wanted.merge(wanted);
  }
  for (const auto& [missing, group] : groups) {
    const auto tie = [&](std::span<const std::int32_t> results) {
      std::vector<at::Tensor> rows;
      for (const std::int32_t r : results) std::ranges::copy_if(theirs[r], std::back_inserter(rows), requires_grad);
      const std::vector<std::int32_t> deprived = confirm ? edges.deprived(rows, group.wanted) : std::vector<std::int32_t>();
      std::vector<std::int32_t> ends = missing;
      std::erase_if(ends, [&](std::int32_t end) { return std::ranges::binary_search(deprived, end); });
      for (const std::int32_t r : results) ties_[r] = {.any = true, .ends = ends};
    };
    const std::span<const std::int32_t> results = group.results;
    if (!edges.may_ask(results.size())) {
      tie(results);
    } else {
      for (std::size_t r = 0; r < results.size(); ++r) tie(results.subspan(r, 1));
    }
  }
}

void History::apply(std::vector<at::Tensor>& results, const Edges& ends, const std::vector<tape::Shape>& rows,
                    at::TensorList inputs, const std::shared_ptr<const ops::Origin>& origin) const {
  if (!rows.empty()) {
    for (const std::int32_t r : absent_) {
      const at::Tensor& input = inputs[r % std::ssize(inputs)];
      tape::Shape shape = rows[r / std::ssize(inputs)];
      shape.insert(shape.end(), input.sizes().begin(), input.sizes().end());
      results[r] = at::zeros(shape, input.options());
    }
  }
  for (const std::int32_t r : detached_) results[r] = results[r].detach();
  for (std::size_t r = 0; r < results.size(); ++r) {
    if (!results[r].defined() || !(ties_[r].any || (origin && results[r].requires_grad()))) continue;
    Edges to;
    for (const std::int32_t end : ties_[r].ends) to.push_back(ends[end]);
    results[r] = ops::tether(results[r], to, {.origin = origin, .result = static_cast<std::int64_t>(r)});
  }
}

HistoryMemo::HistoryMemo()
    : structure_([] {
        static std::atomic<std::int64_t> made = 0;
        return made++;
      }()) {}

HistoryMemo::~HistoryMemo() { delete history_.load(); }

void HistoryMemo::use(const std::function<std::unique_ptr<const History>()>& find, const std::function<bool()>& lasts,
                      const std::function<void(const History&)>& uses) const {
  if (const History* known = history_.load(std::memory_order_acquire)) return uses(*known);
  std::unique_ptr<const History> found = find();  // which may take long: another thread may be first
  if (!lasts()) return uses(*found);
  const History* first = nullptr;
  if (history_.compare_exchange_strong(first, found.get(), std::memory_order_acq_rel)) first = found.release();
  uses(*first);
}

Counterparts own_columns(const std::vector<at::Tensor>& results, std::size_t width) {
  std::vector<std::vector<at::Tensor>> rows;
  for (auto row = results.begin(); row != results.end(); row += static_cast<std::ptrdiff_t>(width))
    rows.emplace_back(row, row + static_cast<std::ptrdiff_t>(width));
  return by_pairs(rows, width, /*at_once=*/true);
}

Edges ends(const tape::Tape& tape, at::TensorList inputs, at::TensorList cotangents, std::vector<std::int64_t>& behind) {
  Edges out = edges_of(inputs);
  for (const at::Tensor& cotangent : cotangents) out.push_back(edge_of(cotangent));
  std::set<const ops::Origin*> origins;
  for (const tape::Node& node : tape.nodes) {
    const auto on_tape = [](const tape::Value& value) { return value.node >= 0; };
    if (std::ranges::none_of(node.inputs, on_tape)) continue;  // an input itself
    if (const auto* tether = with_origin(*node.fn); tether != nullptr && origins.insert(tether->source.origin.get()).second) {
      if (const auto question = provenance(*tether).question()) {
        out.insert(out.end(), question->ends.begin(), question->ends.end());
        behind.push_back(provenance(*tether).number());
      }
    }
    for (std::size_t k = 0; k < node.inputs.size(); ++k) {
      const Edge& edge = node.fn->next_edge(k);
      if (edge.is_valid() && !on_tape(node.inputs[k])) out.push_back(edge);
    }
  }
  return out;
}

void sign_edges(const tape::Tape& tape, const Edges& ends, common::Key& key) {
  for (const tape::Node& node : tape.nodes) {
    common::KeyPart edges(key, node.fn->num_outputs());
    for (const Edge& edge : node.fn->next_edges()) edges.put(edge.is_valid());
  }
  const std::vector<std::int32_t> numbers = numbered(ends);
  common::KeyPart(key, common::length_in_key(numbers)).put(numbers);
}

}  // namespace wengert::accumulate
