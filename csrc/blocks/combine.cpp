// Lists of blocks: adding, and keeping lists short.
#include <algorithm>
#include <map>
#include <optional>

#include "blocks/pull.h"

namespace wengert::blocks {

namespace {

// Lists up to this length are pulled as they are: joining blocks means forcing their values.
constexpr std::size_t kMaxBlocks = 8;
// Padding two shifted nests to their union box may store this much more than the two nests do.
constexpr double kMaxPadding = 1.5;

bool has_index(const Block& block) {
  for (const auto* side : {&block.row, &block.col}) {
    for (const Coord& coord : *side) {
      if (coord.has_index()) return true;
    }
  }
  return false;
}

std::vector<std::int64_t> starts(const Block& block) {
  std::vector<std::int64_t> out;
  for (const auto* side : {&block.row, &block.col}) {
    for (const Coord& coord : *side) out.push_back(coord.affine.start);
  }
  return out;
}

std::vector<std::int64_t> motion(const Block& block, std::size_t k) {
  std::vector<std::int64_t> out;
  for (const auto* side : {&block.row, &block.col}) {
    for (const Coord& coord : *side) out.push_back(coord.affine.step[k]);
  }
  return out;
}

std::vector<std::int64_t> difference(const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b) {
  std::vector<std::int64_t> out(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) out[i] = b[i] - a[i];
  return out;
}

// Lazy in the loops that none of the values move along.
std::vector<std::size_t> moving_loops(const std::vector<const Block*>& blocks, std::size_t n) {
  std::vector<std::size_t> out;
  for (std::size_t k = 0; k < n; ++k) {
    if (std::any_of(blocks.begin(), blocks.end(), [k](const Block* b) { return b->value.moves(k); })) out.push_back(k);
  }
  return out;
}

// Blocks with the same motions whose starts form a progression become one block with a new outermost loop.
Block stack(Builder& builder, const std::vector<const Block*>& run, const std::vector<std::int64_t>& step) {
  const Block& first = *run[0];
  const std::size_t n = first.loops();
  const bool constant = std::all_of(run.begin(), run.end(), [&](const Block* b) { return b->value == first.value; }) &&
                        builder.pool().is_constant(first.value.expr);
  Block out = first;
  append_loops(out, {static_cast<std::int64_t>(run.size())});
  if (!constant) {
    const std::vector<std::size_t> moving = moving_loops(run, n);
    Shape shape{static_cast<std::int64_t>(run.size())};
    for (std::size_t k : moving) shape.push_back(first.extents[k]);
    std::vector<Part> parts;
    for (std::size_t r = 0; r < run.size(); ++r) {
      Part part{.extents = run[r]->extents, .value = run[r]->value, .coords = {constant_coord(n, static_cast<std::int64_t>(r))}};
      for (std::size_t k : moving) part.coords.push_back(loop_coord(n, k));
      // Loops that nothing moves here would write the same cell again and again.
      for (std::size_t k = n; k-- > 0;) {
        if (std::find(moving.begin(), moving.end(), k) == moving.end()) part.extents[k] = 1;
      }
      parts.push_back(std::move(part));
    }
    const std::int32_t slot = builder.assemble(shape, first.dtype, std::move(parts));
    Read read{.slot = slot, .axes = {loop_coord(n + 1, n).affine}};
    for (std::size_t k : moving) read.axes.push_back(loop_coord(n + 1, k).affine);
    out.value = Value{.expr = builder.pool().operand(0), .operands = {std::move(read)}};
  }
  std::size_t axis = 0;
  for (auto* side : {&out.row, &out.col}) {
    for (Coord& coord : *side) coord.affine.step[n] = step[axis++];
  }
  normalize(out);
  return out;
}

// Offsets o with  nest of b = nest of a shifted by o along its loops (loops matched by motion); nothing if there are none.
struct Shift {
  std::vector<std::size_t> match;    // loop of b for every loop of a
  std::vector<std::int64_t> offset;  // per loop of a
};

std::optional<Shift> shift_between(const Block& a, const Block& b) {
  const std::size_t n = a.loops();
  if (b.loops() != n) return std::nullopt;
  Shift shift{.match = std::vector<std::size_t>(n, n), .offset = std::vector<std::int64_t>(n, 0)};
  std::vector<std::vector<std::int64_t>> motions(n);
  for (std::size_t k = 0; k < n; ++k) {
    motions[k] = motion(a, k);
    for (std::size_t l = 0; l < n; ++l) {
      if (motion(b, l) != motions[k]) continue;
      if (shift.match[k] != n) return std::nullopt;  // two loops with one motion: not unique
      shift.match[k] = l;
    }
    if (shift.match[k] == n) return std::nullopt;
  }
  std::vector<std::int64_t> rest = difference(starts(a), starts(b));
  std::vector<bool> known(n, false);
  for (bool progress = true; progress;) {
    progress = false;
    for (std::size_t x = 0; x < rest.size(); ++x) {
      std::size_t unknown = n, count = 0;
      for (std::size_t k = 0; k < n; ++k) {
        if (!known[k] && motions[k][x] != 0) unknown = k, ++count;
      }
      if (count != 1) continue;
      if (rest[x] % motions[unknown][x] != 0) return std::nullopt;
      shift.offset[unknown] = rest[x] / motions[unknown][x];
      known[unknown] = progress = true;
      for (std::size_t y = 0; y < rest.size(); ++y) rest[y] -= motions[unknown][y] * shift.offset[unknown];
    }
  }
  if (std::any_of(rest.begin(), rest.end(), [](std::int64_t r) { return r != 0; })) return std::nullopt;
  if (std::find(known.begin(), known.end(), false) != known.end()) return std::nullopt;
  return shift;
}

// Whether every loop value gives coordinates within the row and the column tensor.
bool within_shapes(const Block& block) {
  const auto fits = [&](const std::vector<Coord>& coords, const Shape& shape) {
    for (std::size_t a = 0; a < coords.size(); ++a) {
      if (coords[a].affine.lowest(block.extents) < 0 || coords[a].affine.highest(block.extents) >= shape[a]) return false;
    }
    return true;
  };
  return fits(block.row, block.row_shape) && fits(block.col, block.col_shape);
}

// Pads both to the union box of their nests, unless that leaves the array: where several loops move one axis (row 2i + j of 6)
// the corners of the box may lie beyond what either nest visits.
std::optional<Block> join(Builder& builder, const Block& a, const Block& b) {
  if (a.dtype != b.dtype || has_index(a) || has_index(b)) return std::nullopt;
  const std::optional<Shift> shift = shift_between(a, b);
  if (!shift) return std::nullopt;
  const std::size_t n = a.loops();
  Shape box(n);
  std::vector<std::int64_t> low(n);
  std::vector<bool> dense(n);
  double size = 1;
  for (std::size_t k = 0; k < n; ++k) {
    const std::size_t l = shift->match[k];
    low[k] = std::min<std::int64_t>(0, shift->offset[k]);
    box[k] = std::max(a.extents[k], shift->offset[k] + b.extents[l]) - low[k];
    dense[k] = a.value.moves(k) || b.value.moves(l) || shift->offset[k] != 0 || a.extents[k] != b.extents[l];
    if (dense[k]) size *= static_cast<double>(box[k]);
  }
  if (size > kMaxPadding * static_cast<double>(a.stored() + b.stored())) return std::nullopt;
  Block out = a;
  for (std::size_t k = 0; k < n; ++k) restrict_loop(out, k, low[k], 1, box[k]);
  if (!within_shapes(out)) return std::nullopt;
  Shape shape;
  for (std::size_t k = 0; k < n; ++k) {
    if (dense[k]) shape.push_back(box[k]);
  }
  Part first{.extents = a.extents, .value = a.value, .coords = {}}, second{.extents = b.extents, .value = b.value, .coords = {}};
  Read read{.slot = -1, .axes = {}};
  for (std::size_t k = 0; k < n; ++k) {
    const std::size_t l = shift->match[k];
    if (!dense[k]) {
      first.extents[k] = second.extents[l] = 1;
      continue;
    }
    first.coords.push_back(loop_coord(n, k));
    first.coords.back().affine.start = -low[k];
    second.coords.push_back(loop_coord(n, l));
    second.coords.back().affine.start = shift->offset[k] - low[k];
    read.axes.push_back(loop_coord(n, k).affine);
  }
  read.slot = builder.assemble(shape, a.dtype, {std::move(first), std::move(second)});
  out.value = Value{.expr = builder.pool().operand(0), .operands = {std::move(read)}};
  normalize(out);
  return out;
}

}  // namespace

Part as_part(const Block& block) {
  Part part{.extents = block.extents, .value = block.value, .coords = block.row};
  part.coords.insert(part.coords.end(), block.col.begin(), block.col.end());
  return part;
}

std::int64_t Ties::dense_size(const Block& block) const {
  std::int64_t size = numel(block.row_shape);
  for (std::size_t c = 0; c < of_col.size(); ++c) {
    if (of_col[c] < 0) size *= block.col_shape[c];
  }
  return size;
}

Ties common_ties(const std::vector<Block>& blocks) {
  const std::size_t rows = blocks[0].row.size(), cols = blocks[0].col.size();
  Ties ties{.of_col = std::vector<std::int32_t>(cols, -1)};
  std::vector<bool> used(rows, false);
  for (std::size_t c = 0; c < cols; ++c) {
    for (std::size_t r = 0; r < rows && ties.of_col[c] < 0; ++r) {
      if (used[r] || blocks[0].row_shape[r] != blocks[0].col_shape[c]) continue;
      if (!std::ranges::all_of(blocks, [&](const Block& block) { return block.row[r] == block.col[c]; })) continue;
      used[r] = true;
      ties.of_col[c] = static_cast<std::int32_t>(r);
    }
  }
  return ties;
}

Block densify(Builder& builder, const std::vector<Block>& blocks, const Ties& ties) {
  const Block& first = blocks[0];
  const std::size_t rows = first.row.size(), cols = first.col.size();
  // One loop and one axis of the array per row axis, then per column axis that is not tied to one.
  Shape shape = first.row_shape;
  std::vector<std::size_t> loop(cols);
  for (std::size_t c = 0; c < cols; ++c) {
    loop[c] = ties.of_col[c] < 0 ? shape.size() : static_cast<std::size_t>(ties.of_col[c]);
    if (ties.of_col[c] < 0) shape.push_back(first.col_shape[c]);
  }
  std::vector<Part> parts;
  for (const Block& block : blocks) {
    Part part{.extents = block.extents, .value = block.value, .coords = block.row};
    for (std::size_t c = 0; c < cols; ++c) {
      if (ties.of_col[c] < 0) part.coords.push_back(block.col[c]);
    }
    parts.push_back(std::move(part));
  }
  const std::size_t n = shape.size();
  Read read{.slot = builder.assemble(shape, first.dtype, std::move(parts)), .axes = {}};
  for (std::size_t k = 0; k < n; ++k) read.axes.push_back(loop_coord(n, k).affine);
  Block out{.extents = shape,
            .value = {.expr = builder.pool().operand(0), .operands = {std::move(read)}},
            .row = {},
            .col = {},
            .row_shape = first.row_shape,
            .col_shape = first.col_shape,
            .dtype = first.dtype};
  for (std::size_t r = 0; r < rows; ++r) out.row.push_back(loop_coord(n, r));
  for (std::size_t c = 0; c < cols; ++c) out.col.push_back(loop_coord(n, loop[c]));
  normalize(out);
  return out;
}

void BlockList::add(Builder& builder, Block block) {
  if (block.empty() || block.value.expr == fused::kZero) return;
  const std::size_t hash = nest_hash(block);
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    if (hashes_[i] != hash || blocks_[i].dtype != block.dtype || !same_nest(blocks_[i], block)) continue;
    builder.add(blocks_[i].value, block.value);
    if (builder.is_large(blocks_[i].value)) blocks_[i].value = builder.force(blocks_[i].value, block.extents, block.dtype);
    return;
  }
  blocks_.push_back(std::move(block));
  hashes_.push_back(hash);
}

