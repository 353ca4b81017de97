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

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "accumulate/question.h"
#include "common/key.h"
#include "ops/tether.h"
#include "tape/tape.h"

namespace wengert::accumulate {

// PyTorch's counterpart of each of our results: the tensors whose graphs decide.  Several where PyTorch computes several results
// as one tensor.
using Counterparts = std::vector<std::vector<at::Tensor>>;

// PyTorch's answer.  Empty where it has none.
Counterparts counterparts(const Question& question);

// Where histories end: the edges of the inputs, of the cotangents, those that leave the tape, and the ends of results of ours.
// `behind`: the numbers of the latters' questions.
Edges ends(const tape::Tape& tape, at::TensorList inputs, at::TensorList cotangents, std::vector<std::int64_t>& behind);

class History {
 public:
  // With `confirm`, an end counts as reached only where a gradient arrives, which takes running the nodes on the way.
  History(const Edges& ends, const Counterparts& theirs, const std::vector<at::Tensor>& ours, bool confirm);

  // Result i * inputs + j has the shape rows[i] + that of inputs[j]; where there are no rows, results that are missing stay so.
  void apply(std::vector<at::Tensor>& results, const Edges& ends, const std::vector<tape::Shape>& rows, at::TensorList inputs,
             const std::shared_ptr<const ops::Origin>& origin) const;

 private:
  struct Ties {
    bool any = false;  // whether PyTorch's requires grad, where ours lacks something
    std::vector<std::int32_t> ends;
  };
  std::vector<std::int32_t> absent_, detached_;
  std::vector<Ties> ties_;  // by result
};

// The history for one structure, found at its first use.
class HistoryMemo {
 public:
  HistoryMemo();
  ~HistoryMemo();
  HistoryMemo(const HistoryMemo&) = delete;
  HistoryMemo& operator=(const HistoryMemo&) = delete;
  // `uses` what is known or found; keeps what is found where that is said to be lasting.
  void use(const std::function<std::unique_ptr<const History>()>& find, const std::function<bool()>& lasts,
           const std::function<void(const History&)>& uses) const;
  std::int64_t structure() const { return structure_; }

 private:
  const std::int64_t structure_;
  mutable std::atomic<const History*> history_ = nullptr;
};

// Our own results as counterparts, those together that PyTorch computes as one tensor.
Counterparts own_columns(const std::vector<at::Tensor>& results, std::size_t width);

// Which edges lead to something that requires grad, which decides what formulas touch, and which ends are the same: continues a
// signature.
void sign_edges(const tape::Tape& tape, const Edges& ends, common::Key& key);

}  // namespace wengert::accumulate
