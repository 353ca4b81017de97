// The loops of a nest as every device sees them: loops of one iteration left out, small strides inside, neighbours merged.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <span>
#include <utility>
#include <vector>

#include "kernels/views.h"

namespace wengert::kernels {

struct LoopView {
  char* data;
  fused::Dtype dtype;
  int bytes;
  std::int64_t strides[fused::kMaxRank];  // per loop, outer to inner, in elements
  bool in_host_memory = false;            // operands only
};

struct LoopOutput : LoopView {
  bool accumulate;
  std::uint32_t reduced;  // bit per loop
};

template <class Output>
struct Loops {
  static constexpr int kMaxLoops = fused::kMaxRank;

  int rank_ = 0;
  std::int64_t elements_ = 0;  // iterations of the whole nest
  std::int64_t extents_[kMaxLoops];
  std::vector<LoopView> operands_;  // one per load of the bytecode
  std::vector<Output> outputs_;

  void collect(const fused::Program& program, std::span<const std::int64_t> extents, std::span<const OperandView> operands,
               std::span<const OutputView> outputs);
  void order();
  void swap(int a, int b);
  void merge();
};

template <class Output>
void Loops<Output>::collect(const fused::Program& program, std::span<const std::int64_t> extents,
                            std::span<const OperandView> operands, std::span<const OutputView> outputs) {
  const std::vector<std::int32_t>& loads = program.bytecode().loads;
  operands_.resize(loads.size());
  outputs_.resize(outputs.size());
  elements_ = 1;
  rank_ = 0;
  std::int64_t axes[kMaxLoops];
  for (std::size_t axis = 0; axis < extents.size(); ++axis) {
    elements_ *= extents[axis];
    if (extents[axis] == 1) continue;
    axes[rank_] = static_cast<std::int64_t>(axis);
    extents_[rank_++] = extents[axis];
  }
  for (std::size_t i = 0; i < loads.size(); ++i) {
    const OperandView& given = operands[loads[i]];
    LoopView& view = operands_[i];
    view.data = static_cast<char*>(const_cast<void*>(given.data));
    view.in_host_memory = given.in_host_memory;
    view.dtype = given.dtype;
    view.bytes = fused::size_in_bytes(given.dtype);
    for (int k = 0; k < rank_; ++k) view.strides[k] = given.strides[axes[k]];
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const OutputView& given = outputs[i];
    Output& view = outputs_[i];
    view.data = static_cast<char*>(given.data);
    view.dtype = given.dtype;
    view.bytes = fused::size_in_bytes(given.dtype);
    view.accumulate = given.accumulate;
    view.reduced = 0;
    for (int k = 0; k < rank_; ++k) {
      bool reduced = program.outputs()[i].reduced >> axes[k] & 1;
      view.reduced |= static_cast<std::uint32_t>(reduced) << k;
      view.strides[k] = reduced ? 0 : given.strides[axes[k]];
    }
  }
}

// Insertion sort, outer to inner by falling strides; outputs decide before operands, and views that do not move along both loops
// have no say.
template <class Output>
void Loops<Output>::order() {
  auto inner_first = [&](int a, int b) {  // whether loop a should be inside loop b
    auto vote = [&](const LoopView& view) {
      std::int64_t x = std::abs(view.strides[a]), y = std::abs(view.strides[b]);
      return x == 0 || y == 0 || x == y ? 0 : x < y ? 1 : -1;
    };
    for (const Output& output : outputs_) {
      if (int v = vote(output)) return v > 0;
    }
    for (const LoopView& operand : operands_) {
      if (int v = vote(operand)) return v > 0;
    }
    return false;
  };
  for (int k = 1; k < rank_; ++k) {
    for (int j = k; j > 0 && inner_first(j - 1, j); --j) swap(j - 1, j);
  }
}

template <class Output>
void Loops<Output>::swap(int a, int b) {
  std::swap(extents_[a], extents_[b]);
  for (LoopView& view : operands_) std::swap(view.strides[a], view.strides[b]);
  for (Output& view : outputs_) {
    std::swap(view.strides[a], view.strides[b]);
    std::uint32_t difference = (view.reduced >> a ^ view.reduced >> b) & 1;
    view.reduced ^= difference << a | difference << b;
  }
}

template <class Output>
void Loops<Output>::merge() {
  if (rank_ == 0) return;
  int last = 0;
  auto mergeable = [&](const LoopView& view, int outer, int inner) {
    return view.strides[outer] == view.strides[inner] * extents_[inner];
  };
  for (int k = 1; k < rank_; ++k) {
    bool merge = true;
    for (const LoopView& view : operands_) merge = merge && mergeable(view, last, k);
    for (const Output& view : outputs_) {
      merge = merge && mergeable(view, last, k) && (view.reduced >> last & 1) == (view.reduced >> k & 1);
    }
    int target = merge ? last : last + 1;
    extents_[target] = merge ? extents_[last] * extents_[k] : extents_[k];
    for (LoopView& view : operands_) view.strides[target] = view.strides[k];
    for (Output& view : outputs_) {
      view.strides[target] = view.strides[k];
      std::uint32_t bit = view.reduced >> k & 1;
      view.reduced = (view.reduced & ~(std::uint32_t{1} << target)) | bit << target;
    }
    last = target;
  }
  rank_ = last + 1;
  for (Output& view : outputs_) view.reduced &= rank_ == 32 ? ~std::uint32_t{0} : (std::uint32_t{1} << rank_) - 1;
}

}  // namespace wengert::kernels
