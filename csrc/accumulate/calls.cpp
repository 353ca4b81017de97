#include "accumulate/calls.h"

#include <ATen/ATen.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/functorch/DynamicLayer.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <typeindex>
#include <unordered_map>

#include "accumulate/convolution.h"
#include "accumulate/steps.h"
#include "common/fork_safe_mutex.h"
#include "ops/fused.h"
#include "tape/custom.h"
#include "tape/pass.h"

namespace wengert::accumulate {

namespace {

namespace functorch = at::functorch;

// What a called node reads and writes at a time.  A convolution's rows are 2 to 3 times faster in such portions than all at once.
constexpr double kBytesAtOnce = 2 << 20;

// One vmap level for the lifetime of the object.
class VmapLevel {
 public:
  explicit VmapLevel(std::int64_t batch)
      : depth_(functorch::getDynamicLayerStack().size()),
        level_(functorch::initAndPushDynamicLayer(functorch::TransformType::Vmap, c10::SymInt(batch),
                                                  functorch::RandomnessType::Error)) {}
  // An interrupt in PyTorch's Python code may leave layers of its own on top, or have taken this one off.
  ~VmapLevel() {
    while (functorch::getDynamicLayerStack().size() > depth_) functorch::popDynamicLayerAndDeleteMetadata();
  }
  VmapLevel(const VmapLevel&) = delete;
  VmapLevel& operator=(const VmapLevel&) = delete;

  at::Tensor wrap(const at::Tensor& tensor) const {
    return tensor.defined() ? functorch::makeBatched(tensor, 0, level_) : tensor;
  }
  // The tensor with the batch axis first; one that does not depend on the batch is repeated.
  at::Tensor unwrap(const at::Tensor& tensor, std::int64_t batch) const {
    if (!tensor.defined()) return tensor;
    const functorch::BatchedTensorImpl* impl = functorch::maybeGetBatchedImpl(tensor);
    if (impl == nullptr || impl->level() != level_) return tensor.unsqueeze(0).expand(with_batch(tensor.sizes(), batch));
    return impl->value().movedim(impl->bdim(), 0);
  }

 private:
  static std::vector<std::int64_t> with_batch(at::IntArrayRef sizes, std::int64_t batch) {
    std::vector<std::int64_t> out{batch};
    out.insert(out.end(), sizes.begin(), sizes.end());
    return out;
  }
  const std::size_t depth_;  // of the stack below
  const std::int64_t level_;
};

// Warnings about missing batching rules are about our choice to batch, not about the user's code.
class Silence : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Node types that are called row by row: those whose batching rule in torch is wrong (2.13), and those that could not be batched
// (a numpy backward, compiled graphs, in-place tricks), which are remembered, so that they fail only once.
class RowOnly {
 public:
  // All custom Functions written in Python share one type, so one of them says nothing about the others.
  bool contains(const torch::autograd::Node& fn) {
    if (tape::is_custom(fn)) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    const auto [at, fresh] = types_.try_emplace(std::type_index(typeid(fn)), When::never);
    if (fresh) at->second = known(fn.name());
    return at->second == When::always || (at->second == When::differentiable && at::GradMode::is_enabled());
  }
  void insert(const torch::autograd::Node& fn) {
    if (tape::is_custom(fn)) return;
    std::lock_guard<std::mutex> lock(mutex_);
    types_[std::type_index(typeid(fn))] = When::always;
  }

 private:
  enum class When : std::uint8_t { never, differentiable, always };

  static When known(const std::string& name) {
    // jacrev of cdist disagrees with the row loop.
    if (name == "CdistBackward0") return When::always;
    // The weight's gradient is taken from the saved mean and deviation, which have no history: its derivative in the data is
    // wrong.
    if (name == "NativeLayerNormBackward0" || name.find("BatchNorm") != std::string::npos) return When::differentiable;
    return When::never;
  }

