#include "blocks/block.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <utility>

namespace wengert::blocks {

std::int64_t numel(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

bool Affine::is_constant() const {
  return std::all_of(step.begin(), step.end(), [](std::int64_t s) { return s == 0; });
}

std::int64_t Affine::lowest(const Shape& extents) const {
  std::int64_t value = start;
  for (std::size_t k = 0; k < step.size(); ++k) value += std::min<std::int64_t>(0, step[k] * (extents[k] - 1));
  return value;
}

std::int64_t Affine::highest(const Shape& extents) const {
  std::int64_t value = start;
  for (std::size_t k = 0; k < step.size(); ++k) value += std::max<std::int64_t>(0, step[k] * (extents[k] - 1));
  return value;
}

bool Read::moves(std::size_t k) const {
  return std::any_of(axes.begin(), axes.end(), [k](const Affine& axis) { return axis.moves(k); });
}

Coord constant_coord(std::size_t loops, std::int64_t start) {
  return Coord{.affine = {.start = start, .step = std::vector<std::int64_t>(loops, 0)}, .index = {}};
}

Coord loop_coord(std::size_t loops, std::size_t loop, std::int64_t step) {
  Coord coord = constant_coord(loops);
  coord.affine.step[loop] = step;
  return coord;
}

std::vector<bool> determined_loops(const Shape& extents, const std::vector<Coord>& coords, const std::vector<bool>& use) {
  // A loop is determined by an axis which, apart from it, only determined loops move.
  const std::size_t n = extents.size();
  std::vector<bool> known(n, false);
  std::size_t left = n;
  const auto eliminate = [&] {
    for (bool progress = true; progress && left > 0;) {
      progress = false;
      for (std::size_t a = 0; a < coords.size(); ++a) {
        if (!use[a] || coords[a].has_index()) continue;
        std::size_t unknown = n, count = 0;
        for (std::size_t k = 0; k < n; ++k) {
          if (!known[k] && coords[a].affine.moves(k)) unknown = k, ++count;
        }
        if (count != 1) continue;
        known[unknown] = progress = true;
        --left;
      }
    }
  };
  eliminate();
  // Digits of one axis: sorted by step, each loop steps over everything the smaller ones reach.
  for (std::size_t a = 0; a < coords.size() && left > 0; ++a) {
    if (!use[a] || coords[a].has_index()) continue;
    std::vector<std::pair<std::int64_t, std::size_t>> digits;
    for (std::size_t k = 0; k < n; ++k) {
      if (!known[k] && coords[a].affine.moves(k)) digits.emplace_back(std::abs(coords[a].affine.step[k]), k);
    }
    std::sort(digits.begin(), digits.end());
    std::int64_t reach = 0;
    bool separate = true;
    for (auto [step, k] : digits) {
      separate = separate && step > reach;
      reach += step * (extents[k] - 1);
    }
    if (!separate || digits.empty()) continue;
    for (auto [step, k] : digits) {
      known[k] = true;
      --left;
    }
    eliminate();
  }
  return known;
}

bool Value::moves(std::size_t k) const {
  return std::any_of(operands.begin(), operands.end(), [k](const Read& read) { return read.moves(k); });
}

bool Block::moves_row(std::size_t k) const {
  return std::any_of(row.begin(), row.end(), [k](const Coord& coord) { return coord.moves(k); });
}

bool Block::moves_col(std::size_t k) const {
  return std::any_of(col.begin(), col.end(), [k](const Coord& coord) { return coord.moves(k); });
}

bool Block::empty() const { return std::find(extents.begin(), extents.end(), 0) != extents.end(); }

std::int64_t Block::logical() const { return numel(extents); }

std::int64_t Block::stored() const {
  std::int64_t count = 1;
  for (std::size_t k = 0; k < loops(); ++k) {
    if (value.moves(k)) count *= extents[k];
  }
  return count;
}

Block identity(const Shape& shape, fused::Dtype dtype) {
  Block block{.extents = shape, .value = {}, .row = {}, .col = {}, .row_shape = shape, .col_shape = shape, .dtype = dtype};
  for (std::size_t a = 0; a < shape.size(); ++a) block.row.push_back(loop_coord(shape.size(), a));
  block.col = block.row;
  normalize(block);
  return block;
}

void append_loops(Block& block, const Shape& extents) {
  if (extents.empty()) return;
  block.extents.insert(block.extents.end(), extents.begin(), extents.end());
  const std::size_t n = block.loops();
  for_each_affine(block, [n](Affine& affine) { affine.step.resize(n, 0); });
}

void drop_loop(Block& block, std::size_t k) {
  block.extents.erase(block.extents.begin() + k);
  for_each_affine(block, [k](Affine& affine) { affine.step.erase(affine.step.begin() + k); });
}

void split_loop(Block& block, std::size_t k, std::int64_t inner) {
  const std::int64_t outer = block.extents[k] / inner;
  block.extents[k] = outer;
  block.extents.insert(block.extents.begin() + k + 1, inner);
  for_each_affine(block, [k, inner](Affine& affine) {
    affine.step.insert(affine.step.begin() + k + 1, affine.step[k]);
    affine.step[k] *= inner;
  });
}

void restrict_loop(Block& block, std::size_t k, std::int64_t first, std::int64_t stride, std::int64_t count) {
  block.extents[k] = count;
  for_each_affine(block, [=](Affine& affine) {
    affine.start += affine.step[k] * first;
    affine.step[k] *= stride;
  });
}

void permute_loops(Block& block, const std::vector<std::size_t>& order) {
  auto permuted = [&order](const std::vector<std::int64_t>& old) {
    std::vector<std::int64_t> out(order.size());
    for (std::size_t k = 0; k < order.size(); ++k) out[k] = old[order[k]];
    return out;
  };
  block.extents = permuted(block.extents);
  for_each_affine(block, [&](Affine& affine) { affine.step = permuted(affine.step); });
}

namespace {

// Sign of the first coordinate step along loop k: decides the loop's direction in normal form.
bool runs_backwards(const Block& block, std::size_t k) {
  for (const auto* side : {&block.row, &block.col}) {
    for (const Coord& coord : *side) {
      if (coord.affine.step[k] != 0) return coord.affine.step[k] < 0;
    }
  }
  return false;
}

std::vector<std::int64_t> motion_key(const Block& block, std::size_t k) {
  std::vector<std::int64_t> key{block.extents[k]};
  for (const auto* side : {&block.row, &block.col}) {
    for (const Coord& coord : *side) {
      key.push_back(coord.affine.step[k]);
      if (!coord.has_index()) continue;
      for (const Affine& axis : coord.index.axes) key.push_back(axis.step[k]);
    }
  }
  return key;
}

}  // namespace

void normalize(Block& block) {
  for (std::size_t k = block.loops(); k-- > 0;) {
    if (block.extents[k] == 1) drop_loop(block, k);
  }
  const std::size_t n = block.loops();
  for (std::size_t k = 0; k < n; ++k) {
    if (!runs_backwards(block, k)) continue;
    const std::int64_t last = block.extents[k] - 1;
    for_each_affine(block, [k, last](Affine& affine) {
      affine.start += affine.step[k] * last;
      affine.step[k] = -affine.step[k];
    });
  }
  if (n < 2) return;
  std::vector<std::vector<std::int64_t>> keys(n);
  for (std::size_t k = 0; k < n; ++k) keys[k] = motion_key(block, k);
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return keys[a] < keys[b]; });
  if (!std::is_sorted(order.begin(), order.end())) permute_loops(block, order);
}

