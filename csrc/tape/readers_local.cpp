// Ops that stay PyTorch's own: the node is called, with the axes it does not couple carried along.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/headeronly/version.h>

#include <algorithm>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::ExprId;
using fused::kOne;

int rank(const Shape& shape) { return static_cast<int>(shape.size()); }

// Everything but one axis is carried along.
Pullback along_one_axis(const Site& s, std::int64_t dim) {
  const int n = rank(s.x());
  if (n == 0 || n != rank(s.y())) return opaque();
  const int axis = wrap_axis(dim, n);
  std::vector<std::pair<int, int>> tied;
  for (int a = 0; a < n; ++a) {
    if (a != axis) tied.emplace_back(a, a);
  }
  return local(s, tied);
}

template <class N>
void add_scan(Table& t, const char* name) {
  t.add<N>(name, Op::local, [](Take&, const N& n) { return n.dim; }, along_one_axis);
}
// The value of a scan that also gives indices; these have no derivative.
template <class N>
void add_picking_scan(Table& t, const char* name) {
  t.add<N>(
      name, Op::local, [](Take&, const N& n) { return n.dim; },
      [](const Site& s, std::int64_t dim) { return s.output == 0 ? along_one_axis(s, dim) : opaque(); });
}

// y[b, o, h..] = sum over c, i..  x[b, c, stride * h + dilation * i ..] * w[o, c, i..]  + bias[o]
struct Convolution {
  Integers stride, dilation;
  Slot data;  // padded, where structure in the weights is wanted
};
Pullback convolution(const Site& s, const Convolution& p) {
  if (s.input == 0) return leading(s, 1);
  FactorBuilder f(s);
  if (s.input == 2) return f.finish(kOne, {}, {along(1)});
  if (!s.has(p.data)) return opaque();
  const int n = rank(s.y()), spatial = n - 2, loops = n;  // the number of the first loop
  const Shape &w = s.x(), x = s.slot(p.data).sizes().vec();
  const bool depthwise = w[1] == 1 && x[1] == w[0];
  if (x[1] != w[1] && !depthwise) return opaque();  // groups of several channels: which one is no affine function of o
  Axes data{along(0), depthwise ? along(1) : along(loops)}, weight{along(1), along(loops)};
  for (int d = 0; d < spatial; ++d) {
    AxisMap at = along(2 + d, p.stride[d]);
    at.terms.push_back({loops + 1 + d, p.dilation[d]});
    data.push_back(std::move(at));
    weight.push_back(along(loops + 1 + d));
  }
  const ExprId value = f.read(p.data, std::move(data));
  return f.finish(value, {w.begin() + 1, w.end()}, std::move(weight));
}

template <class N>
Convolution take_convolution(Take& k, const N& n) {
  const std::int64_t spatial = std::ssize(k.node().outputs[0].shape) - 2;
  Convolution result{k.per_axis(n.stride, spatial), k.per_axis(n.dilation, spatial), {}};
  // One row is PyTorch's: its kernels need no windows written out.
  if (n.transposed || !k.needs(1) || k.one_row()) return result;
  const Integers sides = k.per_axis(n.padding, spatial);
  Integers padding;  // from the last axis on, both sides
  for (auto side = sides.rbegin(); side != sides.rend(); ++side) padding.append(2, *side);
  const at::Tensor data = k.unpack(n.input_);
  const bool padded = std::ranges::any_of(padding, [](std::int64_t side) { return side != 0; });
  result.data = k.derived(padded ? at::constant_pad_nd(data, padding) : data);
  return result;
}

// Of the older ops and of the backward's backward only the data's batch is known.
Pullback convolution_of_data(const Site& s) { return s.input == 0 ? leading(s, 1) : opaque(); }

// Pooling, padding and resizing work on the last axes of each channel.
template <int Core>
Pullback by_channel(const Site& s) {
  return s.output == 0 ? local_batch(s, Core, Core) : opaque();
}

