// What was asked for in a call with create_graph, for PyTorch to be asked the same: see NOTE [History of results].
//
// NOTE [Remembered questions]
// A result refers to the question that it answers, as a later question may lead through it.  To ask again takes the graph that
// was differentiated, which PyTorch's own results do not hold as a whole: a tensor with a large branch behind it, or the input
// itself, whose .grad may be the result.  Results that held it would keep memory that PyTorch frees, and make cycles that nobody
// breaks. So the few latest questions about small graphs are remembered apart from results, for as long as a result refers to
// them; a result whose question is forgotten has the history that it has.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops/tether.h"
#include "tape/tape.h"

namespace wengert::accumulate {

using Edges = std::vector<torch::autograd::Edge>;

Edges edges_of(at::TensorList tensors);

// By edges, as tensors may be written to afterwards, and may come to lead to results.
struct Question {
  enum class Of : std::uint8_t { jacobian, gradient, batched_gradient, hessian };
  // In the place of a cotangent, whose values do not count.
  struct Cotangent {
    bool given = false;
    std::vector<std::int64_t> shape;
    at::TensorOptions options;
    torch::autograd::Edge edge;

    static Cotangent of(const at::Tensor& tensor);
    at::Tensor stand_in() const;
  };

  Of of = Of::jacobian;
  bool at_once = false;  // PyTorch computes one tensor for each input, which is split
  Edges outputs, inputs;
  std::vector<Cotangent> cotangents;  // of gradients: for each output, not given for ones
  Edges ends;                         // of the results' histories
  std::vector<std::int64_t> behind;   // numbers of the known questions that it leads through
};

// The question that results come from.
class Provenance : public ops::Origin {
 public:
  // Remembers the question, which refers to a graph of so many bytes.
  Provenance(std::int64_t structure, std::shared_ptr<const Question> question, std::size_t bytes);
  ~Provenance() override;

  // With all that it leads through: what PyTorch's answer is depends on all of them.
  bool is_known() const override;
  std::shared_ptr<const Question> question() const;  // null where it is forgotten
  std::int64_t number() const { return number_; }    // what was asked later may lead to what was asked earlier

 private:
  const std::int64_t number_;
};

// About what the tape, and the graphs that its edges lead to, keep alive.  Of large graphs only that they are large.
std::size_t graph_bytes(const tape::Tape& tape, const Edges& ends);

void forget_questions();
std::uint64_t forgotten_questions();  // how many, so far

}  // namespace wengert::accumulate
