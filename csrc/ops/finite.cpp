#include "ops/finite.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cstdint>

namespace wengert::ops {

namespace {

// x * 0 is 0 for what is finite and nan for the rest, and a sum keeps it; in several sums, so that they are taken side by side.
template <class T>
bool are_finite(const T* x, std::int64_t count) {
  constexpr std::int64_t kSums = 16;
  T sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (std::int64_t k = 0; k < kSums; ++k) sums[k] += x[i + k] * 0;
  }
  for (; i < count; ++i) sums[0] += x[i] * 0;
  return std::all_of(sums, sums + kSums, [](T sum) { return sum == 0; });
}

}  // namespace

bool are_finite(at::TensorList tensors) {
  return std::ranges::all_of(tensors, [](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor._is_zerotensor()) return true;
    if (tensor.is_cpu() && tensor.is_contiguous() && !tensor.is_neg()) {
      if (tensor.scalar_type() == at::kFloat) return are_finite(tensor.const_data_ptr<float>(), tensor.numel());
      if (tensor.scalar_type() == at::kDouble) return are_finite(tensor.const_data_ptr<double>(), tensor.numel());
    }
    return at::isfinite(tensor).all().item<bool>();
  });
}

}  // namespace wengert::ops