// max pooling kept the position of every maximum within the flattened plane.  One row is PyTorch's, which adds them there at
// once.
template <int Core>
Pullback max_pool(const Site& s, Slot positions) {
  if (s.output != 0 || !s.has(positions, s.y()) || rank(s.x()) < Core) return opaque();
  const int batch = rank(s.x()) - Core;
  Gather gather;
  gather.axes = own_axes(batch);
  gather.in_shape.assign(s.x().begin(), s.x().begin() + batch);
  gather.in_shape.push_back(product(s.x()) / std::max<std::int64_t>(product(gather.in_shape), 1));
  gather.axes.push_back(looked_up(positions, own_axes(rank(s.y()))));
  return terms({Term{Step(std::move(gather)), Step(Reshape{s.x()})}});
}

// The backward ops of the above are linear in grad_output (edge 0), channel by channel; the other edge only gives a shape or a
// choice.
template <int Core>
Pullback backward_by_channel(const Site& s) {
  return s.input == 0 ? by_channel<Core>(s) : zero();
}

template <class N, int Core>
void add_max_pool(Table& t, const char* name) {
  t.add<N>(name, Op::index, [](Take& k, const N& n) { return k.result(n.result1_, !k.one_row()); }, max_pool<Core>);
}

// Matrices: batch axes stand before the last two.
Pullback matrix(const Site& s) { return local_batch(s, 2, 2); }
// An entry of a matrix moves one determinant, so that the node's answer to ones is the whole derivative.  Called batched it would
// go through singular values, whose own derivative does not exist where two are equal, as those of the identity are.
Pullback determinant(const Site& s, Slot table) {
  if (!s.has(table, s.x())) return local_batch(s, 0, 2);
  Reduction r = reduction(s.x(), {rank(s.x()) - 2, rank(s.x()) - 1}, /*keepdim=*/false);
  FactorBuilder f(s);
  const fused::ExprId entry = f.read(table, r.axes);
  return f.finish(entry, std::move(r.loops), std::move(r.axes));
}
// Decompositions give vectors and matrices: whatever follows the batch axes of the input belongs to the matrix.
Pullback decomposition(const Site& s) { return leading(s, rank(s.x()) - 2); }
// Solutions of equations: y and the right-hand side are matrices, or vectors where they lack an axis of A.
Pullback solution(const Site& s, std::int64_t rank_of_a) {
  const int core = rank(s.y()) < rank_of_a ? 1 : 2;
  return local_batch(s, core, s.input == 0 ? 2 : core);
}

// Gates and states have samples along their first axis, biases have none.
Pullback recurrent_cell(const Site& s) { return rank(s.x()) == 2 ? leading(s, 1) : opaque(); }
// Of log probabilities (steps, samples, classes), or (steps, classes) of one sample, a loss for each sample.
Pullback connectionist_loss(const Site& s) { return s.output == 0 && rank(s.x()) == 3 ? local(s, {{0, 1}}) : opaque(); }
Pullback by_sample(const Site& s) { return leading(s, 1); }

