#include "accumulate/steps.h"

#include <ATen/ATen.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/functorch/DynamicLayer.h>
#include <torch/csrc/autograd/function.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <typeindex>
#include <unordered_map>

#include "accumulate/execute.h"
#include "accumulate/sweep.h"

namespace wengert::accumulate {

namespace {

namespace functorch = at::functorch;

std::atomic<std::int64_t> matmul_count{0}, call_count{0}, take_count{0};

// One vmap level for the lifetime of the object.
class VmapLevel {
 public:
  explicit VmapLevel(std::int64_t batch)
      : level_(functorch::initAndPushDynamicLayer(functorch::TransformType::Vmap, c10::SymInt(batch),
                                                  functorch::RandomnessType::Error)) {}
  ~VmapLevel() { functorch::popDynamicLayerAndDeleteMetadata(); }
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
  std::int64_t level_;
};

// Warnings about missing batching rules are about our choice to batch, not about the user's code.
class Silence : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Node types that are called row by row: those whose batching rule in torch is wrong (2.13), and those that could not be batched
// (a numpy backward, compiled graphs, in-place tricks), which are remembered, so that they fail only once.
class RowOnly {
 public:
  bool contains(const torch::autograd::Node& fn) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto [at, fresh] = types_.try_emplace(std::type_index(typeid(fn)), When::never);
    if (fresh) at->second = known(fn.name());
    return at->second == When::always || (at->second == When::differentiable && at::GradMode::is_enabled());
  }
  void insert(const torch::autograd::Node& fn) {
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
    if (name == "NativeLayerNormBackward0" || name.starts_with("NativeBatchNorm")) return When::differentiable;
    return When::never;
  }

  std::mutex mutex_;
  std::unordered_map<std::type_index, When> types_;
};

RowOnly& row_only() {
  static RowOnly instance;
  return instance;
}

// What PyTorch's engine does to a node's result before it reaches the next node.
at::Tensor validated(at::Tensor grad, const torch::autograd::Edge& edge, bool none_is_zero) {
  const auto& metadata = edge.function->input_metadata(edge.input_nr);
  const std::vector<std::int64_t> shape = c10::asIntArrayRefUnchecked(metadata.shape_as_dim_vector()).vec();
  if (!grad.defined()) {
    // A plan cannot answer None, as PyTorch does where a node gives nothing: the call is PyTorch's then.
    if (!none_is_zero) throw tape::Unsupported("a node that gave no gradient for an input");
    return at::zeros(shape, metadata.options());
  }
  if (grad.sizes() != c10::IntArrayRef(shape)) {
    TORCH_CHECK(at::is_expandable_to(shape, grad.sizes()), edge.function->name(), " returned an invalid gradient: got ",
                grad.sizes(), " but expected shape compatible with ", c10::IntArrayRef(shape));
    grad = at::sum_to(std::move(grad), c10::IntArrayRef(shape));
  }
  const at::ScalarType dtype = c10::typeMetaToScalarType(metadata.dtype());
  if (grad.layout() != at::kStrided) throw tape::Unsupported(edge.function->name() + " receives a gradient that is not strided");
  // Programs read memory: lazily zero, conjugated or negated tensors have to be written out.
  if (grad._is_zerotensor()) return at::zeros(shape, metadata.options());
  if (grad.is_complex() && !at::isComplexType(dtype)) grad = at::real(grad);
  grad = grad.resolve_conj().resolve_neg();
  return grad.scalar_type() == dtype ? grad : grad.to(dtype);
}

// Plans hold complex values as pairs of reals, nodes want them complex.
at::Tensor as_node_wants(const at::Tensor& cotangent, const torch::autograd::InputMetadata& metadata) {
  const bool complex = at::isComplexType(c10::typeMetaToScalarType(metadata.dtype()));
  return complex ? at::view_as_complex(cotangent.contiguous()) : cotangent;
}

at::Tensor as_plan_wants(const at::Tensor& result) {
  return result.defined() && result.is_complex() ? at::view_as_real(result.resolve_conj()) : result;
}

std::vector<at::Tensor> call_once(const blocks::CallNode& step, const blocks::Plan& plan, const tape::Tape& tape,
                                  const std::vector<at::Tensor>& cotangents) {
  const tape::NodePtr& fn = tape.nodes[step.node].fn;
  torch::autograd::variable_list given(cotangents.begin(), cotangents.end());
  torch::autograd::variable_list got = (*fn)(std::move(given));
  std::vector<at::Tensor> results(step.results.size());
  for (std::size_t j = 0; j < step.results.size(); ++j) {
    if (step.results[j] < 0) continue;
    results[j] = validated(j < got.size() ? std::move(got[j]) : at::Tensor(), fn->next_edge(j), plan.none_is_zero);
  }
  return results;
}

std::vector<at::Tensor> call_batched(const blocks::CallNode& step, const blocks::Plan& plan, const tape::Tape& tape,
                                     const std::vector<at::Tensor>& cotangents, std::int64_t batch) {
  static Silence silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);
  VmapLevel level(batch);
  std::vector<at::Tensor> wrapped;
  for (const at::Tensor& cotangent : cotangents) wrapped.push_back(level.wrap(cotangent));
  std::vector<at::Tensor> results = call_once(step, plan, tape, wrapped);
  for (at::Tensor& result : results) result = level.unwrap(result, batch);
  return results;
}

