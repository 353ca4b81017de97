#include "ops/fused_autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <functional>
#include <mutex>
#include <stdexcept>

#include "common/budget.h"
#include "common/lru.h"
#include "common/node_ptr.h"
#include "fused/footprint.h"
#include "ops/fused.h"

namespace wengert::ops {

namespace ag = torch::autograd;

namespace {

constexpr std::uint32_t kBackwards = 0, kForwards = 1;

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
    const std::size_t bytes = sizeof(Question) + question.words.capacity() * sizeof(std::uint32_t) + sizeof(DerivedProgram) +
                              fused::footprint(*question.program) + derived->text.capacity() +
                              derived->outputs.capacity() * sizeof(int);
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
  std::mutex mutex_;
  common::Lru<Question, std::shared_ptr<const DerivedProgram>, QuestionHash> entries_{common::derived_budget()};
};

// Never destroyed: threads may outlive static destructors.
DerivedCache& derived_cache() {
  static auto* instance = new DerivedCache;
  return *instance;
}

std::vector<fused::ExprId> leaves(fused::ExprPool& pool, int count) {
  std::vector<fused::ExprId> ids;
  for (int i = 0; i < count; ++i) ids.push_back(pool.operand(i));
  return ids;
}

// Appends an output unless it is the structural zero; returns its index or -1.
int add_output(fused::ProgramSpec& spec, fused::ExprId expr, fused::Dtype dtype, std::uint32_t reduced) {
  if (expr == fused::kZero) return -1;
  spec.outputs.push_back({expr, dtype, reduced});
  return static_cast<int>(spec.outputs.size()) - 1;
}

DerivedProgram finish(const fused::ExprPool& pool, const fused::ProgramSpec& spec, std::vector<int> outputs) {
  return {.text = spec.outputs.empty() ? std::string() : fused::to_text(pool, spec), .outputs = std::move(outputs)};
}

// Axes along which the operand was broadcast over the nest (where the extent is 1 too, summing is the identity).
std::uint32_t broadcast_axes(const at::Tensor& operand) {
  std::uint32_t mask = 0;
  for (int k = 0; k < operand.dim(); ++k) mask |= static_cast<std::uint32_t>(operand.sym_size(k) == 1) << k;
  return mask;
}

bool is_floating(fused::Dtype dtype) { return dtype <= fused::Dtype::f16; }

}  // namespace

std::shared_ptr<const DerivedProgram> vjp_program(const std::shared_ptr<const fused::Program>& program, at::TensorList operands,
                                                  const std::vector<bool>& wanted, const std::vector<bool>& given) {
  std::vector<std::uint32_t> key{kBackwards};
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    key.push_back(wanted[i] ? 1 + static_cast<std::uint32_t>(to_dtype(operands[i].scalar_type())) : 0);
    if (wanted[i]) key.push_back(broadcast_axes(operands[i]));
  }
  for (bool g : given) key.push_back(g);
  return derived_cache().get({program, std::move(key)}, [&] {
    fused::ExprPool pool;
    fused::ProgramSpec spec{
        .rank = program->rank(), .operands = program->operands(), .compute = program->compute(), .outputs = {}};
    const std::vector<fused::ExprId> same = leaves(pool, program->operands());
    std::vector<fused::ExprId> exprs, cotangents;
    for (std::size_t j = 0; j < given.size(); ++j) {
      if (!given[j]) continue;
      exprs.push_back(pool.substitute(program->pool(), program->outputs()[j].expr, same));
      cotangents.push_back(pool.operand(spec.operands++));
    }
    std::vector<int> outputs(wanted.size(), -1);
    for (auto [operand, gradient] : pool.pullback(exprs, cotangents)) {
      if (operand >= program->operands() || !wanted[operand]) continue;
      outputs[operand] = add_output(spec, gradient, to_dtype(operands[operand].scalar_type()), broadcast_axes(operands[operand]));
    }
    return finish(pool, spec, std::move(outputs));
  });
}