  common::ForkSafeMutex mutex_;
  std::unordered_map<std::type_index, When> types_;
};

RowOnly& row_only() {
  static auto* instance = new RowOnly;  // never destroyed: threads may outlive static destructors
  return *instance;
}
[[maybe_unused]] const RowOnly& made_at_load = row_only();  // see common::ForkSafeMutex

// Plans hold complex values as pairs of reals, nodes want them complex.
at::Tensor as_node_wants(const at::Tensor& cotangent, const torch::autograd::InputMetadata& metadata) {
  const bool complex = at::isComplexType(c10::typeMetaToScalarType(metadata.dtype()));
  return complex ? at::view_as_complex(cotangent.contiguous()) : cotangent;
}

// Programs read memory: lazily zero, conjugated or negated tensors have to be written out.
at::Tensor as_plan_wants(const at::Tensor& result) {
  if (!result.defined()) return result;
  if (result._is_zerotensor()) return as_plan_wants(at::zeros(result.sizes(), result.options()));
  const at::Tensor own = result.resolve_conj().resolve_neg();
  return own.is_complex() ? at::view_as_real(own) : own;
}

// By edges of the node.
std::vector<bool> wanted(const blocks::CallNode& step) {
  std::vector<bool> wanted;
  for (const std::int32_t slot : step.results) wanted.push_back(slot >= 0);
  return wanted;
}

// One node of the tape, for some of its edges.
class Callee {
 public:
  Callee(torch::autograd::Node& fn, std::vector<bool> wanted) : fn_(fn), wanted_(std::move(wanted)) {}

  std::vector<at::Tensor> once(torch::autograd::variable_list cotangents) const {
    return in_pass([&] { return gradients(std::move(cotangents)); });
  }

  std::vector<at::Tensor> batched(const std::vector<at::Tensor>& cotangents, std::int64_t batch) const {
    return in_pass([&] {
      Silence silence;
      c10::WarningUtils::WarningHandlerGuard guard(&silence);
      VmapLevel level(batch);
      std::vector<at::Tensor> wrapped;
      for (const at::Tensor& cotangent : cotangents) wrapped.push_back(level.wrap(cotangent));
      std::vector<at::Tensor> results = gradients(std::move(wrapped));
      for (at::Tensor& result : results) result = level.unwrap(result, batch);
      return results;
    });
  }

  // The same, some rows at a time.
  std::vector<at::Tensor> batched(const std::vector<at::Tensor>& cotangents, std::int64_t batch, std::int64_t rows) const {
    if (rows >= batch) return batched(cotangents, batch);
    std::vector<at::Tensor> results(wanted_.size());
    for (std::int64_t first = 0; first < batch; first += rows) {
      const std::int64_t count = std::min(rows, batch - first);
      std::vector<at::Tensor> part;
      for (const at::Tensor& cotangent : cotangents)
        part.push_back(cotangent.defined() ? cotangent.narrow(0, first, count) : cotangent);
      std::vector<at::Tensor> got = batched(part, count);
      for (std::size_t j = 0; j < got.size(); ++j) {
        if (!got[j].defined()) continue;
        if (!results[j].defined()) {
          std::vector<std::int64_t> shape = got[j].sizes().vec();
          shape[0] = batch;
          results[j] = at::zeros(shape, got[j].options());
        }
        results[j].narrow(0, first, count).copy_(got[j]);
      }
    }
    return results;
  }

  std::vector<at::Tensor> by_rows(const std::vector<at::Tensor>& cotangents, std::int64_t batch) const {
    std::vector<std::vector<at::Tensor>> rows(wanted_.size());
    for (std::int64_t r = 0; r < batch; ++r) {
      std::vector<at::Tensor> row;
      for (const at::Tensor& cotangent : cotangents) row.push_back(cotangent.defined() ? cotangent.select(0, r) : cotangent);
      std::vector<at::Tensor> got = once(std::move(row));
      for (std::size_t j = 0; j < got.size(); ++j) rows[j].push_back(std::move(got[j]));
    }
    std::vector<at::Tensor> results(wanted_.size());
    for (std::size_t j = 0; j < rows.size(); ++j) {
      const auto some = std::ranges::find_if(rows[j], &at::Tensor::defined);
      if (some == rows[j].end()) continue;
      const at::Tensor zeros = std::ranges::all_of(rows[j], &at::Tensor::defined) ? at::Tensor() : at::zeros_like(*some);
      for (at::Tensor& row : rows[j]) row = row.defined() ? row : zeros;
      results[j] = at::stack(rows[j]);
    }
    return results;
  }

