// NOTE [How the compositions come in]
// torch.func's vmap includes a key of the dispatcher, FuncTorchVmapMode, above that of the batching rules; PyTorch has kernels
// there for random operators.  Ours pass on, as an operator without a kernel there would be, unless this thread asked for
// compositions. Formulas and the order of parameters: ATen/native/RNN.cpp.
#include "ops/composed.h"

#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/functorch/DynamicLayer.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace wengert::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

thread_local bool composing = false;

// Autocast chooses precisions by operator, of which a composition has others.
bool composes(const Tensor& tensor) { return composing && !at::autocast::is_autocast_enabled(tensor.device().type()); }

c10::DispatchKeySet below(c10::DispatchKeySet keys) {
  return keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::FuncTorchVmapMode);
}

// ---- recurrent cells ----

struct Parameters {
  Tensor of_input, of_state;
  OptionalTensor input_bias, state_bias;
  Tensor projection;  // of an LSTM's output, if it has one

  // To inputs and states of these sizes.  What PyTorch has errors for would be broadcast or promoted here.
  bool fit(std::int64_t input, std::int64_t h, std::int64_t cell, std::int64_t gates, at::ScalarType dtype) const {
    const std::int64_t rows = gates * cell;
    const auto is = [dtype](const Tensor& matrix, std::int64_t rows, std::int64_t columns) {
      return matrix.dim() == 2 && matrix.size(0) == rows && matrix.size(1) == columns && matrix.scalar_type() == dtype;
    };
    const auto is_bias = [rows, dtype](const OptionalTensor& bias) {
      return !bias || (bias->dim() == 1 && bias->size(0) == rows && bias->scalar_type() == dtype);
    };
    return is(of_input, rows, input) && is(of_state, rows, h) && is_bias(input_bias) && is_bias(state_bias) &&
           (projection.defined() ? is(projection, h, cell) : h == cell);
  }

  Tensor input(const Tensor& x) const { return at::linear(x, of_input, input_bias); }
  Tensor state(const Tensor& h) const { return at::linear(h, of_state, state_bias); }
};

// Each takes the gates that come of the input and gives the next state; the output is its first tensor.
struct Lstm {
  static constexpr std::size_t kStates = 2;
  static constexpr std::int64_t kGates = 4;
  static Tensors next(const Tensor& gates_of_input, const Tensors& state, const Parameters& p) {
    const Tensors gates = (p.state(state[0]) + gates_of_input).unsafe_chunk(4, -1);
    const Tensor cell = gates[1].sigmoid() * state[1] + gates[0].sigmoid() * gates[2].tanh();
    const Tensor out = gates[3].sigmoid() * cell.tanh();
    return {p.projection.defined() ? at::linear(out, p.projection) : out, cell};
  }
};

struct Gru {
  static constexpr std::size_t kStates = 1;
  static constexpr std::int64_t kGates = 3;
  static Tensors next(const Tensor& gates_of_input, const Tensors& state, const Parameters& p) {
    const Tensors of_input = gates_of_input.unsafe_chunk(3, -1), of_state = p.state(state[0]).unsafe_chunk(3, -1);
    const Tensor reset = (of_state[0] + of_input[0]).sigmoid(), update = (of_state[1] + of_input[1]).sigmoid();
    const Tensor fresh = (of_input[2] + of_state[2] * reset).tanh();
    return {(state[0] - fresh) * update + fresh};
  }
};

template <Tensor (*activation)(const Tensor&)>
struct Simple {
  static constexpr std::size_t kStates = 1;
  static constexpr std::int64_t kGates = 1;
  static Tensors next(const Tensor& gates_of_input, const Tensors& state, const Parameters& p) {
    return {activation(p.state(state[0]) + gates_of_input)};
  }
};
using Tanh = Simple<&at::tanh>;
using Relu = Simple<&at::relu>;

bool go_together(const Tensor& input, const Tensor& state) {
  return input.dim() == 2 && state.dim() == 2 && input.size(0) == state.size(0) && input.scalar_type() == state.scalar_type();
}

