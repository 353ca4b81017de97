// Attention is read as what it is composed of: softmax(q k^T * scale + mask) v, whose structure the fused kernels' node hides.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/variable.h>

#include <cmath>
#include <initializer_list>
#include <limits>

#include "tape/reader.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;

// The fused kernels never hold the probabilities; more of them than this stay unwritten.
constexpr std::int64_t kMostProbabilities = std::int64_t(1) << 24;

// An argument as the node leads on from it, whatever was done to the tensor that it saved.
at::Tensor argument(const Take& k, const SavedVariable& saved, int edge) {
  const at::Tensor tensor = k.unpack(saved).detach();
  const torch::autograd::Edge& next = k.fn()->next_edge(edge);
  if (next.is_valid()) torch::autograd::impl::set_gradient_edge(tensor, next);
  return tensor;
}

// `results` are saved as well; unpacking them complains where the node would.
template <class N>
at::Tensor attention(const Take& k, const N& n, const SavedVariable& mask, std::initializer_list<const SavedVariable*> results) {
  if (n.dropout_p != 0) return {};  // what was dropped is not known
  const double scale = n.scale.value_or(1 / std::sqrt(static_cast<double>(k.unpack(n.query_).size(-1))));
  if (n.is_causal && !(scale > 0)) return {};  // the kernel masks before it scales
  const at::Tensor query = argument(k, n.query_, 0), key = argument(k, n.key_, 1), value = argument(k, n.value_, 2);
  for (const SavedVariable* result : results) k.unpack(*result, /*is_result=*/true);
  const bool plain = query.scalar_type() == at::kDouble || query.scalar_type() == at::kFloat;
  if (!plain || query.dim() != 4 || key.size(1) != query.size(1) || value.size(1) != query.size(1)) return {};
  if (query.size(0) * query.size(1) * query.size(2) * key.size(2) > kMostProbabilities) return {};
  at::Tensor scores = at::matmul(query, key.transpose(-2, -1)) * scale, later;
  if (n.is_causal) {
    later = at::ones({query.size(2), key.size(2)}, query.options().dtype(at::kBool)).triu(1);
    scores = scores.masked_fill(later, -std::numeric_limits<double>::infinity());
  }
  const at::Tensor bias = k.unpack(mask);
  if (bias.defined() && (bias.requires_grad() || !bias.is_floating_point())) return {};
  if (bias.defined()) scores = scores + bias;
  at::Tensor probabilities = at::_safe_softmax(scores, -1);
  if (n.is_causal) probabilities = probabilities.masked_fill(later, 0);  // also next to nan: the kernels do not come there
  return at::matmul(probabilities, value);
}

}  // namespace

void add_attention(Table& t) {
  t.add_composed<gen::ScaledDotProductFlashAttentionForCpuBackward0>(
      "ScaledDotProductFlashAttentionForCpuBackward0",
      [](const Take& k, const gen::ScaledDotProductFlashAttentionForCpuBackward0& n) {
        return attention(k, n, n.attn_mask_, {&n.output_, &n.logsumexp_});
      });
  t.add_composed<gen::ScaledDotProductEfficientAttentionBackward0>(  // float32 on CUDA
      "ScaledDotProductEfficientAttentionBackward0",
      [](const Take& k, const gen::ScaledDotProductEfficientAttentionBackward0& n) {
        return attention(k, n, n.attn_bias_, {&n.output_, &n.log_sumexp_});
      });
}

}  // namespace wengert::tape
