// Nodes with a complex tensor on either side.
//
// NOTE [Complex values]
// Blocks are real.  A complex value of the graph appears on the tape as the real tensor of its (real, imaginary) pairs, one axis
// of extent 2 more than PyTorch's: what PyTorch calls the gradient of z is the pair of derivatives in its two parts, so that
// chain rule and sums are those of real tensors.  Nodes themselves are called, on complex cotangents; tensors that they saved are
// theirs.
#include <torch/csrc/autograd/generated/Functions.h>

#include <algorithm>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;

// The axis of pairs is coupled, all others are carried along.
Pullback elementwise(const Site& s) { return local_batch(s, s.output_meta().complex, s.input_meta().complex); }

Pullback same_pairs(const Site&) { return identity(); }
Pullback reshaped(const Site& s) { return terms({Term{Step(Reshape{s.x()})}}); }

Pullback fourier(const Site& s, const Integers& transformed) {
  const int n = static_cast<int>(s.x().size()) - s.input_meta().complex;
  std::vector<bool> coupled(n, false);
  for (const std::int64_t axis : transformed) coupled[wrap_axis(axis, n)] = true;
  std::vector<std::pair<int, int>> tied;
  for (int a = 0; a < n; ++a) {
    if (!coupled[a]) tied.emplace_back(a, a);
  }
  return local(s, tied);
}

template <class N>
void add_fourier(Table& t, const char* name) {
  t.add<N>(name, Op::local, [](Take& k, const N& n) { return k.concrete(n.dim); }, fourier);
}

}  // namespace

void add_complex(Table& t) {
  add_fourier<gen::FftR2CBackward0>(t, "FftR2CBackward0");
  add_fourier<gen::FftC2RBackward0>(t, "FftC2RBackward0");
  add_fourier<gen::FftC2CBackward0>(t, "FftC2CBackward0");
  t.add<gen::ViewAsRealBackward0>("ViewAsRealBackward0", Op::view, same_pairs);
  t.add<gen::ViewAsComplexBackward0>("ViewAsComplexBackward0", Op::view, same_pairs);
  t.add<gen::CloneBackward0>("CloneBackward0", Op::elementwise, same_pairs);
  t.add<gen::ViewBackward0>("ViewBackward0", Op::view, reshaped);
  t.add<gen::UnsafeViewBackward0>("UnsafeViewBackward0", Op::view, reshaped);
  t.add<gen::ComplexBackward0>("ComplexBackward0", Op::local, elementwise);
  t.add<gen::PolarBackward0>("PolarBackward0", Op::local, elementwise);
  t.add<gen::AbsBackward0>("AbsBackward0", Op::local, elementwise);
  t.add<gen::AngleBackward0>("AngleBackward0", Op::local, elementwise);
  t.add<gen::SgnBackward0>("SgnBackward0", Op::local, elementwise);
  t.add<gen::ConjBackward0>("ConjBackward0", Op::local, elementwise);
  t.add<gen::ConjPhysicalBackward0>("ConjPhysicalBackward0", Op::local, elementwise);
  t.add<gen::ToCopyBackward0>("ToCopyBackward0", Op::local, elementwise);
  t.add<gen::AddBackward0>("AddBackward0", Op::local, elementwise);
  t.add<gen::SubBackward0>("SubBackward0", Op::local, elementwise);
  t.add<gen::MulBackward0>("MulBackward0", Op::local, elementwise);
  t.add<gen::DivBackward0>("DivBackward0", Op::local, elementwise);
  t.add<gen::NegBackward0>("NegBackward0", Op::local, elementwise);
  t.add<gen::ReciprocalBackward0>("ReciprocalBackward0", Op::local, elementwise);
  t.add<gen::PowBackward0>("PowBackward0", Op::local, elementwise);
  t.add<gen::PowBackward1>("PowBackward1", Op::local, elementwise);
  t.add<gen::SqrtBackward0>("SqrtBackward0", Op::local, elementwise);
  t.add<gen::ExpBackward0>("ExpBackward0", Op::local, elementwise);
  t.add<gen::LogBackward0>("LogBackward0", Op::local, elementwise);
  t.add<gen::SinBackward0>("SinBackward0", Op::local, elementwise);
  t.add<gen::CosBackward0>("CosBackward0", Op::local, elementwise);
  t.add<gen::TanhBackward0>("TanhBackward0", Op::local, elementwise);
}

}  // namespace wengert::tape