std::shared_ptr<const DerivedProgram> jvp_program(const std::shared_ptr<const fused::Program>& program,
                                                  const std::vector<bool>& given) {
  std::vector<std::uint32_t> key{kForwards};
  key.insert(key.end(), given.begin(), given.end());
  return derived_cache().get({program, std::move(key)}, [&] {
    fused::ExprPool pool;
    fused::ProgramSpec spec{
        .rank = program->rank(), .operands = program->operands(), .compute = program->compute(), .outputs = {}};
    const std::vector<fused::ExprId> same = leaves(pool, program->operands());
    std::vector<fused::ExprId> tangents;
    for (bool g : given) tangents.push_back(g ? pool.operand(spec.operands++) : fused::kZero);
    std::vector<int> outputs;
    for (const fused::OutputSpec& output : program->outputs()) {
      fused::ExprId expr = pool.substitute(program->pool(), output.expr, same);
      fused::ExprId tangent = is_floating(output.dtype) ? pool.pushforward(expr, tangents) : fused::kZero;
      outputs.push_back(add_output(spec, tangent, output.dtype, output.reduced));
    }
    return finish(pool, spec, std::move(outputs));
  });
}

std::size_t derived_bytes() { return derived_cache().bytes(); }
void forget_derived() { derived_cache().clear(); }

ag::variable_list FusedBackward::apply(ag::variable_list&& cotangents) {
  std::vector<at::Tensor> operands;
  operands.reserve(operands_.size() + cotangents.size());
  {
    std::lock_guard lock(mutex_);
    for (const ag::SavedVariable& saved : operands_) operands.push_back(saved.unpack());
  }
  std::vector<bool> wanted, given;
  for (std::size_t i = 0; i < operands_.size(); ++i) wanted.push_back(task_should_compute_output(i));
  for (const at::Tensor& cotangent : cotangents) given.push_back(cotangent.defined());
  auto derived = vjp_program(program_, operands, wanted, given);
  ag::variable_list gradients(operands_.size());
  if (derived->text.empty()) return gradients;
  for (at::Tensor& cotangent : cotangents) {
    if (cotangent.defined()) operands.push_back(std::move(cotangent));
  }
  std::vector<at::Tensor> results = fused(operands, derived->text);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    if (derived->outputs[i] >= 0) gradients[i] = results[derived->outputs[i]];
  }
  return gradients;
}

std::vector<bool> FusedBackward::effective_edges(std::size_t output) {
  std::vector<bool> wanted;
  for (const ag::Edge& edge : next_edges()) wanted.push_back(edge.is_valid());
  std::vector<at::Tensor> operands;
  {
    std::lock_guard lock(mutex_);
    for (const ag::SavedVariable& saved : operands_) operands.push_back(saved.unpack());
  }
  try {
    std::vector<bool> given(program_->outputs().size(), false);
    given[output] = true;
    const auto derived = vjp_program(program_, operands, wanted, given);
    for (std::size_t i = 0; i < wanted.size(); ++i) wanted[i] = derived->outputs[i] >= 0;
  } catch (const c10::NotImplementedError&) {  // a partial without a formula may be anything
  }
  return wanted;
}

void FusedBackward::release_variables() {
  std::lock_guard lock(mutex_);
  for (ag::SavedVariable& saved : operands_) saved.reset_data();
}

namespace {

std::vector<at::Tensor> below_autograd(at::TensorList operands, std::string_view text) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("wengert::fused", "")
                       .typed<std::vector<at::Tensor>(at::TensorList, std::string_view)>();
  return op.call(operands, text);
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
  auto derived = jvp_program(program, given);
  if (derived->text.empty()) return;
  std::vector<at::Tensor> tangents = fused(arguments, derived->text);
  for (std::size_t j = 0; j < results.size(); ++j) {
    if (derived->outputs[j] >= 0) results[j]._set_fw_grad(tangents[derived->outputs[j]], 0, /*is_inplace_op=*/false);
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
  if (requires_grad) {
    auto node = common::make_node<FusedBackward>();
    for (const at::Tensor& operand : operands) {
      node->add_next_edge(at::isFloatingType(operand.scalar_type()) ? ag::impl::gradient_edge(operand) : ag::Edge());
      node->operands_.emplace_back(operand, /*is_output=*/false);
    }
    node->program_ = program;
    for (const at::Tensor& result : results) {
      if (at::isFloatingType(result.scalar_type())) {
        ag::set_history(result, node);
      } else {
        node->add_input_metadata(ag::Node::undefined_input());
      }
    }
  }
  if (tangents) set_tangents(program, operands, results);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(wengert, Autograd, m) { m.impl("fused", fused_autograd); }

}  // namespace wengert::ops