template <class Cell, class Op>
Tensor cell(c10::DispatchKeySet keys, const Tensor& input, const Tensor& h, const Tensor& of_input, const Tensor& of_state,
            const OptionalTensor& input_bias, const OptionalTensor& state_bias) {
  const Parameters p{of_input, of_state, input_bias, state_bias, {}};
  if (!composes(input) || !go_together(input, h) ||
      !p.fit(input.size(1), h.size(1), h.size(1), Cell::kGates, input.scalar_type())) {
    return Op::redispatch(below(keys), input, h, of_input, of_state, input_bias, state_bias);
  }
  return Cell::next(p.input(input), {h}, p)[0];
}

std::tuple<Tensor, Tensor> lstm_cell(c10::DispatchKeySet keys, const Tensor& input, at::TensorList state, const Tensor& of_input,
                                     const Tensor& of_state, const OptionalTensor& input_bias, const OptionalTensor& state_bias) {
  const Parameters p{of_input, of_state, input_bias, state_bias, {}};
  if (!composes(input) || state.size() != 2 || !go_together(input, state[0]) || !go_together(input, state[1]) ||
      !p.fit(input.size(1), state[0].size(1), state[1].size(1), Lstm::kGates, input.scalar_type())) {
    return at::_ops::lstm_cell::redispatch(below(keys), input, state, of_input, of_state, input_bias, state_bias);
  }
  Tensors next = Lstm::next(p.input(input), state.vec(), p);
  return {std::move(next[0]), std::move(next[1])};
}

// ---- whole recurrent nets ----

struct Net {
  at::TensorList parameters;
  bool has_biases;
  std::int64_t layers;
  double dropout;
  bool train, bidirectional, batch_first;

  std::int64_t directions() const { return bidirectional ? 2 : 1; }
  std::size_t stride() const { return parameters.size() / static_cast<std::size_t>(layers * directions()); }
  template <class Cell>
  bool can_be_composed(const Tensor& input, at::TensorList state) const {
    const std::size_t least = has_biases ? 4 : 2;
    const bool complete = layers > 0 && parameters.size() == stride() * static_cast<std::size_t>(layers * directions()) &&
                          (stride() == least || (Cell::kStates == 2 && stride() == least + 1));
    if (!complete || state.size() != Cell::kStates || (train && dropout != 0 && layers > 1) || input.dim() != 3) return false;
    for (const Tensor& first : state) {
      if (first.dim() != 3 || first.size(0) != layers * directions() || first.size(1) != input.size(batch_first ? 0 : 1) ||
          first.scalar_type() != input.scalar_type())
        return false;
    }
    const std::int64_t h = state[0].size(2), cell = state.back().size(2);
    for (std::int64_t k = 0; k < layers * directions(); ++k) {
      const std::int64_t width = k < directions() ? input.size(2) : directions() * h;
      if (!of(static_cast<std::size_t>(k)).fit(width, h, cell, Cell::kGates, input.scalar_type())) return false;
    }
    return true;
  }
  Parameters of(std::size_t k) const {
    const at::TensorList own = parameters.slice(k * stride(), stride());
    Parameters p{own[0], own[1], {}, {}, {}};
    if (has_biases) {
      p.input_bias = own[2];
      p.state_bias = own[3];
    }
    if (own.size() % 2 != 0) p.projection = own.back();
    return p;
  }
};

// The output and the last states of all layers and directions.
template <class Cell>
std::pair<Tensor, Tensors> unrolled(Tensor x, at::TensorList first_states, const Net& net) {
  if (net.batch_first) x = x.transpose(0, 1);
  std::vector<Tensors> last(Cell::kStates);
  for (std::int64_t layer = 0; layer < net.layers; ++layer) {
    Tensors outputs;
    for (std::int64_t direction = 0; direction < net.directions(); ++direction) {
      const std::int64_t k = layer * net.directions() + direction;
      const Parameters p = net.of(static_cast<std::size_t>(k));
      Tensors steps = p.input(x).unbind(0), state;
      for (const Tensor& first : first_states) state.push_back(first.select(0, k));
      for (std::size_t t = 0; t < steps.size(); ++t) {
        Tensor& step = steps[direction == 0 ? t : steps.size() - 1 - t];
        state = Cell::next(step, state, p);
        step = state[0];
      }
      outputs.push_back(at::stack(steps));
      for (std::size_t s = 0; s < state.size(); ++s) last[s].push_back(state[s]);
    }
    x = outputs.size() == 1 ? outputs[0] : at::cat(outputs, -1);
  }
  Tensors states;
  for (const Tensors& of_all : last) states.push_back(at::stack(of_all));
  return {net.batch_first ? x.transpose(0, 1) : x, std::move(states)};
}