void add_linear_algebra(Table& t) {
  t.add<gen::LinalgDetBackward0>(
      "LinalgDetBackward0", Op::reduction,
      // Without a graph the node says 0 of a matrix whose determinant is exactly 0.
      [](Take& k, const gen::LinalgDetBackward0&) { return tabulate_fully(k, 1)[0]; },
      [](const Site& s, Slot table) { return s.output == 0 ? determinant(s, table) : opaque(); });
  t.add<gen::LinalgSlogdetBackward0>(  // gives the sign, which does not move, and the logarithm
      "LinalgSlogdetBackward0", Op::reduction,
      [](Take& k, const gen::LinalgSlogdetBackward0&) {
        try {
          return tabulate(k, 1, 1)[0];
        } catch (const c10::Error&) {  // a singular matrix, of which the logarithm may not be wanted
          return Slot();
        }
      },
      [](const Site& s, Slot table) { return s.output == 1 ? determinant(s, table) : none(); });
  t.add<gen::LinalgInvExBackward0>("LinalgInvExBackward0", Op::local, matrix);
  t.add<gen::LinalgPinvBackward0>("LinalgPinvBackward0", Op::local, matrix);
  t.add<gen::LinalgCholeskyExBackward0>("LinalgCholeskyExBackward0", Op::local, matrix);
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 14  // later, cholesky is linalg_cholesky_ex
  t.add<gen::CholeskyBackward0>("CholeskyBackward0", Op::local, matrix);
#endif
  t.add<gen::CholeskyInverseBackward0>("CholeskyInverseBackward0", Op::local, matrix);
  t.add<gen::CholeskySolveBackward0>("CholeskySolveBackward0", Op::local, matrix);
  t.add<gen::TriangularSolveBackward0>("TriangularSolveBackward0", Op::local,
                                       [](const Site& s) { return s.output == 0 ? matrix(s) : opaque(); });
  t.add<gen::LinalgSolveTriangularBackward0>("LinalgSolveTriangularBackward0", Op::local, matrix);
  t.add<gen::LinalgMatrixExpBackward0>("LinalgMatrixExpBackward0", Op::local, matrix);
  t.add<gen::LinalgLuSolveBackward0>("LinalgLuSolveBackward0", Op::local, matrix);
  t.add<gen::LinalgSvdBackward0>("LinalgSvdBackward0", Op::local, decomposition);
  t.add<gen::LinalgEighBackward0>("LinalgEighBackward0", Op::local, decomposition);
  t.add<gen::LinalgQrBackward0>("LinalgQrBackward0", Op::local, matrix);
  t.add<gen::LinalgLuBackward0>("LinalgLuBackward0", Op::local, decomposition);
  t.add<gen::LinalgLuFactorExBackward0>("LinalgLuFactorExBackward0", Op::local, decomposition);
  t.add<gen::LuUnpackBackward0>("LuUnpackBackward0", Op::local, decomposition);
  t.add<gen::LinalgLstsqBackward0>("LinalgLstsqBackward0", Op::local, decomposition);
  t.add<gen::CdistBackward0>("CdistBackward0", Op::local, matrix);
  t.add<gen::LinalgSolveExBackward0>(
      "LinalgSolveExBackward0", Op::local,
      [](Take& k, const gen::LinalgSolveExBackward0& n) { return k.unpack(n.LU_, /*is_result=*/true).dim(); }, solution);
}

