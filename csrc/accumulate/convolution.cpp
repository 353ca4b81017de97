#include "accumulate/convolution.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/generated/Functions.h>

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

#include "accumulate/calls.h"
#include "tape/reader.h"
#include "tape/saved.h"

namespace wengert::accumulate {

namespace {

using Shape = std::vector<std::int64_t>;

constexpr std::int64_t kBlock = 16;           // channels that oneDNN's kernels take at once
constexpr std::int64_t kLeastWork = 1 << 18;  // products: below it the extra operators cost more than is gained

// Where columns that are added are faster: see NOTE [Few channels].
struct Columns {
  std::int64_t most_in, least_out;  // channels
  std::int64_t most_places;         // in a kernel
};
constexpr Columns kByShortSteps[] = {{3, 1, 7 * 7}};
constexpr Columns kByLongSteps[] = {{2, 1, 7 * 7}, {4, 9, 5 * 5}, {4, 48, 7 * 7}, {8, 12, 3 * 3}};

struct Convolution {
  at::Tensor weight;  // (channels out, channels in, height, width)
  Shape data;         // of one sample: (channels in, height, width)
  Shape step, padding, dilation;

  static std::optional<Convolution> of(const common::NodePtr& fn);

  std::int64_t in() const { return weight.size(1); }
  std::int64_t out() const { return weight.size(0); }
  bool turns() const;  // rather a convolution with the turned kernel than a matrix product
  bool pays(std::int64_t outputs) const;
  std::int64_t values_for_one(const at::Tensor& cotangent) const;  // written for a sample
  at::Tensor gradient(const at::Tensor& cotangent) const;
};

template <class N>
std::optional<Convolution> read(const common::NodePtr& fn, const N& n) {
  if (n.transposed || n.groups != 1) return std::nullopt;
  const at::Tensor data = tape::unpack(fn, n.input_), weight = tape::unpack(fn, n.weight_);
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  const auto plain = [&](const at::Tensor& tensor) {
    return tensor.defined() && tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.layout() == at::kStrided &&
           tensor.dim() == 4 && tensor.is_contiguous() && !tensor.key_set().has_any(wrapped);
  };
  if (!plain(data) || !plain(weight)) return std::nullopt;
  const auto along = [](const auto& numbers) {
    const tape::Integers each = tape::Take::per_axis(numbers, 2);
    return Shape(each.begin(), each.end());
  };
  return Convolution{weight, data.sizes().slice(1).vec(), along(n.stride), along(n.padding), along(n.dilation)};
}

std::optional<Convolution> Convolution::of(const common::NodePtr& fn) {
  namespace gen = torch::autograd::generated;
  if (const auto* n = dynamic_cast<const gen::ConvolutionBackward0*>(fn.get())) return read(fn, *n);
  if (const auto* n = dynamic_cast<const gen::ConvolutionBackward1*>(fn.get())) return read(fn, *n);
  return std::nullopt;
}

bool Convolution::turns() const {
  for (int d = 0; d < 2; ++d) {
    if (step[d] != 1 || dilation[d] * (weight.size(2 + d) - 1) < padding[d]) return false;
  }
  return in() > kByShortSteps->most_in || out() < 4 * in();
}

bool Convolution::pays(std::int64_t outputs) const {
  const std::int64_t places = weight.size(2) * weight.size(3);
  if (places == 1 || outputs * in() * places < kLeastWork) return false;
  if (turns()) return out() < kBlock;
  for (int d = 0; d < 2; ++d) {
    if (dilation[d] != 1 || padding[d] >= weight.size(2 + d)) return false;
  }
  const std::span<const Columns> known = step[0] == 1 && step[1] == 1 ? std::span<const Columns>(kByShortSteps) : kByLongSteps;
  return std::ranges::any_of(known, [&](const Columns& columns) {
    return in() <= columns.most_in && out() >= columns.least_out && places <= columns.most_places;
  });
}

std::int64_t Convolution::values_for_one(const at::Tensor& cotangent) const {
  const std::int64_t result = data[0] * data[1] * data[2];
  const std::int64_t columns = weight.numel() / out() * cotangent.size(2) * cotangent.size(3);
  return turns() ? result : result + columns;
}

at::Tensor Convolution::gradient(const at::Tensor& cotangent) const {
  if (turns()) {
    Shape rest;
    for (int d = 0; d < 2; ++d) rest.push_back(dilation[d] * (weight.size(2 + d) - 1) - padding[d]);
    return at::conv2d(cotangent, weight.flip({2, 3}).transpose(0, 1), {}, at::IntArrayRef{1, 1}, rest, dilation);
  }
  const at::Tensor columns = at::matmul(weight.flatten(1).t(), cotangent.flatten(2));
  return at::col2im(columns, {data[1], data[2]}, weight.sizes().slice(2), dilation, padding, step);
}

}  // namespace

at::Tensor convolution_gradient(const common::NodePtr& fn, const at::Tensor& cotangent, std::int64_t& calls) {
  if (at::GradMode::is_enabled() || !at::hasMKLDNN() || !at::globalContext().userEnabledMkldnn() || !cotangent.is_cpu() ||
      cotangent.scalar_type() != at::kFloat || cotangent.numel() == 0) {
    return {};
  }
  const std::optional<Convolution> convolution = Convolution::of(fn);
  if (!convolution || !convolution->pays(cotangent.numel())) return {};
  const at::Tensor given = cotangent.flatten(0, cotangent.dim() - 4).contiguous();
  Shape shape = cotangent.sizes().slice(0, cotangent.dim() - 3).vec();
  shape.insert(shape.end(), convolution->data.begin(), convolution->data.end());
  const std::int64_t samples = given.size(0);
  const double values = static_cast<double>(given.numel()) + static_cast<double>(samples * convolution->values_for_one(given));
  const std::int64_t at_once = within_caches(values * sizeof(float), samples, convolution->turns() ? kLeastRowsAtOnce : 1);
  calls += (samples + at_once - 1) / at_once;
  if (at_once == samples) return convolution->gradient(given).reshape(shape);
  const at::Tensor result = at::empty(shape, cotangent.options());
  const at::Tensor flat = result.flatten(0, cotangent.dim() - 4);
  for (std::int64_t first = 0; first < samples; first += at_once) {
    const std::int64_t count = std::min(at_once, samples - first);
    flat.narrow(0, first, count).copy_(convolution->gradient(given.narrow(0, first, count)));
  }
  return result;
}

}  // namespace wengert::accumulate