bool same_nest(const Block& a, const Block& b) { return a.extents == b.extents && a.row == b.row && a.col == b.col; }

std::size_t nest_hash(const Block& block) {
  std::size_t hash = 1469598103934665603ull;
  auto mix = [&hash](std::int64_t value) { hash = (hash ^ static_cast<std::size_t>(value)) * 1099511628211ull; };
  for (std::int64_t extent : block.extents) mix(extent);
  for (const auto* side : {&block.row, &block.col}) {
    for (const Coord& coord : *side) {
      mix(coord.affine.start);
      for (std::int64_t step : coord.affine.step) mix(step);
      mix(coord.index_scale);
      if (coord.has_index()) mix(coord.index.slot);
    }
  }
  return hash;
}

Block transposed(Block block) {
  std::swap(block.row, block.col);
  std::swap(block.row_shape, block.col_shape);
  return block;
}

std::string to_string(const Block& block) {
  std::string text = "[";
  for (std::size_t k = 0; k < block.loops(); ++k) {
    const bool row = block.moves_row(k), col = block.moves_col(k);
    if (k > 0) text += ' ';
    text += row && col ? 'T' : row ? 'R' : col ? 'C' : '?';
    text += std::to_string(block.extents[k]);
    if (!block.value.moves(k)) text += '*';
  }
  return text + "]";
}

}  // namespace wengert::blocks
