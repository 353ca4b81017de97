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
  std::string_view y, x, other;
};

Pullback contracted(const Site& s, const Letters& letters, int other_slot, double scale) {
  FactorBuilder f(s);
  if (!s.has(other_slot)) return opaque();
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
  const at::IntArrayRef other_shape = s.slot(other_slot).sizes();
  for (std::size_t a = 0; a < letters.other.size(); ++a) other.push_back(along(source(letters.other[a], other_shape[a])));
  ExprId expr = f.read(other_slot, std::move(other));
  if (scale != 1) expr = s.pool.mul(expr, f.constant(scale));
  return f.finish(expr, std::move(loops), std::move(axes));
}

// y = left @ right; edges `first` and first + 1, slots 0 and 1 in that order.
Pullback product_of_two(const Site& s, std::string_view y, std::string_view left, std::string_view right, int first,
                        double scale) {
  const bool is_left = s.input == first;
  return contracted(s, is_left ? Letters{y, left, right} : Letters{y, right, left}, is_left ? 1 : 0, scale);
}

// The added term: reals are beta, alpha.
Pullback added(const Site& s) {
  FactorBuilder f(s);
  return f.finish(f.real(0));
}

Pullback matrix(const Site& s) { return product_of_two(s, "ij", "ik", "kj", 0, 1); }
Pullback batched(const Site& s) { return product_of_two(s, "bij", "bik", "bkj", 0, 1); }

void read_two(Take& k, const SavedVariable& left, const SavedVariable& right, int first) {
  k.slot(left, k.needs(first + 1));
  k.slot(right, k.needs(first));
}

}  // namespace

void add_matmul(Table& t) {
  t.add<gen::MmBackward0>("MmBackward0", [](Take& k, const gen::MmBackward0& n) { read_two(k, n.self_, n.mat2_, 0); }, matrix);
  t.add<gen::BmmBackward0>(
      "BmmBackward0", [](Take& k, const gen::BmmBackward0& n) { read_two(k, n.self_, n.mat2_, 0); }, batched);
  t.add<gen::MvBackward0>(
      "MvBackward0", [](Take& k, const gen::MvBackward0& n) { read_two(k, n.self_, n.vec_, 0); },
      [](const Site& s) { return product_of_two(s, "i", "ik", "k", 0, 1); });
  t.add<gen::DotBackward0>(
      "DotBackward0", [](Take& k, const gen::DotBackward0& n) { read_two(k, n.self_, n.tensor_, 0); },
      [](const Site& s) { return product_of_two(s, "", "k", "k", 0, 1); });
  t.add<gen::VdotBackward0>(
      "VdotBackward0", [](Take& k, const gen::VdotBackward0& n) { read_two(k, n.self_, n.other_, 0); },
      [](const Site& s) { return product_of_two(s, "", "k", "k", 0, 1); });
  t.add<gen::AddmmBackward0>(
      "AddmmBackward0",
      [](Take& k, const gen::AddmmBackward0& n) {
        k.real(n.beta);
        k.real(n.alpha);
        read_two(k, n.mat1_, n.mat2_, 1);
      },
      [](const Site& s) { return s.input == 0 ? added(s) : product_of_two(s, "ij", "ik", "kj", 1, s.real(1)); });
  t.add<gen::AddmvBackward0>(
      "AddmvBackward0",
      [](Take& k, const gen::AddmvBackward0& n) {
        k.real(n.beta);
        k.real(n.alpha);
        read_two(k, n.mat_, n.vec_, 1);
      },
      [](const Site& s) { return s.input == 0 ? added(s) : product_of_two(s, "i", "ik", "k", 1, s.real(1)); });
  t.add<gen::AddrBackward0>(
      "AddrBackward0",
      [](Take& k, const gen::AddrBackward0& n) {
        k.real(n.beta);
        k.real(n.alpha);
        read_two(k, n.vec1_, n.vec2_, 1);
      },
      [](const Site& s) { return s.input == 0 ? added(s) : product_of_two(s, "ij", "i", "j", 1, s.real(1)); });
  t.add<gen::BaddbmmBackward0>(
      "BaddbmmBackward0",
      [](Take& k, const gen::BaddbmmBackward0& n) {
        k.real(n.beta);
        k.real(n.alpha);
        read_two(k, n.batch1_, n.batch2_, 1);
      },
      [](const Site& s) { return s.input == 0 ? added(s) : product_of_two(s, "bij", "bik", "bkj", 1, s.real(1)); });
  t.add<gen::AddbmmBackward0>(
      "AddbmmBackward0",
      [](Take& k, const gen::AddbmmBackward0& n) {
        k.real(n.beta);
        k.real(n.alpha);
        read_two(k, n.batch1_, n.batch2_, 1);
      },
      [](const Site& s) { return s.input == 0 ? added(s) : product_of_two(s, "ij", "bik", "bkj", 1, s.real(1)); });
}

}  // namespace wengert::tape
