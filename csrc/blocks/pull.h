// Pulling blocks through operators.  One rule, substitution, covers elementwise functions, broadcasting, reductions, views,
// matrix products and index reads; scatters restrict loops, reshapes take coordinates apart into digits.
#pragma once
#include <vector>

#include "blocks/builder.h"

namespace wengert::blocks {

// Replaces the column side, which is the operator's output, by the operator's input.  May give no block (structural zero) or
// several.
std::vector<Block> pull(Builder& builder, Block block, const tape::Term& term);

// The blocks of one (row tensor, value) pair: their sum is the Jacobian.
class BlockList {
 public:
  void add(Builder& builder, Block block);  // blocks with equal nests are added up lazily
  // Brings down the number of blocks before they are pulled on: stacks progressions, joins shifted nests, and turns a list that
  // stores more than the dense array (of each sample, where samples are tied) into one dense block.  A short list is left alone,
  // unless each of its blocks costs a call or a product (then one dense block is less work than it and others beside it, and
  // terms that cancel do so before they grow).
  void reduce(Builder& builder, bool costly);
  // For lists of one row, in which nothing is tied: indices, which go through every operator as well, stay only while there are
  // fewer values than the array has.
  void settle_indices(Builder& builder);
  bool empty() const { return blocks_.empty(); }
  std::size_t size() const { return blocks_.size(); }
  std::vector<Block>& blocks() { return blocks_; }
  const std::vector<Block>& blocks() const { return blocks_; }

 private:
  std::vector<Block> blocks_;
  std::vector<std::size_t> hashes_;
};

// Pairs of a row axis and a column axis that have one coordinate in every block, as the samples of a batch do.
struct Ties {
  std::vector<std::int32_t> of_col;  // per column axis: its row axis, or -1

  std::int64_t dense_size(const Block& block) const;  // elements of the array in which nothing but the ties is kept
};
Ties common_ties(const std::vector<Block>& blocks);

// The blocks as one that keeps only the ties: an array over the row axes and the column axes that are tied to none.
Block densify(Builder& builder, const std::vector<Block>& blocks, const Ties& ties);
// The block's entries as a part of an array with axes (row axes, column axes).
Part as_part(const Block& block);

}  // namespace wengert::blocks
