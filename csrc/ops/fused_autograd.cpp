#include "ops/fused_autograd.h"

#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <numeric>
#include <span>
#include <stdexcept>

#include "common/budget.h"
#include "common/fork_safe_mutex.h"
#include "common/lru.h"
#include "common/node_ptr.h"
#include "fused/footprint.h"
#include "ops/fused.h"

namespace wengert::ops {

namespace ag = torch::autograd;

namespace {

constexpr std::uint32_t kBackwards = 0, kForwards = 1, kEffects = 2;

// A program with what is asked about it; holding the program keeps its address its own.
struct Question {
  std::shared_ptr<const fused::Program> program;
  std::vector<std::uint32_t> words;
  bool operator==(const Question&) const = default;
};

struct QuestionHash {
  std::size_t operator()(const Question& question) const {
    std::size_t hash = std::hash<const void*>()(question.program.get());
    for (std::uint32_t word : question.words) hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
    return hash ^ (hash >> 32);
  }
};

class DerivedCache {
 public:
  template <class Build>
  std::shared_ptr<const DerivedProgram> get(Question question, Build build) {
    {
      std::lock_guard lock(mutex_);
      if (const auto* found = entries_.find(question)) return *found;
    }
    std::shared_ptr<const DerivedProgram> derived;
    try {
      derived = std::make_shared<const DerivedProgram>(build());
    } catch (const std::domain_error& error) {
      TORCH_CHECK_NOT_IMPLEMENTED(false, "wengert::fused: ", error.what());
    }
    std::size_t bytes = sizeof(Question) + question.words.capacity() * sizeof(std::uint32_t) + sizeof(DerivedProgram) +
                        fused::footprint(*question.program);
    bytes += derived->effects.capacity() / 8;
    for (const DerivedProgram::Part& part : derived->parts) {
      bytes += sizeof part + part.text.capacity() + (part.operands.capacity() + part.results.capacity()) * sizeof(std::int32_t);
    }
    std::lock_guard lock(mutex_);
    return entries_.insert(std::move(question), std::move(derived), bytes);
  }
  std::size_t bytes() {
    std::lock_guard lock(mutex_);
    return entries_.bytes();
  }
  void clear() {
    std::lock_guard lock(mutex_);
    entries_.clear();
  }

