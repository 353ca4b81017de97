#include "tape/vmap_watch.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

namespace wengert::tape {

namespace {

using c10::DispatchKey;

// Rewritten by vmap into operators of the same derivative: products of matrices and vectors as others, whole reductions as
// reductions along an axis, copies at indices as scatters, views and copies as others, random numbers (which have none).
constexpr std::string_view kSameDerivative =
    " _batch_norm_with_update _fused_rms_norm _native_batch_norm_legit _scaled_dot_product_flash_attention_for_cpu "
    "_unsafe_index.Tensor _unsafe_index_put "
    "_unsafe_masked_index _unsafe_masked_index_put_accumulate addbmm addmm addmv addr alias_copy as_strided "
    "as_strided_copy baddbmm bernoulli bernoulli.p block_diag bmm chunk diagonal_copy dist dot empty.memory_format "
    "grid_sampler_2d grid_sampler_3d index_copy index_fill.int_Scalar index_fill.int_Tensor index_select linalg_matrix_exp "
    "linear "
    "matmul max_pool2d mean mm mv narrow native_batch_norm native_dropout_backward nll_loss2d_forward nll_loss_forward "
    "norm.Scalar normal.Tensor_Tensor normal.Tensor_float prod rand randn split.Tensor "
    "split_with_sizes split_with_sizes_copy "
    "squeeze squeeze.dim squeeze.dims squeeze_.dim stack sum t trace transpose.int unbind.int unfold_copy vdot ";

// Where a call stands between the function and the tensors of the whole batch.
enum class Level {
  above,   // on its way to vmap
  vmap,    // handled by vmap
  below,   // called by a rule, on tensors of the whole batch: what autograd records
  inside,  // called by one that is below
};

struct Call {
  Level level;
  // An operator is known by the address of its schema's name.
  const char* name;
  std::size_t same = 0, others = 0;  // what a call that vmap handles is made of
};

struct Watch {
  at::CallbackHandle handle;
  std::vector<Call> calls;
  std::string reason;
};

thread_local std::optional<Watch> watch;

Level level_of_next_call() {
  if (!watch->calls.empty() && watch->calls.back().level >= Level::below) return Level::inside;
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  const auto active = [&keys](DispatchKey key) { return keys.included_.has(key) && !keys.excluded_.has(key); };
  if (active(DispatchKey::FuncTorchDynamicLayerFrontMode)) return Level::above;
  if (!active(DispatchKey::FuncTorchDynamicLayerBackMode)) return Level::below;
  return keys.excluded_.has(DispatchKey::FuncTorchBatched) ? Level::above : Level::vmap;
}

std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& function) {
  if (!watch) return nullptr;
  const Level level = level_of_next_call();
  std::vector<Call>& calls = watch->calls;
  if (level == Level::vmap || level == Level::below) {
    const auto parent = std::find_if(calls.rbegin(), calls.rend(), [](const Call& call) { return call.level == Level::vmap; });
    if (parent != calls.rend()) ++(parent->name == function.name() ? parent->same : parent->others);
  }
  calls.push_back({.level = level, .name = function.name()});
  return nullptr;
}

// An operator without a derivative or a rule of its own is what it is made of.
bool decides_its_derivative(const c10::OperatorName& name) {
  const auto op = c10::Dispatcher::singleton().findOp(name);
  constexpr DispatchKey kDeciding[] = {DispatchKey::Autograd, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
                                       DispatchKey::FuncTorchBatched};
  return op && std::ranges::any_of(kDeciding, [&op](DispatchKey key) { return op->hasKernelForDispatchKey(key); });
}

std::string full_name(const c10::OperatorName& name) {
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

bool keeps_its_derivative(std::string_view name) {
  constexpr std::string_view kPrefix = "aten::";
  return name.starts_with(kPrefix) &&
         kSameDerivative.find(" " + std::string(name.substr(kPrefix.size())) + " ") != std::string_view::npos;
}

void leave(const at::RecordFunction& function, at::ObserverContext*) {
  if (!watch || watch->calls.empty()) return;
  const Call call = watch->calls.back();
  watch->calls.pop_back();
  if (call.level != Level::vmap || call.same == 1 || !watch->reason.empty()) return;
  const std::optional<c10::OperatorName> name = function.operator_name();
  if (!name) return;
  if (call.same > 1) {
    watch->reason = full_name(*name) + " has no batching rule";
  } else if (decides_its_derivative(*name) && !keeps_its_derivative(full_name(*name))) {
    watch->reason = "vmap writes " + full_name(*name) + " as other operators";
  }
}

}  // namespace

void begin_vmap_watch() {
  end_vmap_watch();
  watch.emplace();
  watch->handle = at::addThreadLocalCallback(at::RecordFunctionCallback(&enter, &leave).scopes({at::RecordScope::FUNCTION}));
}

std::string end_vmap_watch() {
  if (!watch) return {};
  at::removeCallback(watch->handle);
  std::string reason = std::move(watch->reason);
  watch.reset();
  return reason;
}

}  // namespace wengert::tape