 private:
  // A node that is not asked for all of its gradients has to be in a pass, which says so; within another pass it would be asked
  // for what that one wants.  Every call has one of its own, as every row of PyTorch's has: what a checkpoint computes again it
  // gives once a pass.  Custom Functions share that of their plan.
  template <class F>
  std::vector<at::Tensor> in_pass(const F& f) const {
    if (tape::is_custom(fn_) || !(tape::inside_pass() || tape::Wanted::are_some(fn_, wanted_))) return f();
    std::vector<at::Tensor> results;
    tape::in_own_pass(/*keep_graph=*/true, [&] { results = f(); });
    return results;
  }

  // What PyTorch's engine makes of the node's result before it reaches the next nodes.  Undefined where it is not wanted, or
  // where the node gives nothing.
  std::vector<at::Tensor> gradients(torch::autograd::variable_list cotangents) const {
    const tape::Wanted guard(fn_, wanted_);
    torch::autograd::variable_list got = fn_(std::move(cotangents));
    torch::autograd::validate_outputs(
        fn_.next_edges(), got, [this](const std::string& what) { return "Function " + fn_.name() + " returned an " + what; });
    for (std::size_t j = 0; j < got.size(); ++j) {
      if (!wanted_[j]) {
        got[j].reset();
      } else if (got[j].defined() && got[j].layout() != at::kStrided) {
        throw tape::Unsupported(fn_.name() + " gives a gradient that is not strided");
      }
    }
    return got;
  }