std::tuple<Tensor, Tensor, Tensor> lstm(c10::DispatchKeySet keys, const Tensor& input, at::TensorList state,
                                        at::TensorList parameters, bool has_biases, std::int64_t layers, double dropout,
                                        bool train, bool bidirectional, bool batch_first) {
  const Net net{parameters, has_biases, layers, dropout, train, bidirectional, batch_first};
  if (!composes(input) || !net.can_be_composed<Lstm>(input, state)) {
    return at::_ops::lstm_input::redispatch(below(keys), input, state, parameters, has_biases, layers, dropout, train,
                                            bidirectional, batch_first);
  }
  auto [out, states] = unrolled<Lstm>(input, state, net);
  return {out, states[0], states[1]};
}

template <class Cell, class Op>
std::tuple<Tensor, Tensor> net(c10::DispatchKeySet keys, const Tensor& input, const Tensor& state, at::TensorList parameters,
                               bool has_biases, std::int64_t layers, double dropout, bool train, bool bidirectional,
                               bool batch_first) {
  const Net net{parameters, has_biases, layers, dropout, train, bidirectional, batch_first};
  if (!composes(input) || !net.template can_be_composed<Cell>(input, state)) {
    return Op::redispatch(below(keys), input, state, parameters, has_biases, layers, dropout, train, bidirectional, batch_first);
  }
  auto [out, states] = unrolled<Cell>(input, state, net);
  return {out, states[0]};
}

// ---- attention, bags of embeddings ----

// Scores of all pairs of positions are in memory, which PyTorch's kernel spares.
bool fits_in_memory(const Tensor& query, const Tensor& key) {
  constexpr std::int64_t kMostScores = 1 << 25;
  std::int64_t scores = key.dim() < 2 ? 0 : key.size(-2);
  for (std::int64_t axis = 0; axis + 1 < query.dim(); ++axis) scores *= query.size(axis);
  for (const at::functorch::DynamicLayer& layer : at::functorch::getDynamicLayerStack()) {
    if (layer.key() == at::functorch::TransformType::Vmap) scores *= layer.batchSize().guard_int(__FILE__, __LINE__);
  }
  return scores <= kMostScores;
}

// The kernels of other devices have rules.  Nobody reads the second result, what the backward pass of the kernel itself needs.
std::tuple<Tensor, Tensor> attention(c10::DispatchKeySet keys, const Tensor& query, const Tensor& key, const Tensor& value,
                                     double dropout, bool causal, const OptionalTensor& mask, std::optional<double> scale) {
  if (!composes(query) || dropout != 0 || !fits_in_memory(query, key)) {
    return at::_ops::_scaled_dot_product_flash_attention_for_cpu::redispatch(below(keys), query, key, value, dropout, causal,
                                                                             mask, scale);
  }
  const bool grouped = query.dim() > 2 && query.size(-3) != key.size(-3);
  return {std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, mask, 0, causal, {}, scale, grouped)), Tensor()};
}

// Whether bags begin where they may, and none ends before all places are in one; what else there is PyTorch knows an error for.
bool are_sound(const Tensor& offsets, std::int64_t places, bool include_last) {
  constexpr c10::DispatchKeySet kWrapped({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                          c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize});
  if (offsets.key_set().has_any(kWrapped) || !offsets.is_cpu() || offsets.numel() == 0) return false;
  if (offsets.scalar_type() != at::kLong && offsets.scalar_type() != at::kInt) return false;
  const Tensor values = offsets.to(at::kLong).contiguous();
  const std::int64_t *begin = values.const_data_ptr<std::int64_t>(), *end = begin + values.numel();
  return *begin == 0 && std::is_sorted(begin, end) && (include_last ? end[-1] == places : end[-1] <= places);
}