void BlockList::settle_indices(Builder& builder) {
  if (std::ranges::none_of(blocks_, has_index)) return;
  std::int64_t stored = 0;
  for (const Block& block : blocks_) stored += block.stored();
  if (stored < numel(blocks_[0].col_shape)) return;
  builder.lose(Loss::larger_than_dense);
  Block dense = densify(builder, blocks_, common_ties(blocks_));
  blocks_.clear();
  hashes_.clear();
  add(builder, std::move(dense));
}

void BlockList::reduce(Builder& builder, bool costly) {
  const auto larger_than_dense = [](const std::vector<Block>& list) {
    std::int64_t stored = 0;
    for (const Block& block : list) stored += block.stored();
    return list.size() > 1 && stored > common_ties(list).dense_size(list[0]);
  };
  const bool absorb = costly && larger_than_dense(blocks_);
  if (blocks_.size() <= kMaxBlocks && !absorb) return;
  std::vector<Block> given = std::move(blocks_);
  blocks_.clear();
  hashes_.clear();

  // 1. progressions
  std::map<std::vector<std::vector<std::int64_t>>, std::vector<std::size_t>> groups;
  std::vector<bool> used(given.size(), false);
  for (std::size_t i = 0; i < given.size(); ++i) {
    if (has_index(given[i])) continue;
    std::vector<std::vector<std::int64_t>> key{given[i].extents, {static_cast<std::int64_t>(given[i].dtype)}};
    for (std::size_t k = 0; k < given[i].loops(); ++k) key.push_back(motion(given[i], k));
    groups[std::move(key)].push_back(i);
  }
  std::vector<Block> current;
  for (auto& [key, members] : groups) {
    std::map<std::vector<std::int64_t>, std::size_t> at;
    for (std::size_t i : members) at[starts(given[i])] = i;
    for (auto& [start, i] : at) {
      if (used[i]) continue;
      std::vector<const Block*> best;
      std::vector<std::int64_t> best_step;
      std::size_t tried = 0;
      for (auto& [other, j] : at) {
        if (used[j] || other <= start || ++tried > 16) continue;
        const std::vector<std::int64_t> step = difference(start, other);
        // The new loop needs an axis to itself, else later substitutions could not take it apart again.
        bool shares = false;
        for (std::size_t k = 0; k < given[i].loops(); ++k) {
          const std::vector<std::int64_t> moves = motion(given[i], k);
          for (std::size_t x = 0; x < step.size(); ++x) shares = shares || (step[x] != 0 && moves[x] != 0);
        }
        if (shares) continue;
        std::vector<const Block*> run{&given[i]};
        std::vector<std::int64_t> next = other;
        for (auto found = at.find(next); found != at.end() && !used[found->second]; found = at.find(next)) {
          run.push_back(&given[found->second]);
          for (std::size_t x = 0; x < next.size(); ++x) next[x] += step[x];
        }
        if (run.size() > best.size()) best = run, best_step = step;
      }
      if (best.size() < 3) continue;
      for (const Block* b : best) used[b - given.data()] = true;
      current.push_back(stack(builder, best, best_step));
    }
  }
  for (std::size_t i = 0; i < given.size(); ++i) {
    if (!used[i]) current.push_back(std::move(given[i]));
  }

  // 2. shifted nests
  if (current.size() <= 64) {
    for (std::size_t i = 0; i < current.size(); ++i) {
      for (std::size_t j = i + 1; j < current.size();) {
        std::optional<Block> joined = join(builder, current[i], current[j]);
        if (!joined) {
          ++j;
          continue;
        }
        current[i] = std::move(*joined);
        current.erase(current.begin() + j);
        j = i + 1;
      }
    }
  }

  // 3. a list larger than the dense array
  if (larger_than_dense(current)) {
    builder.lose(Loss::larger_than_dense);
    Block dense = densify(builder, current, common_ties(current));
    current.clear();
    current.push_back(std::move(dense));
  }
  for (Block& block : current) add(builder, std::move(block));
}

}  // namespace wengert::blocks
