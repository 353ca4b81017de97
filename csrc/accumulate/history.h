// Which results require grad, and what they lead to.
//
// NOTE [History of results]
// With create_graph a result of PyTorch requires grad where a backward formula touches a tensor that does, though it may not
// change with it: the Jacobian of relu leads to relu's result and has the derivative zero there; that of amax does not, as its
// mask comes from a comparison.  Ours are made by other operations, from expressions without what is zero.  So PyTorch is asked
// once for every structure: for the first row of each result, whose graph is that of the other rows too.  Results whose
// graph leads to fewer tensors than PyTorch's are tied to the missing ones (ops::tether); one that leads nowhere, where PyTorch's
// requires no grad, or where PyTorch has none, is detached.  What PyTorch decides by values, such as the gradient of a product
// with two zeros, can so only be missing among what is zero.  A history ends at the inputs, the cotangents and the captured
// tensors: where edges leave the tape.  Between those and their leaves lies what nobody has looked at, which is neither run nor
// told apart by a key.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "common/key.h"
#include "tape/tape.h"

namespace wengert::accumulate {

// PyTorch's counterpart of each of our results: the tensors whose graphs decide.  Several where PyTorch computes several results
// as one tensor.
using Counterparts = std::vector<std::vector<at::Tensor>>;

// What was asked for.
struct Question {
  at::TensorList outputs, inputs, cotangents;
  at::TensorList
      rows;  // result i * inputs + j is the derivative of rows[i] in inputs[j]; none: result j is of the shape of inputs[j]
  const std::vector<torch::autograd::Edge>& ends;
};

// Where histories end: the edges of the inputs, of the cotangents, and those that leave the tape.
std::vector<torch::autograd::Edge> ends(const tape::Tape& tape, at::TensorList inputs, at::TensorList cotangents);

class History {
 public:
  // With `confirm`, an end counts as reached only where a gradient arrives, which takes running the nodes on the way.
  History(const Question& question, const Counterparts& theirs, const std::vector<at::Tensor>& ours, bool confirm);
  void apply(const Question& question, std::vector<at::Tensor>& results) const;

 private:
  struct Group {
    std::vector<std::int32_t> results;
    std::vector<std::int32_t> ends;
  };
  std::vector<std::int32_t> absent_, detached_;
  std::vector<Group> groups_;
};

// The history for one structure, found at its first use.
class HistoryMemo {
 public:
  const History& get(const std::function<std::unique_ptr<History>()>& find) const;

 private:
  mutable std::mutex mutex_;
  mutable std::unique_ptr<const History> history_;
};

// PyTorch's first rows.  Empty where it must not be asked, as code of the user's would run.
Counterparts jacobian_rows(const Question& question, bool at_once);
Counterparts gradient_rows(const Question& question, bool batched);
Counterparts hessian_rows(const Question& question, bool at_once);
// Our own results, those that PyTorch computes as one tensor together.
Counterparts own_columns(const std::vector<at::Tensor>& results, std::size_t width);

// Which edges lead to something that requires grad, which decides what formulas touch, and which ends are the same: continues a
// signature.
void sign_edges(const tape::Tape& tape, const std::vector<torch::autograd::Edge>& ends, common::KeyWriter& key);

}  // namespace wengert::accumulate
