#include "ops/finite.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cstdint>
#include <vector>

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
  std::vector<at::Tensor> others;  // looked at together: on a device one wait for all of them
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined() || tensor._is_zerotensor()) continue;
    const bool by_elements = tensor.is_cpu() && tensor.is_contiguous() && !tensor.is_neg();
    if (by_elements && tensor.scalar_type() == at::kFloat) {
      if (!are_finite(tensor.const_data_ptr<float>(), tensor.numel())) return false;
    } else if (by_elements && tensor.scalar_type() == at::kDouble) {
      if (!are_finite(tensor.const_data_ptr<double>(), tensor.numel())) return false;
    } else {
      others.push_back(tensor);
    }
  }
  // A norm may overflow where the elements did not: no harm, as the answer allows a shortcut.
  return others.empty() || at::isfinite(at::stack(at::_foreach_norm(others))).all().item<bool>();
}

}  // namespace wengert::ops