 private:
  common::ForkSafeMutex mutex_;
  common::Lru<Question, std::shared_ptr<const DerivedProgram>, QuestionHash> entries_{common::derived_budget()};
};

// Never destroyed: threads may outlive static destructors.
DerivedCache& derived_cache() {
  static auto* instance = new DerivedCache;
  return *instance;
}
[[maybe_unused]] const DerivedCache& made_at_load = derived_cache();  // see common::ForkSafeMutex

std::vector<fused::ExprId> leaves(fused::ExprPool& pool, int count) {
  std::vector<fused::ExprId> ids;
  for (int i = 0; i < count; ++i) ids.push_back(pool.operand(i));
  return ids;
}

// Axes along which the operand was broadcast over the nest (where the extent is 1 too, summing is the identity).
std::uint32_t broadcast_axes(const at::Tensor& operand) {
  std::uint32_t mask = 0;
  for (int k = 0; k < operand.dim(); ++k) mask |= static_cast<std::uint32_t>(operand.sym_size(k) == 1) << k;
  return mask;
}

std::vector<std::uint32_t> broadcast_axes(at::TensorList operands) {
  std::vector<std::uint32_t> masks;
  masks.reserve(operands.size());
  for (const at::Tensor& operand : operands) masks.push_back(broadcast_axes(operand));
  return masks;
}

bool is_floating(fused::Dtype dtype) { return dtype <= fused::Dtype::f16; }

// One output of a derivative, and what it belongs to.
struct DerivedOutput {
  fused::OutputSpec spec;
  std::int32_t result;
};

// A program with these outputs of `pool`, over as few of its leaves as give the nest the same extents.  `broadcast`: per leaf.
DerivedProgram::Part part_of(const fused::ExprPool& pool, const fused::Program& program, std::span<const DerivedOutput> outputs,
                             std::span<const std::uint32_t> broadcast) {
  std::vector<bool> used(broadcast.size(), false);
  for (const DerivedOutput& output : outputs) {
    for (std::int32_t leaf : pool.operands(output.spec.expr)) used[leaf] = true;
  }
  std::uint32_t left = ~std::uint32_t{0};  // axes that no leaf in use gives an extent other than 1
  for (std::size_t i = 0; i < used.size(); ++i) left &= used[i] ? broadcast[i] : left;
  for (std::size_t i = 0; i < used.size(); ++i) {
    if ((left & ~broadcast[i]) == 0) continue;
    used[i] = true;
    left &= broadcast[i];
  }
  DerivedProgram::Part part;
  fused::ExprPool own;
  fused::ProgramSpec spec{.rank = program.rank(), .operands = 0, .compute = program.compute(), .outputs = {}};
  std::vector<fused::ExprId> renamed(used.size(), fused::kZero);
  for (std::size_t i = 0; i < used.size(); ++i) {
    if (!used[i]) continue;
    renamed[i] = own.operand(spec.operands++);
    part.operands.push_back(static_cast<std::int32_t>(i));
  }
  for (const DerivedOutput& output : outputs) {
    spec.outputs.push_back(output.spec);
    spec.outputs.back().expr = own.substitute(pool, output.spec.expr, renamed);
    part.results.push_back(output.result);
  }
  part.text = fused::to_text(own, spec);
  return part;
}

// A kernel of very many sums takes minutes to compile and does not fit its parameters; the interpreter reads operands once.
std::size_t most_outputs(at::TensorList operands) {
  constexpr std::size_t kMostInKernel = 16;
  const at::Device device = operands.empty() ? at::Device(at::kCPU) : operands[0].device();
  return device.is_cpu() && !can_launch(device) ? std::max<std::size_t>(operands.size(), 1) : kMostInKernel;
}

// The results of the parts where they belong; `tensors` are all that there are.
void evaluate(const DerivedProgram& derived, at::TensorList tensors, std::vector<at::Tensor>& results) {
  for (const DerivedProgram::Part& part : derived.parts) {
    std::vector<at::Tensor> operands;
    operands.reserve(part.operands.size());
    for (std::int32_t i : part.operands) operands.push_back(tensors[i]);
    std::vector<at::Tensor> values = fused(operands, part.text);
    for (std::size_t j = 0; j < values.size(); ++j) results[part.results[j]] = std::move(values[j]);
  }
}

}  // namespace

std::shared_ptr<const std::vector<bool>> effects(const std::shared_ptr<const fused::Program>& program) {
  const auto derived = derived_cache().get({program, {kEffects}}, [&] {
    fused::ExprPool pool;
    const std::size_t operands = program->operands();
    const std::vector<fused::ExprId> same = leaves(pool, program->operands());
    DerivedProgram out{.parts = {}, .effects = std::vector<bool>(program->outputs().size() * operands, false)};
    auto effect = out.effects.begin();
    for (const fused::OutputSpec& output : program->outputs()) {
      const fused::ExprId root = pool.substitute(program->pool(), output.expr, same);
      std::vector<bool> moves(root + 1, false);
      moves[root] = true;
      for (fused::ExprId id = root; id >= 0; --id) {  // users before arguments
        std::int32_t operand = 0;
        if (!moves[id] || pool.is_constant(id)) continue;
        if (pool.is_operand(id, &operand)) {
          effect[operand] = true;
          continue;
        }
        const std::vector<fused::ExprId> args(pool.args(id).begin(), pool.args(id).end());
        for (std::size_t a = 0; a < args.size(); ++a) {
          if (pool.partial(pool.prim(id), static_cast<int>(a), args, id) != fused::kZero) moves[args[a]] = true;
        }
      }
      effect += static_cast<std::ptrdiff_t>(operands);
    }
    return out;
  });
  return {derived, &derived->effects};
}

std::shared_ptr<const DerivedProgram> vjp_program(const std::shared_ptr<const fused::Program>& program, at::TensorList operands,
                                                  const std::vector<bool>& wanted, const std::vector<bool>& given,
                                                  std::size_t most_outputs) {
  std::vector<std::uint32_t> broadcast = broadcast_axes(operands), key{kBackwards};
  key.insert(key.end(), broadcast.begin(), broadcast.end());
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    key.push_back(wanted[i] ? 1 + static_cast<std::uint32_t>(to_dtype(operands[i].scalar_type())) : 0);
  }
  for (bool g : given) key.push_back(g);
  key.push_back(static_cast<std::uint32_t>(most_outputs));
  return derived_cache().get({program, std::move(key)}, [&] {
    fused::ExprPool pool;
    const std::vector<fused::ExprId> same = leaves(pool, program->operands());
    const std::uint32_t nest = std::accumulate(broadcast.begin(), broadcast.end(), ~std::uint32_t{0}, std::bit_and());
    std::vector<fused::ExprId> exprs, cotangents;
    for (std::size_t j = 0; j < given.size(); ++j) {
      if (!given[j]) continue;
      const fused::OutputSpec& output = program->outputs()[j];
      exprs.push_back(pool.substitute(program->pool(), output.expr, same));
      cotangents.push_back(pool.operand(static_cast<std::int32_t>(broadcast.size())));
      broadcast.push_back(nest | output.reduced);
    }
    std::vector<DerivedOutput> outputs;
    for (auto [operand, gradient] : pool.pullback(exprs, cotangents)) {
      if (operand >= program->operands() || !wanted[operand] || gradient == fused::kZero) continue;
      outputs.push_back({{gradient, to_dtype(operands[operand].scalar_type()), broadcast[operand]}, operand});
    }
    DerivedProgram derived;
    const std::size_t parts = (outputs.size() + most_outputs - 1) / most_outputs;
    for (std::size_t p = 0; p < parts; ++p) {
      const std::size_t first = p * outputs.size() / parts, last = (p + 1) * outputs.size() / parts;
      derived.parts.push_back(part_of(pool, *program, std::span(outputs).subspan(first, last - first), broadcast));
    }
    return derived;
  });
}