void add_images(Table& t) {
  t.add<gen::ConvolutionBackward0>("ConvolutionBackward0", Op::local, take_convolution<gen::ConvolutionBackward0>, convolution);
  t.add<gen::ConvolutionBackward1>("ConvolutionBackward1", Op::local, take_convolution<gen::ConvolutionBackward1>, convolution);
  t.add<gen::SlowConv2DBackward0>("SlowConv2DBackward0", Op::local, convolution_of_data);
  t.add<gen::SlowConvDilated2DBackward0>("SlowConvDilated2DBackward0", Op::local, convolution_of_data);
  t.add<gen::SlowConvTranspose2DBackward0>("SlowConvTranspose2DBackward0", Op::local, convolution_of_data);
  t.add<gen::SlowConvTranspose3DBackward0>("SlowConvTranspose3DBackward0", Op::local, convolution_of_data);
  t.add<gen::AvgPool2DBackward0>("AvgPool2DBackward0", Op::local, by_channel<2>);
  t.add<gen::AvgPool3DBackward0>("AvgPool3DBackward0", Op::local, by_channel<3>);
  t.add<gen::AdaptiveAvgPool2DBackward0>("AdaptiveAvgPool2DBackward0", Op::local, by_channel<2>);
  t.add<gen::AdaptiveAvgPool3DBackward0>("AdaptiveAvgPool3DBackward0", Op::local, by_channel<3>);
  t.add<gen::ReflectionPad1DBackward0>("ReflectionPad1DBackward0", Op::local, by_channel<1>);
  t.add<gen::ReflectionPad2DBackward0>("ReflectionPad2DBackward0", Op::local, by_channel<2>);
  t.add<gen::ReflectionPad3DBackward0>("ReflectionPad3DBackward0", Op::local, by_channel<3>);
  t.add<gen::ReplicationPad1DBackward0>("ReplicationPad1DBackward0", Op::local, by_channel<1>);
  t.add<gen::ReplicationPad2DBackward0>("ReplicationPad2DBackward0", Op::local, by_channel<2>);
  t.add<gen::ReplicationPad3DBackward0>("ReplicationPad3DBackward0", Op::local, by_channel<3>);
  t.add<gen::UpsampleLinear1DBackward0>("UpsampleLinear1DBackward0", Op::local, by_channel<1>);
  t.add<gen::UpsampleBilinear2DBackward0>("UpsampleBilinear2DBackward0", Op::local, by_channel<2>);
  t.add<gen::UpsampleBicubic2DBackward0>("UpsampleBicubic2DBackward0", Op::local, by_channel<2>);
  t.add<gen::UpsampleTrilinear3DBackward0>("UpsampleTrilinear3DBackward0", Op::local, by_channel<3>);
  t.add<gen::UpsampleNearest1DBackward0>("UpsampleNearest1DBackward0", Op::local, by_channel<1>);
  t.add<gen::UpsampleNearest2DBackward0>("UpsampleNearest2DBackward0", Op::local, by_channel<2>);
  t.add<gen::UpsampleNearest3DBackward0>("UpsampleNearest3DBackward0", Op::local, by_channel<3>);
  t.add<gen::UpsampleNearestExact1DBackward0>("UpsampleNearestExact1DBackward0", Op::local, by_channel<1>);
  t.add<gen::UpsampleNearestExact2DBackward0>("UpsampleNearestExact2DBackward0", Op::local, by_channel<2>);
  t.add<gen::UpsampleNearestExact3DBackward0>("UpsampleNearestExact3DBackward0", Op::local, by_channel<3>);
  t.add<gen::UpsampleBilinear2DAaBackward0>("UpsampleBilinear2DAaBackward0", Op::local, by_channel<2>);
  t.add<gen::UpsampleBicubic2DAaBackward0>("UpsampleBicubic2DAaBackward0", Op::local, by_channel<2>);
  t.add<gen::MaxUnpool2DBackward0>("MaxUnpool2DBackward0", Op::local, by_channel<2>);
  t.add<gen::MaxUnpool3DBackward0>("MaxUnpool3DBackward0", Op::local, by_channel<3>);
  t.add<gen::Im2ColBackward0>("Im2ColBackward0", Op::local, by_sample);
  t.add<gen::Col2ImBackward0>("Col2ImBackward0", Op::local, by_sample);
  t.add<gen::ChannelShuffleBackward0>("ChannelShuffleBackward0", Op::local, by_sample);
  t.add<gen::GridSampler2DBackward0>("GridSampler2DBackward0", Op::local, by_sample);
  t.add<gen::GridSampler3DBackward0>("GridSampler3DBackward0", Op::local, by_sample);
  t.add<gen::PixelShuffleBackward0>("PixelShuffleBackward0", Op::local, by_channel<3>);
  t.add<gen::PixelUnshuffleBackward0>("PixelUnshuffleBackward0", Op::local, by_channel<3>);
  t.add<gen::ConvolutionBackwardBackward0>("ConvolutionBackwardBackward0", Op::local,
                                           [](const Site& s) { return s.output == 0 ? convolution_of_data(s) : opaque(); });
  t.add<gen::AvgPool2DBackwardBackward0>("AvgPool2DBackwardBackward0", Op::local, backward_by_channel<2>);
  t.add<gen::AvgPool3DBackwardBackward0>("AvgPool3DBackwardBackward0", Op::local, backward_by_channel<3>);
  t.add<gen::AdaptiveAvgPool2DBackwardBackward0>("AdaptiveAvgPool2DBackwardBackward0", Op::local, backward_by_channel<2>);
  t.add<gen::AdaptiveAvgPool3DBackwardBackward0>("AdaptiveAvgPool3DBackwardBackward0", Op::local, backward_by_channel<3>);
  t.add<gen::MaxPool2DWithIndicesBackwardBackward0>("MaxPool2DWithIndicesBackwardBackward0", Op::local, backward_by_channel<2>);
  t.add<gen::MaxPool3DWithIndicesBackwardBackward0>("MaxPool3DWithIndicesBackwardBackward0", Op::local, backward_by_channel<3>);
  t.add<gen::AdaptiveMaxPool2DBackwardBackward0>("AdaptiveMaxPool2DBackwardBackward0", Op::local, backward_by_channel<2>);
  t.add<gen::AdaptiveMaxPool3DBackwardBackward0>("AdaptiveMaxPool3DBackwardBackward0", Op::local, backward_by_channel<3>);
  t.add<gen::ReflectionPad1DBackwardBackward0>("ReflectionPad1DBackwardBackward0", Op::local, backward_by_channel<1>);
  t.add<gen::ReflectionPad2DBackwardBackward0>("ReflectionPad2DBackwardBackward0", Op::local, backward_by_channel<2>);
  t.add<gen::ReplicationPad1DBackwardBackward0>("ReplicationPad1DBackwardBackward0", Op::local, backward_by_channel<1>);
  t.add<gen::ReplicationPad2DBackwardBackward0>("ReplicationPad2DBackwardBackward0", Op::local, backward_by_channel<2>);
  t.add<gen::UpsampleBilinear2DBackwardBackward0>("UpsampleBilinear2DBackwardBackward0", Op::local, backward_by_channel<2>);
  t.add<gen::UpsampleNearest2DBackwardBackward0>("UpsampleNearest2DBackwardBackward0", Op::local, backward_by_channel<2>);
  add_max_pool<gen::MaxPool2DWithIndicesBackward0, 2>(t, "MaxPool2DWithIndicesBackward0");
  add_max_pool<gen::MaxPool3DWithIndicesBackward0, 3>(t, "MaxPool3DWithIndicesBackward0");
  add_max_pool<gen::AdaptiveMaxPool2DBackward0, 2>(t, "AdaptiveMaxPool2DBackward0");
  add_max_pool<gen::AdaptiveMaxPool3DBackward0, 3>(t, "AdaptiveMaxPool3DBackward0");
}

}  // namespace