std::vector<at::Tensor> call_rows(const blocks::CallNode& step, const blocks::Plan& plan, const tape::Tape& tape,
                                  const std::vector<at::Tensor>& cotangents, std::int64_t batch) {
  std::vector<std::vector<at::Tensor>> rows(step.results.size());
  for (std::int64_t r = 0; r < batch; ++r) {
    std::vector<at::Tensor> row;
    for (const at::Tensor& cotangent : cotangents) row.push_back(cotangent.defined() ? cotangent.select(0, r) : cotangent);
    std::vector<at::Tensor> got = call_once(step, plan, tape, row);
    for (std::size_t j = 0; j < got.size(); ++j) {
      if (got[j].defined()) rows[j].push_back(std::move(got[j]));
    }
  }
  std::vector<at::Tensor> results(step.results.size());
  for (std::size_t j = 0; j < rows.size(); ++j) {
    if (!rows[j].empty()) results[j] = at::stack(rows[j]);
  }
  return results;
}

// A view's base is one more tensor on the same storage.
bool owns_its_memory(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  if (tensor.use_count() != 1 || !storage.resizable()) return false;
  return tensor.is_view() ? tensor._base().use_count() == 1 && storage.use_count() == 2 : storage.use_count() == 1;
}

}  // namespace

blocks::Matmul unscaled(const blocks::Matmul& step) {
  blocks::Matmul out = step;
  out.scale.reset();
  const auto rows = std::ranges::find_if(out.batch, [&](std::size_t loop) { return !step.b.moves(loop); });
  out.m.insert(out.m.begin(), rows, out.batch.end());
  out.batch.erase(rows, out.batch.end());
  return out;
}

std::vector<std::size_t> matmul_axes(const blocks::Matmul& step, bool left) {
  std::vector<std::size_t> axes = step.batch;
  const auto& second = left ? step.m : step.k;
  const auto& third = left ? step.k : step.n;
  axes.insert(axes.end(), second.begin(), second.end());
  axes.insert(axes.end(), third.begin(), third.end());
  return axes;
}

at::Tensor matmul(const blocks::Matmul& step, const blocks::Shape& shape, const at::Tensor& a, const at::Tensor& b) {
  auto size = [&](const std::vector<std::size_t>& loops) {
    std::int64_t product = 1;
    for (std::size_t k : loops) product *= step.extents[k];
    return product;
  };
  const std::int64_t batch = size(step.batch), m = size(step.m), n = size(step.n), k = size(step.k);
  const at::Tensor product = step.batch.empty() ? at::mm(a.reshape({m, k}), b.reshape({k, n}))
                                                : at::bmm(a.reshape({batch, m, k}), b.reshape({batch, k, n}));
  return product.view(shape);
}

