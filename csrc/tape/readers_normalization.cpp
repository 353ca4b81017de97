// Normalizations: the data's derivative is the node's own, called batched; what parameters meet is read.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::kOne;

int rank(const Shape& shape) { return static_cast<int>(shape.size()); }

enum Edge : int { kData, kWeight, kBias };

// What the weights are multiplied with, y = weight * normalized + bias, where somebody asks for it; one row is PyTorch's, whose
// kernels sum it faster.
template <class F>
Slot take_normalized(Take& k, F normalized) {
  at::Tensor value = k.needs(kWeight) && !k.one_row() ? normalized() : at::Tensor();
  return value.defined() && value.scalar_type() == k.node().outputs[0].dtype ? k.derived(std::move(value)) : Slot();
}

// (data - mean) / deviation over some axes; without a mean, data / deviation. The node saved the statistics without their
// history. Where one is wanted they are computed again, and 1 / deviation = (variance + eps)^-1/2 with the eps that its saved
// value implies.
at::Tensor normalized(const at::Tensor& data, at::IntArrayRef axes, const at::Tensor& mean, const at::Tensor& inverse) {
  const bool centres = mean.defined(), history = at::GradMode::is_enabled();
  const at::Tensor centred = !centres ? data : data - (history ? data.mean(axes, /*keepdim=*/true) : mean);
  if (!history) return centred * inverse;
  const at::Tensor variance = centred.square().mean(axes, /*keepdim=*/true);
  const at::Tensor eps = at::nan_to_num(inverse.pow(-2) - variance, 0, at::nullopt, at::nullopt);  // of a variance that overflows
  return centred * (variance + eps.detach()).rsqrt();
}

std::vector<std::int64_t> last_axes(std::int64_t count) {
  std::vector<std::int64_t> axes(count);
  std::iota(axes.begin(), axes.end(), -count);
  return axes;
}

// The parameters lie along `axes` of the data.
Pullback parameter(const Site& s, Slot normalized, Axes axes) {
  if (s.output != 0) return opaque();
  FactorBuilder f(s);
  if (s.input == kBias) return f.finish(kOne, {}, std::move(axes));
  if (!s.has(normalized)) return opaque();
  return f.finish(f.read(normalized, own_axes(rank(s.y()))), {}, std::move(axes));
}

// ---- layer_norm and rms_norm: over the last axes of every sample.

struct OverLastAxes {
  std::int64_t count;
  Slot normalized;
};
Pullback over_last_axes(const Site& s, const OverLastAxes& p) {
  const int batch = rank(s.y()) - static_cast<int>(p.count);
  if (s.input == kData) return s.output == 0 ? leading(s, batch) : opaque();
  Axes axes;
  for (int a = batch; a < rank(s.y()); ++a) axes.push_back(along(a));
  return parameter(s, p.normalized, std::move(axes));
}

OverLastAxes take_layer_norm(Take& k, const gen::NativeLayerNormBackward0& n) {
  const std::int64_t count = std::ssize(n.normalized_shape);
  return {count, take_normalized(k, [&] {
            return normalized(k.unpack(n.input_), last_axes(count), k.unpack(n.result1_, true), k.unpack(n.result2_, true));
          })};
}

OverLastAxes take_rms_norm(Take& k, const gen::FusedRmsNormBackward0& n) {
  const std::int64_t count = std::ssize(n.normalized_shape);
  return {count,
          take_normalized(k, [&] { return normalized(k.unpack(n.input_), last_axes(count), {}, k.unpack(n.result1_, true)); })};
}

// The gradient of the data follows sample by sample from grad_output (and from the data, where the op is not linear in it).
Pullback over_last_axes_backward(const Site& s, std::int64_t count) {
  return s.output == 0 && s.input < 2 ? leading(s, rank(s.x()) - static_cast<int>(count)) : opaque();
}

// ---- group_norm: over groups of channels of every sample.

Pullback over_groups(const Site& s, Slot normalized) {
  if (s.input == kData) return s.output == 0 ? leading(s, 1) : opaque();
  return parameter(s, normalized, {along(1)});
}

Slot take_group_norm(Take& k, const gen::NativeGroupNormBackward0& n) {
  return take_normalized(k, [&] {
    const at::Tensor data = k.unpack(n.input_), mean = k.unpack(n.result1_, true), inverse = k.unpack(n.result2_, true);
    const at::Tensor by_group = data.unflatten(1, {mean.size(1), data.size(1) / mean.size(1)}).flatten(2);
    return normalized(by_group, {-1}, mean.unsqueeze(-1), inverse.unsqueeze(-1)).reshape(data.sizes());
  });
}