std::shared_ptr<const DerivedProgram> jvp_program(const std::shared_ptr<const fused::Program>& program, at::TensorList operands,
                                                  const std::vector<bool>& given) {
  std::vector<std::uint32_t> broadcast = broadcast_axes(operands), key{kForwards};
  key.insert(key.end(), broadcast.begin(), broadcast.end());
  key.insert(key.end(), given.begin(), given.end());
  return derived_cache().get({program, std::move(key)}, [&] {
    fused::ExprPool pool;
    const std::vector<fused::ExprId> same = leaves(pool, program->operands());
    std::vector<fused::ExprId> tangents;
    for (std::size_t i = 0; i < given.size(); ++i) {
      tangents.push_back(given[i] ? pool.operand(static_cast<std::int32_t>(broadcast.size())) : fused::kZero);
      if (given[i]) broadcast.push_back(broadcast[i]);
    }
    std::vector<DerivedOutput> outputs;
    for (std::size_t j = 0; j < program->outputs().size(); ++j) {
      fused::OutputSpec output = program->outputs()[j];
      if (!is_floating(output.dtype)) continue;
      output.expr = pool.pushforward(pool.substitute(program->pool(), output.expr, same), tangents);
      if (output.expr != fused::kZero) outputs.push_back({output, static_cast<std::int32_t>(j)});
    }
    DerivedProgram derived;
    if (!outputs.empty()) derived.parts.push_back(part_of(pool, *program, outputs, broadcast));
    return derived;
  });
}

std::size_t derived_bytes() { return derived_cache().bytes(); }
void forget_derived() { derived_cache().clear(); }

namespace {

// A gradient as its operand lies, as PyTorch's elementwise operators give it: some of its nodes take other strides for contiguous
// ones (native_batch_norm_backward on one sample, in torch 2.13).
at::Tensor laid_out_like(const at::Tensor& operand, const at::Tensor& gradient) {
  if (operand.is_contiguous() || !operand.is_non_overlapping_and_dense() || operand.sizes() != gradient.sizes()) return gradient;
  std::vector<std::int64_t> order(operand.dim()), back(operand.dim());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::greater<>(), [&](std::int64_t axis) { return operand.stride(axis); });
  for (std::size_t k = 0; k < order.size(); ++k) back[order[k]] = static_cast<std::int64_t>(k);
  return gradient.permute(order).contiguous().permute(back);
}

}  // namespace

