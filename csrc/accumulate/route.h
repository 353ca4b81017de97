// Whether a derivative with a history is left to PyTorch, whose own way there is shorter.
//
// NOTE [Two ways to a history]
// Without a history a plan runs on memory, past the dispatcher.  With one every step is made of PyTorch's operators, each of them
// a call and a node: a nest of k operands takes k views.  PyTorch takes one operator or two for every node of the graph and every
// row.  Which is less depends on the structure alone, so it is counted once for each, when PyTorch is asked about the histories
// (history.h) and both graphs are there: their nodes, and the bytes that those stand for.  Where ours costs more the structure is
// PyTorch's from then on.  What is differentiated afterwards is the engine's, whichever way it came.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "tape/tape.h"

namespace wengert::accumulate {

inline constexpr const char* kShorterInPyTorch = "PyTorch's way to a result with a history is shorter";
struct ShorterThere : tape::Unsupported {
  ShorterThere() : Unsupported(kShorterInPyTorch) {}
};

// The way to derivatives of some kind, with a history.  WENGERT_COMPARE_WAYS=0, for tests: what the engine can do it does.
class Route {
 public:
  Route() = default;                                               // there is no choice
  Route(int kind, at::TensorList outputs, at::TensorList inputs);  // lists that outlive it

  bool is_shorter_there() const;  // as far as is known
  void follow() const {
    if (is_shorter_there()) throw ShorterThere();
  }
  // `theirs`: each of some tensors of PyTorch's, and how many like it there would be.  Throws ShorterThere where they are.
  struct Row {
    std::vector<at::Tensor> tensors;
    double times;
  };
  void choose(const std::vector<at::Tensor>& ours, const std::vector<Row>& theirs) const;

 private:
  // Hashes, quicker than a signature: another structure with the same one just goes the same way.  0 where there is no choice.
  std::uint64_t glance() const;  // at how deep the graph is, and its first nodes
  // At all of it: results of ours in it leave no choice, as only our derivatives of them are given the history that PyTorch's
  // have.
  std::uint64_t walk() const;
  void remember() const;

  int kind_ = 0;
  at::TensorList outputs_, inputs_;  // none: there is no choice
};

// What is known takes memory, within a bound; and is known no longer.
std::size_t route_bytes();
void forget_routes();

}  // namespace wengert::accumulate