// ---- batch_norm: over the batch in training, by fixed statistics otherwise.

struct BatchNorm {
  bool training;
  Slot normalized;
  Slot scale;  // what the data are multiplied with, where the statistics are fixed
};
Pullback batch_norm(const Site& s, const BatchNorm& p) {
  const int channel = rank(s.y()) > 1 ? 1 : 0;
  if (s.input != kData) return parameter(s, p.normalized, {along(channel)});
  if (s.output != 0) return opaque();
  if (p.training) return local(s, {{1, 1}});
  if (!s.has(p.scale)) return leading(s, rank(s.x()));
  FactorBuilder f(s);
  return f.finish(f.read(p.scale, {along(channel)}));
}

template <class N>
double eps_of(const N& n) {
  if constexpr (requires { n.epsilon; }) {
    return n.epsilon;
  } else {
    return n.eps;
  }
}

template <class N>
BatchNorm take_batch_norm(Take& k, const N& n) {
  BatchNorm result{};
  if constexpr (requires { n.training; }) result.training = n.training;
  const auto by_channel = [](const at::Tensor& statistic, const at::Tensor& data) {
    std::vector<std::int64_t> shape(data.dim(), 1);
    shape[std::min<std::int64_t>(1, data.dim() - 1)] = statistic.numel();
    return statistic.reshape(shape);
  };
  if (result.training) {
    result.normalized = take_normalized(k, [&] {
      const at::Tensor data = k.unpack(n.input_), mean = k.unpack(n.result1_, true), inverse = k.unpack(n.result2_, true);
      std::vector<std::int64_t> axes{0};
      for (std::int64_t a = 2; a < data.dim(); ++a) axes.push_back(a);
      return normalized(data, axes, by_channel(mean, data), by_channel(inverse, data));
    });
    return result;
  }
  if constexpr (requires { n.running_var_; }) {
    const at::Tensor data = k.unpack(n.input_), mean = k.unpack(n.running_mean_), variance = k.unpack(n.running_var_);
    if (mean.defined() && variance.defined() && variance.scalar_type() == data.scalar_type() && !mean.requires_grad() &&
        !variance.requires_grad()) {
      const at::Tensor inverse = (variance + eps_of(n)).rsqrt(), weight = k.unpack(n.weight_);
      if (k.needs(kWeight)) result.normalized = k.derived((data - by_channel(mean, data)) * by_channel(inverse, data));
      result.scale = k.derived(weight.defined() ? weight * inverse : inverse);
    }
  }
  return result;
}

template <class N>
void add_batch_norm(Table& t, const char* name) {
  t.add<N>(name, Op::local, take_batch_norm<N>, batch_norm);
}

}  // namespace

void add_normalization(Table& t) {
  t.add<gen::NativeLayerNormBackward0>("NativeLayerNormBackward0", Op::local, take_layer_norm, over_last_axes);
  t.add<gen::FusedRmsNormBackward0>("FusedRmsNormBackward0", Op::local, take_rms_norm, over_last_axes);
  t.add<gen::NativeGroupNormBackward0>("NativeGroupNormBackward0", Op::local, take_group_norm, over_groups);
  t.add<gen::NativeLayerNormBackwardBackward0>(
      "NativeLayerNormBackwardBackward0", Op::local,
      [](Take&, const gen::NativeLayerNormBackwardBackward0& n) -> std::int64_t { return std::ssize(n.normalized_shape); },
      over_last_axes_backward);
  add_batch_norm<gen::NativeBatchNormBackward0>(t, "NativeBatchNormBackward0");
  add_batch_norm<gen::NativeBatchNormLegitBackward0>(t, "NativeBatchNormLegitBackward0");
  add_batch_norm<gen::NativeBatchNormLegitBackward1>(t, "NativeBatchNormLegitBackward1");
  add_batch_norm<gen::NativeBatchNormLegitNoTrainingBackward0>(t, "NativeBatchNormLegitNoTrainingBackward0");
  add_batch_norm<gen::CudnnBatchNormBackward0>(t, "CudnnBatchNormBackward0");
}

}  // namespace wengert::tape