at::Tensor take(const at::Tensor& source, const at::Tensor& index) {
  return source.reshape(-1).index_select(0, index.reshape(-1)).view(index.sizes());
}

at::Tensor result(at::Tensor tensor, const blocks::Shape& shape, Strides strides) {
  // A backward written by the user may have recorded a graph where none is wanted.
  if (tensor.requires_grad() && !at::GradMode::is_enabled()) tensor = tensor.detach();
  const bool fits = strides == Strides::dense ? tensor.is_non_overlapping_and_dense() : tensor.is_contiguous();
  if (!fits) {
    tensor = tensor.clone(at::MemoryFormat::Contiguous);
  } else if (!owns_its_memory(tensor)) {
    tensor = tensor.clone(at::MemoryFormat::Preserve);
  }
  return tensor.sizes() == at::IntArrayRef(shape) ? tensor : tensor.reshape(shape);
}

void count_matmul() { ++matmul_count; }
void count_take() { ++take_count; }
StepCounts step_counts() { return {.matmuls = matmul_count, .node_calls = call_count, .takes = take_count}; }
void reset_step_counts() { matmul_count = call_count = take_count = 0; }

std::vector<at::Tensor> call_node(const blocks::CallNode& step, const blocks::Plan& plan, const tape::Tape& tape,
                                  std::vector<at::Tensor> cotangents) {
  const torch::autograd::Node& fn = *tape.nodes[step.node].fn;
  if (step.batch == 0) {
    ++call_count;
    for (std::size_t o = 0; o < cotangents.size(); ++o) {
      if (cotangents[o].defined()) cotangents[o] = as_node_wants(cotangents[o], fn.input_metadata(o));
    }
    std::vector<at::Tensor> results = call_once(step, plan, tape, cotangents);
    for (at::Tensor& result : results) result = as_plan_wants(result);
    return results;
  }
  std::int64_t batch = 1;
  blocks::Shape lead;
  for (std::size_t o = 0; o < cotangents.size(); ++o) {
    if (!cotangents[o].defined()) continue;
    const blocks::Shape& shape = plan.slots[step.cotangents[o]].shape;
    lead.assign(shape.begin(), shape.begin() + step.batch);
    batch = blocks::numel(lead);
    cotangents[o] = as_node_wants(cotangents[o].flatten(0, static_cast<std::int64_t>(step.batch) - 1), fn.input_metadata(o));
  }
  std::vector<at::Tensor> results;
  bool rows = batch == 1 || row_only().contains(fn), failed = false;
  if (!rows) {
    try {
      results = call_batched(step, plan, tape, cotangents, batch);
      ++call_count;
    } catch (const tape::Unsupported&) {
      throw;
    } catch (const std::exception&) {
      // If the node is at fault the row-wise call raises the same error again; if batching was, it succeeds.
      rows = failed = true;
    }
  }
  if (rows) {
    call_count += batch;
    results = call_rows(step, plan, tape, cotangents, batch);
    // All custom Functions share one type (which torch does not export), so one of them says nothing about the others.
    if (failed && std::strstr(typeid(fn).name(), "PyNode") == nullptr) row_only().insert(fn);
  }
  for (std::size_t j = 0; j < results.size(); ++j) {
    if (!results[j].defined()) continue;
    blocks::Shape shape = lead;
    results[j] = as_plan_wants(results[j]);
    shape.insert(shape.end(), results[j].sizes().begin() + 1, results[j].sizes().end());
    results[j] = results[j].reshape(shape);
  }
  return results;
}

}  // namespace wengert::accumulate
