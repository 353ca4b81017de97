// Matrix products: the contracted axis is a new loop, the other matrix is the factor.
#include <torch/csrc/autograd/generated/Functions.h>

#include <string_view>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::ExprId;

// y = scale * contraction of the input with the other operand, axes named by letters as in einsum.
struct Letters {
  std::string_view y, x, other;  // of a product of two: left and right
};

Pullback contracted(const Site& s, const Letters& letters, Slot saved, double scale) {
  FactorBuilder f(s);
  if (!s.has(saved)) return opaque();
  std::vector<std::int64_t> loops;
  std::string_view::value_type fresh[4] = {};
  const int y_rank = static_cast<int>(letters.y.size());
  const auto source = [&](char letter, std::int64_t extent) {
    const auto at = letters.y.find(letter);
    if (at != std::string_view::npos) return static_cast<int>(at);
    for (std::size_t q = 0; q < loops.size(); ++q) {
      if (fresh[q] == letter) return y_rank + static_cast<int>(q);
    }
    fresh[loops.size()] = letter;
    loops.push_back(extent);
    return y_rank + static_cast<int>(loops.size()) - 1;
  };
  Axes axes, other;
  for (std::size_t a = 0; a < letters.x.size(); ++a) axes.push_back(along(source(letters.x[a], s.x()[a])));
  const at::IntArrayRef other_shape = s.slot(saved).sizes();
  for (std::size_t a = 0; a < letters.other.size(); ++a) other.push_back(along(source(letters.other[a], other_shape[a])));
  ExprId expr = f.read(saved, std::move(other));
  if (scale != 1) expr = s.pool.mul(expr, f.constant(scale));
  return f.finish(expr, std::move(loops), std::move(axes));
}

struct Factors {
  Slot left, right;
};

// y = left @ right; edges `first` and first + 1.
Pullback product_of_two(const Site& s, const Factors& p, const Letters& letters, int first = 0, double scale = 1) {
  const auto& [y, left, right] = letters;
  return s.input == first ? contracted(s, {y, left, right}, p.right, scale) : contracted(s, {y, right, left}, p.left, scale);
}

constexpr Letters kMatrices{"ij", "ik", "kj"}, kBatches{"bij", "bik", "bkj"}, kMatrixVector{"i", "ik", "k"},
    kVectors{"", "k", "k"}, kOuter{"ij", "i", "j"}, kSummedBatches{"ij", "bik", "bkj"};

template <const Letters& letters>
Pullback multiplied(const Site& s, const Factors& p) {
  return product_of_two(s, p, letters);
}

// beta * added + alpha * left @ right
struct AddedProduct {
  double beta, alpha;
  Factors of;
};
template <const Letters& letters>
Pullback added(const Site& s, const AddedProduct& p) {
  if (s.input != 0) return product_of_two(s, p.of, letters, 1, p.alpha);
  FactorBuilder f(s);
  return f.finish(f.constant(p.beta));
}

Factors two(Take& k, const SavedVariable& left, const SavedVariable& right, int first = 0) {
  return {k.saved(left, k.needs(first + 1)), k.saved(right, k.needs(first))};
}
template <class N>
AddedProduct added_two(Take& k, const N& n, const SavedVariable& left, const SavedVariable& right) {
  return {k.number(n.beta), k.number(n.alpha), two(k, left, right, 1)};
}

}  // namespace

void add_matmul(Table& t) {
  t.add<gen::MmBackward0>(
      "MmBackward0", Op::product, [](Take& k, const gen::MmBackward0& n) { return two(k, n.self_, n.mat2_); },
      multiplied<kMatrices>);
  t.add<gen::BmmBackward0>(
      "BmmBackward0", Op::product, [](Take& k, const gen::BmmBackward0& n) { return two(k, n.self_, n.mat2_); },
      multiplied<kBatches>);
  t.add<gen::MvBackward0>(
      "MvBackward0", Op::product, [](Take& k, const gen::MvBackward0& n) { return two(k, n.self_, n.vec_); },
      multiplied<kMatrixVector>);
  t.add<gen::DotBackward0>(
      "DotBackward0", Op::product, [](Take& k, const gen::DotBackward0& n) { return two(k, n.self_, n.tensor_); },
      multiplied<kVectors>);
  t.add<gen::VdotBackward0>(
      "VdotBackward0", Op::product, [](Take& k, const gen::VdotBackward0& n) { return two(k, n.self_, n.other_); },
      multiplied<kVectors>);
  t.add<gen::AddmmBackward0>(
      "AddmmBackward0", Op::product, [](Take& k, const gen::AddmmBackward0& n) { return added_two(k, n, n.mat1_, n.mat2_); },
      added<kMatrices>);
  t.add<gen::AddmvBackward0>(
      "AddmvBackward0", Op::product, [](Take& k, const gen::AddmvBackward0& n) { return added_two(k, n, n.mat_, n.vec_); },
      added<kMatrixVector>);
  t.add<gen::AddrBackward0>(
      "AddrBackward0", Op::product, [](Take& k, const gen::AddrBackward0& n) { return added_two(k, n, n.vec1_, n.vec2_); },
      added<kOuter>);
  t.add<gen::BaddbmmBackward0>(
      "BaddbmmBackward0", Op::product,
      [](Take& k, const gen::BaddbmmBackward0& n) { return added_two(k, n, n.batch1_, n.batch2_); }, added<kBatches>);
  t.add<gen::AddbmmBackward0>(
      "AddbmmBackward0", Op::product,
      [](Take& k, const gen::AddbmmBackward0& n) { return added_two(k, n, n.batch1_, n.batch2_); }, added<kSummedBatches>);
}

}  // namespace wengert::tape