// Whether all are, of every sample: the rule for indices into a table of each sample would read another's.
bool are_rows(const Tensor& indices, std::int64_t rows) {
  Tensor values = indices;
  while (const at::functorch::BatchedTensorImpl* batched = at::functorch::maybeGetBatchedImpl(values)) values = batched->value();
  constexpr c10::DispatchKeySet kWrapped(
      {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize});
  if (values.key_set().has_any(kWrapped) || !values.is_cpu()) return false;
  if (values.numel() == 0) return true;
  const auto [least, most] = at::aminmax(values);
  return least.item<std::int64_t>() >= 0 && most.item<std::int64_t>() < rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> embedding_bag(c10::DispatchKeySet keys, const Tensor& weight, const Tensor& indices,
                                                         const Tensor& offsets, bool by_frequency, std::int64_t mode, bool sparse,
                                                         const OptionalTensor& weights, bool include_last,
                                                         std::optional<std::int64_t> padding) {
  constexpr std::int64_t kSum = 0, kMean = 1;
  constexpr std::int64_t kMostPairs = 1 << 20;  // of a place and a bag, which are compared
  const bool fit = (!weights || (mode == kSum && weights->dim() == 1 && weights->size(0) == indices.size(0) &&
                                 weights->scalar_type() == weight.scalar_type())) &&
                   (!padding || (*padding < weight.size(0) && *padding >= -weight.size(0)));
  // In half precision PyTorch adds in single precision.
  const bool composed = composes(weight) && (mode == kSum || mode == kMean) && !by_frequency && !sparse && weight.dim() == 2 &&
                        fit && !at::isReducedFloatingType(weight.scalar_type()) && indices.dim() == 1 && offsets.dim() == 1 &&
                        indices.size(0) * offsets.size(0) <= kMostPairs && are_sound(offsets, indices.size(0), include_last) &&
                        are_rows(indices, weight.size(0));
  if (!composed) {
    return at::_ops::embedding_bag_padding_idx::redispatch(below(keys), weight, indices, offsets, by_frequency, mode, sparse,
                                                           weights, include_last, padding);
  }
  const std::int64_t bags = offsets.size(0) - (include_last ? 1 : 0);
  const Tensor begins = include_last ? offsets.narrow(0, 0, bags) : offsets;
  const Tensor places = at::arange(indices.size(0), begins.options());
  const Tensor bag = places.unsqueeze(1).ge(begins).sum(1) - 1;  // the last to begin at or before a place
  Tensor rows = at::embedding(weight, indices), counted = at::ones({indices.size(0)}, weight.options());
  if (weights) rows = rows * weights->unsqueeze(1);
  if (padding) {
    const Tensor counts = indices.ne(*padding < 0 ? *padding + weight.size(0) : *padding);
    rows = at::where(counts.unsqueeze(1), rows, at::zeros({}, rows.options()));
    counted = counts.to(weight.scalar_type());
  }
  Tensor sums = at::zeros({bags, weight.size(1)}, weight.options()).index_add(0, bag, rows);
  if (mode == kMean) sums = sums / at::zeros({bags}, weight.options()).index_add(0, bag, counted).clamp_min(1).unsqueeze(1);
  return {sums, bag, Tensor(), Tensor()};
}

}  // namespace

Composing::Composing() : outer_(std::exchange(composing, true)) {}
Composing::~Composing() { composing = outer_; }

TORCH_LIBRARY_IMPL(aten, FuncTorchVmapMode, m) {
  m.impl("lstm_cell", TORCH_FN(lstm_cell));
  m.impl("gru_cell", TORCH_FN((cell<Gru, at::_ops::gru_cell>)));
  m.impl("rnn_tanh_cell", TORCH_FN((cell<Tanh, at::_ops::rnn_tanh_cell>)));
  m.impl("rnn_relu_cell", TORCH_FN((cell<Relu, at::_ops::rnn_relu_cell>)));
  m.impl("lstm.input", TORCH_FN(lstm));
  m.impl("gru.input", TORCH_FN((net<Gru, at::_ops::gru_input>)));
  m.impl("rnn_tanh.input", TORCH_FN((net<Tanh, at::_ops::rnn_tanh_input>)));
  m.impl("rnn_relu.input", TORCH_FN((net<Relu, at::_ops::rnn_relu_input>)));
  m.impl("_scaled_dot_product_flash_attention_for_cpu", TORCH_FN(attention));
  m.impl("embedding_bag.padding_idx", TORCH_FN(embedding_bag));
}

}  // namespace wengert::ops
