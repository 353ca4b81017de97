// A node that ties a result to tensors that it does not change with, and remembers where the result comes from.
#pragma once
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace wengert::ops {

// What was asked for in one call, by which PyTorch can be asked for the same: see NOTE [History of results].
struct Origin {
  explicit Origin(std::int64_t structure) : structure(structure) {}
  Origin(const Origin&) = delete;
  Origin& operator=(const Origin&) = delete;
  virtual ~Origin() = default;
  virtual bool is_known() const = 0;  // still

  const std::int64_t structure;  // a number that equal ones share
};

// Which result of a call.
struct Source {
  std::shared_ptr<const Origin> origin;
  std::int64_t result = 0;
};

// The output is the tied result; input edges are the result before that, then the tensors it is tied to.  A cotangent passes
// through to the result; the tensors receive zeros.
struct TetherBackward : torch::autograd::Node {
  TetherBackward();
  ~TetherBackward() override;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& cotangents) override;
  std::string name() const override { return "wengert::TetherBackward"; }

  Source source;
};

// Whether there are any, of whatever graph.
bool any_tethers();

// The result with a node of this kind, which shares its memory.
at::Tensor tether(const at::Tensor& result, const std::vector<torch::autograd::Edge>& to, Source source);

}  // namespace wengert::ops
