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
void take_normalized(Take& k, F normalized) {
  at::Tensor value = k.needs(kWeight) && !k.one_row() ? normalized() : at::Tensor();
  if (value.defined() && value.scalar_type() == k.node().outputs[0].dtype) return k.derived(std::move(value));
  k.no_slot();
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

// The parameters lie along `axes` of the data; slot 0: the normalized data.
Pullback parameter(const Site& s, Axes axes) {
  if (s.output != 0) return opaque();
  FactorBuilder f(s);
  if (s.input == kBias) return f.finish(kOne, {}, std::move(axes));
  if (!s.has(0)) return opaque();
  return f.finish(f.read(0, own_axes(rank(s.y()))), {}, std::move(axes));
}

// ---- layer_norm and rms_norm: over the last axes of every sample.  ints: how many.

Pullback over_last_axes(const Site& s) {
  const int batch = rank(s.y()) - static_cast<int>(s.integer(0));
  if (s.input == kData) return s.output == 0 ? leading(s, batch) : opaque();
  Axes axes;
  for (int a = batch; a < rank(s.y()); ++a) axes.push_back(along(a));
  return parameter(s, std::move(axes));
}

void take_layer_norm(Take& k, const gen::NativeLayerNormBackward0& n) {
  const std::int64_t count = std::ssize(n.normalized_shape);
  k.integer(count);
  take_normalized(k, [&] {
    return normalized(k.unpack(n.input_), last_axes(count), k.unpack(n.result1_, true), k.unpack(n.result2_, true));
  });
}

void take_rms_norm(Take& k, const gen::FusedRmsNormBackward0& n) {
  const std::int64_t count = std::ssize(n.normalized_shape);
  k.integer(count);
  take_normalized(k, [&] { return normalized(k.unpack(n.input_), last_axes(count), {}, k.unpack(n.result1_, true)); });
}

// The gradient of the data follows sample by sample from grad_output (and from the data, where the op is not linear in it).
Pullback over_last_axes_backward(const Site& s) {
  return s.output == 0 && s.input < 2 ? leading(s, rank(s.x()) - static_cast<int>(s.integer(0))) : opaque();
}

// ---- group_norm: over groups of channels of every sample.

Pullback over_groups(const Site& s) {
  if (s.input == kData) return s.output == 0 ? leading(s, 1) : opaque();
  return parameter(s, {along(1)});
}

void take_group_norm(Take& k, const gen::NativeGroupNormBackward0& n) {
  take_normalized(k, [&] {
    const at::Tensor data = k.unpack(n.input_), mean = k.unpack(n.result1_, true), inverse = k.unpack(n.result2_, true);
    const at::Tensor by_group = data.unflatten(1, {mean.size(1), data.size(1) / mean.size(1)}).flatten(2);
    return normalized(by_group, {-1}, mean.unsqueeze(-1), inverse.unsqueeze(-1)).reshape(data.sizes());
  });
}

// ---- batch_norm: over the batch in training, by fixed statistics otherwise.  ints: training; slot 1: what the data are
// multiplied with then.

Pullback batch_norm(const Site& s) {
  const int channel = rank(s.y()) > 1 ? 1 : 0;
  if (s.input != kData) return parameter(s, {along(channel)});
  if (s.output != 0) return opaque();
  if (s.integer(0) != 0) return local(s, {{1, 1}});
  if (!s.has(1)) return leading(s, rank(s.x()));
  FactorBuilder f(s);
  return f.finish(f.read(1, {along(channel)}));
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
void take_batch_norm(Take& k, const N& n) {
  bool training = false;
  if constexpr (requires { n.training; }) training = n.training;
  k.integer(training);
  const auto by_channel = [](const at::Tensor& statistic, const at::Tensor& data) {
    std::vector<std::int64_t> shape(data.dim(), 1);
    shape[std::min<std::int64_t>(1, data.dim() - 1)] = statistic.numel();
    return statistic.reshape(shape);
  };
  if (training) {
    take_normalized(k, [&] {
      const at::Tensor data = k.unpack(n.input_), mean = k.unpack(n.result1_, true), inverse = k.unpack(n.result2_, true);
      std::vector<std::int64_t> axes{0};
      for (std::int64_t a = 2; a < data.dim(); ++a) axes.push_back(a);
      return normalized(data, axes, by_channel(mean, data), by_channel(inverse, data));
    });
    return k.no_slot();
  }
  if constexpr (requires { n.running_var_; }) {
    const at::Tensor data = k.unpack(n.input_), mean = k.unpack(n.running_mean_), variance = k.unpack(n.running_var_);
    if (mean.defined() && variance.defined() && variance.scalar_type() == data.scalar_type() && !mean.requires_grad() &&
        !variance.requires_grad()) {
      const at::Tensor inverse = (variance + eps_of(n)).rsqrt(), weight = k.unpack(n.weight_);
      if (k.needs(kWeight)) {
        k.derived((data - by_channel(mean, data)) * by_channel(inverse, data));
      } else {
        k.no_slot();
      }
      return k.derived(weight.defined() ? weight * inverse : inverse);
    }
  }
  k.no_slot();
  k.no_slot();
}

template <class N>
void add_batch_norm(Table& t, const char* name) {
  t.add<N>(name, take_batch_norm<N>, batch_norm);
}

}  // namespace

void add_normalization(Table& t) {
  t.add<gen::NativeLayerNormBackward0>("NativeLayerNormBackward0", take_layer_norm, over_last_axes);
  t.add<gen::FusedRmsNormBackward0>("FusedRmsNormBackward0", take_rms_norm, over_last_axes);
  t.add<gen::NativeGroupNormBackward0>("NativeGroupNormBackward0", take_group_norm, over_groups);
  t.add<gen::NativeLayerNormBackwardBackward0>(
      "NativeLayerNormBackwardBackward0",
      [](Take& k, const gen::NativeLayerNormBackwardBackward0& n) { k.integer(std::ssize(n.normalized_shape)); },
      over_last_axes_backward);
  add_batch_norm<gen::NativeBatchNormBackward0>(t, "NativeBatchNormBackward0");
  add_batch_norm<gen::NativeBatchNormLegitBackward0>(t, "NativeBatchNormLegitBackward0");
  add_batch_norm<gen::NativeBatchNormLegitBackward1>(t, "NativeBatchNormLegitBackward1");
  add_batch_norm<gen::NativeBatchNormLegitNoTrainingBackward0>(t, "NativeBatchNormLegitNoTrainingBackward0");
  add_batch_norm<gen::CudnnBatchNormBackward0>(t, "CudnnBatchNormBackward0");
}

}  // namespace wengert::tape