  torch::autograd::Node& fn_;
  std::vector<bool> wanted_;
};

// How many rows go through a node at a time.  With a graph every call would be nodes of its own, and code of the user's is not
// run more often than in PyTorch.
std::int64_t rows_at_once(const torch::autograd::Node& fn, const std::vector<at::Tensor>& cotangents,
                          const blocks::CallNode& step, const blocks::Plan& plan, std::int64_t batch) {
  if (at::GradMode::is_enabled() || tape::is_custom(fn)) return batch;
  double bytes = 0;
  for (const at::Tensor& cotangent : cotangents) {
    if (!cotangent.defined()) continue;
    if (!cotangent.is_cpu()) return batch;
    bytes += static_cast<double>(cotangent.numel() * cotangent.element_size());
  }
  for (const std::int32_t slot : step.results) {
    if (slot < 0) continue;
    const blocks::Slot& result = plan.slots[slot];
    bytes += static_cast<double>(blocks::numel(result.shape)) *
             static_cast<double>(c10::elementSize(ops::to_scalar_type(result.dtype)));
  }
  return within_caches(bytes, batch);
}

// Results are undefined where the node gives nothing.
std::vector<at::Tensor> call(const blocks::CallNode& step, const blocks::Plan& plan, const common::NodePtr& node,
                             std::vector<bool> wanted, std::vector<at::Tensor> cotangents) {
  torch::autograd::Node& fn = *node;
  if (wanted[0] && cotangents.size() == 1 && cotangents[0].defined()) {
    std::int64_t calls = 0;
    if (at::Tensor data = convolution_gradient(node, cotangents[0], calls); data.defined()) {
      count_calls(calls);
      wanted[0] = false;
      std::vector<at::Tensor> results(wanted.size());
      if (std::ranges::find(wanted, true) != wanted.end())
        results = call(step, plan, node, std::move(wanted), std::move(cotangents));
      results[0] = std::move(data);
      return results;
    }
  }
  const Callee callee(fn, std::move(wanted));
  std::int64_t batch = 1;
  blocks::Shape lead;
  for (std::size_t o = 0; o < cotangents.size(); ++o) {
    if (!cotangents[o].defined()) continue;
    if (step.batch > 0) {
      lead.assign(cotangents[o].sizes().begin(), cotangents[o].sizes().begin() + step.batch);
      batch = blocks::numel(lead);
      cotangents[o] = cotangents[o].flatten(0, static_cast<std::int64_t>(step.batch) - 1);
    }
    cotangents[o] = as_node_wants(cotangents[o], fn.input_metadata(o));
  }
  std::vector<at::Tensor> results;
  if (step.batch == 0) {
    count_calls(1);
    results = callee.once(std::move(cotangents));
    std::ranges::transform(results, results.begin(), as_plan_wants);
    return results;
  }
  bool rows = batch == 1 || row_only().contains(fn), failed = false;
  if (!rows) {
    try {
      const std::int64_t at_once = rows_at_once(fn, cotangents, step, plan, batch);
      results = callee.batched(cotangents, batch, at_once);
      count_calls((batch + at_once - 1) / at_once);
    } catch (const tape::Unsupported&) {
      throw;
    } catch (const std::exception& error) {
      // If the node is at fault the row-wise call raises the same error again; if batching was, it succeeds.
      if (!tape::may_retry(error)) throw;
      rows = failed = true;
    }
  }
  if (rows) {
    count_calls(batch);
    results = callee.by_rows(cotangents, batch);
    if (failed) row_only().insert(fn);
  }
  for (at::Tensor& result : results) {
    if (!result.defined()) continue;
    result = as_plan_wants(result);
    blocks::Shape shape = lead;
    shape.insert(shape.end(), result.sizes().begin() + 1, result.sizes().end());
    result = result.reshape(shape);
  }
  return results;
}

}  // namespace

std::int64_t within_caches(double bytes, std::int64_t rows, std::int64_t least) {
  const auto parts = static_cast<std::int64_t>(std::ceil(bytes / kBytesAtOnce));
  return parts <= 1 ? rows : std::max((rows + parts - 1) / parts, least);
}

Calls::~Calls() { forget(); }

std::vector<at::Tensor> Calls::operator()(const blocks::CallNode& step, const blocks::Plan& plan,
                                          std::vector<at::Tensor> cotangents) {
  const common::NodePtr& node = tape_.nodes[step.node].fn;
  torch::autograd::Node& fn = *node;
  std::vector<at::Tensor> results;
  const bool custom = tape_.custom && tape::is_custom(fn), known = custom && next_ < made_.size();
  std::vector<bool> asked = wanted(step);
  for (const GaveNothing& call : disconnected_) {
    if (call.node != step.node) continue;
    for (const std::size_t edge : call.edges) asked[edge] = true;
  }
  results = known ? replayed(step, plan) : call(step, plan, node, asked, cotangents);
  const auto gave_nothing = [&] {
    GaveNothing nothing{step.node, {}};
    for (std::size_t j = 0; j < step.results.size(); ++j) {
      if (step.results[j] >= 0 && !results[j].defined()) nothing.edges.push_back(j);
    }
    return nothing;
  };
  GaveNothing nothing = gave_nothing();
  if (!nothing.edges.empty() && !step.zeros.empty()) {
    // Along those edges zeros may give zeros.
    fill_zeros(step, plan, cotangents);
    results = call(step, plan, node, asked, cotangents);
    nothing = gave_nothing();
  }
  for (std::size_t j = 0; j < step.results.size(); ++j) {
    if (asked[j] && step.results[j] < 0 && results[j].defined()) throw GaveSomething();
  }
  if (custom && !known && !(nothing.edges.empty() && is_last(step, plan))) {
    made_.push_back({step.node, results});
    ++next_;
  }
  if (nothing.edges.empty()) return results;
  const auto arrives_elsewhere = [&](std::size_t edge) {
    const auto gives = [&](const blocks::Step& other) {
      const auto* call = std::get_if<blocks::CallNode>(&other);
      return call != nullptr && call->node == step.node && call->results[edge] >= 0;
    };
    return std::ranges::count_if(plan.steps, gives) > 1 || std::ranges::binary_search(plan.reads, std::pair(step.node, edge));
  };
  if (std::ranges::none_of(nothing.edges, arrives_elsewhere)) throw nothing;
  // Another call, or what is read of another output, may well give something, and PyTorch's sum of both would be that.
  if (!plan.none_is_zero) throw tape::Unsupported("a node that gave no gradient for an input");
  for (const std::size_t j : nothing.edges) {
    const blocks::Slot& slot = plan.slots[step.results[j]];
    results[j] = at::zeros(slot.shape, at::TensorOptions().dtype(ops::to_scalar_type(slot.dtype)).device(tape_.device));
  }
  return results;
}

void Calls::fill_zeros(const blocks::CallNode& step, const blocks::Plan& plan, std::vector<at::Tensor>& cotangents) const {
  const auto live = std::ranges::find_if(step.cotangents, [](std::int32_t slot) { return slot >= 0; });
  const blocks::Shape& some = plan.slots[*live].shape;
  for (const std::int32_t o : step.zeros) {
    const tape::Meta& meta = tape_.nodes[step.node].outputs[o];
    blocks::Shape shape(some.begin(), some.begin() + static_cast<std::ptrdiff_t>(step.batch));
    shape.insert(shape.end(), meta.shape.begin(), meta.shape.end());
    cotangents[o] = at::zeros(shape, at::TensorOptions().dtype(meta.dtype).device(tape_.device));
  }
}

// No custom Function is called after it: nobody will ask for its results again.
bool Calls::is_last(const blocks::CallNode& step, const blocks::Plan& plan) const {
  const auto last = std::find_if(plan.steps.rbegin(), plan.steps.rend(), [this](const blocks::Step& other) {
    const auto* call = std::get_if<blocks::CallNode>(&other);
    return call != nullptr && tape::is_custom(*tape_.nodes[call->node].fn);
  });
  return last != plan.steps.rend() && std::get_if<blocks::CallNode>(&*last) == &step;
}

std::vector<at::Tensor> Calls::replayed(const blocks::CallNode& step, const blocks::Plan& plan) {
  const Made& made = made_[next_++];
  bool same = made.node == step.node;
  for (std::size_t j = 0; same && j < step.results.size(); ++j) {
    if (step.results[j] < 0 || !made.results[j].defined()) continue;
    same = made.results[j].sizes() == at::IntArrayRef(plan.slots[step.results[j]].shape);
  }
  if (!same) throw tape::Unsupported("a custom Function that gave no gradient for an input");
  return made.results;
}

void Calls::disconnect(const GaveNothing& call) {
  const std::size_t before = custom_reached();
  take_off(call);
  if (custom_reached() != before) throw tape::Unsupported("a custom Function below one that gave no gradient");
  next_ = 0;
}

void Calls::take_off(const GaveNothing& call) {
  for (const std::size_t edge : call.edges) {
    tape::Value& value = tape_.nodes[call.node].inputs[edge];
    taken_off_.emplace_back(&value, std::exchange(value, tape::Value()));
  }
  disconnected_.push_back(call);
}

std::optional<std::vector<GaveNothing>> Calls::lessons(const blocks::Plan& plan) const {
  const auto is_called = [&](const GaveNothing& nothing) {
    return std::ranges::any_of(plan.steps, [&](const blocks::Step& step) {
      const auto* call = std::get_if<blocks::CallNode>(&step);
      return call != nullptr && call->node == nothing.node;
    });
  };
  if (disconnected_.empty() || tape_.custom || !std::ranges::all_of(disconnected_, is_called)) return std::nullopt;
  return disconnected_;
}

void Calls::begin_with(const std::vector<GaveNothing>& lessons) {
  for (const GaveNothing& call : lessons) take_off(call);
}

void Calls::forget() {
  for (const auto& [place, value] : taken_off_) *place = value;
  taken_off_.clear();
  disconnected_.clear();
}

std::size_t Calls::custom_reached() const {
  std::vector<bool> reached(tape_.nodes.size(), false);
  for (const tape::Value& output : tape_.outputs) {
    if (output.node >= 0) reached[output.node] = true;
  }
  std::size_t count = 0;
  for (std::size_t n = 0; n < tape_.nodes.size(); ++n) {
    if (!reached[n]) continue;
    count += tape::is_custom(*tape_.nodes[n].fn);
    for (const tape::Value& input : tape_.nodes[n].inputs) {
      if (input.node >= 0) reached[input.node] = true;
    }
  }
  return count;
}

}  // namespace wengert::accumulate