void add_local(Table& t) {
  add_scan<gen::CumsumBackward0>(t, "CumsumBackward0");
  add_scan<gen::CumprodBackward0>(t, "CumprodBackward0");
  add_scan<gen::LogcumsumexpBackward0>(t, "LogcumsumexpBackward0");
  add_scan<gen::LinalgCrossBackward0>(t, "LinalgCrossBackward0");
  add_picking_scan<gen::CummaxBackward0>(t, "CummaxBackward0");
  add_picking_scan<gen::CumminBackward0>(t, "CumminBackward0");
  add_scan<gen::ScatterReduceBackward0>(t, "ScatterReduceBackward0");
  add_scan<gen::IndexReduceBackward0>(t, "IndexReduceBackward0");
  t.add<gen::ThnnFusedGruCellBackward0>("ThnnFusedGruCellBackward0", Op::local, recurrent_cell);
  t.add<gen::ThnnFusedLstmCellBackward0>("ThnnFusedLstmCellBackward0", Op::local, recurrent_cell);
  t.add<gen::CtcLossBackward0>("CtcLossBackward0", Op::local, connectionist_loss);
  t.add<gen::CtcLossBackward1>("CtcLossBackward1", Op::local, connectionist_loss);
  add_images(t);
  add_linear_algebra(t);
}

}  // namespace wengert::tape
