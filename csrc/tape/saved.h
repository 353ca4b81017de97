// What nodes saved, which other threads may read or free at the same time.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <vector>

#include "common/node_ptr.h"

namespace wengert::tape {

// With PyTorch's complaints where it was freed or changed since; throws Unsupported where hooks of the user's would run.
// `is_result`: of an output of the op.
at::Tensor unpack(const common::NodePtr& fn, const torch::autograd::SavedVariable& saved, bool is_result = false);
std::vector<at::Tensor> unpack(const common::NodePtr& fn, const std::vector<torch::autograd::SavedVariable>& saved,
                               const bool& released);

// What guards all that the node saved.
std::unique_lock<std::mutex> lock_saved(torch::autograd::Node& fn);

// Every name by which nodes that have a row save a tensor.
// clang-format off
#define WENGERT_SAVED(f) \
  f(A_) f(LU_) f(buffer_) f(self_or_result_) f(L_) f(P_) f(Q_) f(R_) f(S_) f(U_) f(Vh_) f(attn_bias_) f(attn_mask_) f(b_) f(batch1_) f(batch2_) \
  f(bias_) f(condition_) f(cx_) f(eigenvalues_) f(eigenvectors_) f(end_) f(exponent_) f(grad_out_) f(grad_output_) \
  f(grid_) f(hidden_bias_) f(hidden_gates_) f(hx_) f(imag_) f(index_) f(indices_) f(input2_) f(input_) f(input_bias_) \
  f(input_gates_) f(input_lengths_) f(inverse_) f(key_) f(log_probs_) f(log_sumexp_) f(logsumexp_) f(mask_) f(mat1_) \
  f(mat2_) f(mat_) f(max_) f(mean_) f(min_) f(other_) f(output_) f(philox_offset_) f(philox_seed_) f(pivots_) \
  f(pos_weight_) f(query_) f(real_) f(result0_) f(result1_) f(result2_) f(result3_) f(result_) f(rstd_) \
  f(running_mean_) f(running_var_) f(self_) f(sign_) f(solution_) f(source_) f(src_) f(target_) f(target_lengths_) \
  f(targets_) f(tensor1_) f(tensor2_) f(tensor_) f(total_weight_) f(value_) f(vec1_) f(vec2_) f(vec_) f(weight_) f(x1_) \
  f(x2_)
// clang-format on

// Whether a call of the node would run hooks of the user's on what it saved, as checkpointing does, which then computes it again
// for every call.
template <class N>
bool saves_through_hooks(torch::autograd::Node& fn) {
  const auto lock = lock_saved(fn);
  const auto& n = static_cast<const N&>(fn);
  bool found = false;
  const auto see = [&found](const auto& saved) {
    if constexpr (requires { saved.has_hooks(); }) {
      found = found || saved.has_hooks();
    } else {
      for (const auto& one : saved) found = found || one.has_hooks();
    }
  };
#define WENGERT_HAS_HOOKS(name) \
  if constexpr (requires { n.name; }) see(n.name);
  WENGERT_SAVED(WENGERT_HAS_HOOKS)
#undef WENGERT_HAS_HOOKS
  return found;
}

}  // namespace wengert::tape
