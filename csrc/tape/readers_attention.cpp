// Attention is read as what it is composed of: softmax(q k^T * scale + mask) v, whose structure the fused kernels' node hides.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/generated/Functions.h>

#include <cmath>
#include <limits>

#include "tape/reader.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;

// The fused kernels never hold the probabilities; more of them than this stay unwritten.
constexpr std::int64_t kMostProbabilities = std::int64_t(1) << 24;

template <class N>
at::Tensor attention(const Take& k, const N& n, const SavedVariable* mask) {
  if (n.dropout_p != 0) return {};  // what was dropped is not known
  const at::Tensor query = k.unpack(n.query_), key = k.unpack(n.key_), value = k.unpack(n.value_);
  const bool plain = query.scalar_type() == at::kDouble || query.scalar_type() == at::kFloat;
  if (!plain || query.dim() != 4 || key.size(1) != query.size(1) || value.size(1) != query.size(1)) return {};
  if (query.size(0) * query.size(1) * query.size(2) * key.size(2) > kMostProbabilities) return {};
  const double scale = n.scale.value_or(1 / std::sqrt(static_cast<double>(query.size(3))));
  at::Tensor scores = at::matmul(query, key.transpose(-2, -1)) * scale;
  if (n.is_causal) {
    const at::Tensor later = at::ones({query.size(2), key.size(2)}, query.options().dtype(at::kBool)).triu(1);
    scores = scores.masked_fill(later, -std::numeric_limits<double>::infinity());
  }
  const at::Tensor bias = mask != nullptr ? k.unpack(*mask) : at::Tensor();
  if (bias.defined() && (bias.requires_grad() || !bias.is_floating_point())) return {};
  if (bias.defined()) scores = scores + bias;
  return at::matmul(at::_safe_softmax(scores, -1), value);
}

}  // namespace

void add_attention(Table& t) {
  t.add_composed<gen::ScaledDotProductFlashAttentionForCpuBackward0>(
      "ScaledDotProductFlashAttentionForCpuBackward0",
      [](const Take& k, const gen::ScaledDotProductFlashAttentionForCpuBackward0& n) { return attention(k, n, &n.attn_mask_); });
}

}  // namespace wengert::tape