ag::variable_list FusedBackward::apply(ag::variable_list&& cotangents) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(operands_.size() + cotangents.size());
  {
    std::lock_guard lock(mutex_);
    for (const ag::SavedVariable& saved : operands_) tensors.push_back(saved.unpack());
  }
  std::vector<bool> wanted, given;
  for (std::size_t i = 0; i < operands_.size(); ++i) wanted.push_back(task_should_compute_output(i));
  for (const at::Tensor& cotangent : cotangents) given.push_back(cotangent.defined());
  ag::variable_list gradients(operands_.size());
  if (tensors.empty()) return gradients;
  const auto derived = vjp_program(program_, tensors, wanted, given, most_outputs(tensors));
  for (at::Tensor& cotangent : cotangents) {
    if (cotangent.defined()) tensors.push_back(std::move(cotangent));
  }
  evaluate(*derived, tensors, gradients);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i].defined()) gradients[i] = laid_out_like(tensors[i], gradients[i]);
  }
  return gradients;
}

std::vector<bool> FusedBackward::onwards(std::uint32_t output) const {
  const auto effect = effects(program_);
  const auto first = effect->begin() + static_cast<std::ptrdiff_t>(output) * num_outputs();
  return {first, first + num_outputs()};
}

void FusedBackward::release_variables() {
  std::lock_guard lock(mutex_);
  for (ag::SavedVariable& saved : operands_) saved.reset_data();
}

namespace {

std::vector<at::Tensor> below_autograd(at::TensorList operands, std::string_view text) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return fused(operands, text);
}

// Tangents of the results where operands carry forward-mode tangents.
void set_tangents(const std::shared_ptr<const fused::Program>& program, at::TensorList operands,
                  std::vector<at::Tensor>& results) {
  std::vector<bool> given;
  std::vector<at::Tensor> arguments;
  for (const at::Tensor& operand : operands) {
    const bool has = ag::isFwGradDefined(operand);
    given.push_back(has);
    arguments.push_back(has ? operand._fw_primal(0) : operand);
  }
  for (std::size_t i = 0; i < operands.size(); ++i) {
    if (given[i]) arguments.push_back(operands[i]._fw_grad(0));
  }
  const auto derived = jvp_program(program, operands, given);
  std::vector<at::Tensor> tangents(results.size());
  evaluate(*derived, arguments, tangents);
  for (std::size_t j = 0; j < results.size(); ++j) {
    if (tangents[j].defined()) results[j]._set_fw_grad(tangents[j], 0, /*is_inplace_op=*/false);
  }
}

// A result requires grad if it changes with an operand that does.
void set_histories(const std::shared_ptr<const fused::Program>& program, at::TensorList operands,
                   std::vector<at::Tensor>& results) {
  const auto effect = effects(program);
  std::vector<bool> requires_grad;
  for (std::size_t j = 0; j < results.size(); ++j) {
    bool any = false;
    for (std::size_t i = 0; i < operands.size(); ++i) {
      any = any || ((*effect)[j * operands.size() + i] && operands[i].requires_grad());
    }
    requires_grad.push_back(any && at::isFloatingType(results[j].scalar_type()));
  }
  if (std::ranges::find(requires_grad, true) == requires_grad.end()) return;
  auto node = common::make_node<FusedBackward>();
  for (const at::Tensor& operand : operands) {
    node->add_next_edge(at::isFloatingType(operand.scalar_type()) ? ag::impl::gradient_edge(operand) : ag::Edge());
    node->operands_.emplace_back(operand, /*is_output=*/false);
  }
  node->program_ = program;
  for (std::size_t j = 0; j < results.size(); ++j) {
    if (requires_grad[j]) {
      ag::set_history(results[j], node);
    } else {
      node->add_input_metadata(ag::Node::undefined_input());
    }
  }
}

std::vector<at::Tensor> fused_autograd(at::TensorList operands, std::string_view text) {
  bool requires_grad = false, tangents = false;
  for (const at::Tensor& operand : operands) {
    requires_grad = requires_grad || operand.requires_grad();
    tangents = tangents || ag::isFwGradDefined(operand);
  }
  requires_grad = requires_grad && at::GradMode::is_enabled();
  if (!requires_grad && !tangents) return below_autograd(operands, text);
  std::shared_ptr<const fused::Program> program = load(text);
  std::vector<at::Tensor> results = below_autograd(operands, text);
  if (requires_grad) set_histories(program, operands, results);
  if (tangents) set_tangents(program, operands, results);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(wengert, Autograd, m) { m.impl("fused", fused_autograd); }

}  // namespace wengert::ops
