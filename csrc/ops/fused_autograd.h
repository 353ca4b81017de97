// The autograd node of wengert::fused.
#pragma once
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <string>
#include <vector>

#include "fused/program.h"

namespace wengert::ops {

// One input edge per operand.  The backward is a call of wengert::fused on operands and cotangents, or a few, so it can be
// differentiated to any order.  All operands are saved: they also carry the extents of the nest.
struct FusedBackward : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& cotangents) override;
  std::string name() const override { return "wengert::FusedBackward"; }
  void release_variables() override;
  // By edges: whether a cotangent of this output goes on along them.
  std::vector<bool> onwards(std::uint32_t output) const;
  std::vector<torch::autograd::SavedVariable> operands_;
  std::shared_ptr<const fused::Program> program_;
};

// What a program's derivative is computed with: programs over the same nest, each of the operands it needs.
struct DerivedProgram {
  struct Part {
    std::string text;
    std::vector<std::int32_t> operands;  // which of the tensors that there are
    std::vector<std::int32_t> results;   // per output of the text: of which operand (vjp) or output (jvp) of the program
  };
  std::vector<Part> parts;    // what is in none is zero
  std::vector<bool> effects;  // answers effects(), which has no parts
};

// Whether an output changes with an operand at all: one of which the nest only takes the sign, say, changes nothing.  Element
// output * operands + operand.
std::shared_ptr<const std::vector<bool>> effects(const std::shared_ptr<const fused::Program>& program);

// For each operand in `wanted` the gradient reduced to that operand's sizes, of at most `most_outputs` a program.  There are the
// program's operands, then the cotangents of the outputs in `given`.
std::shared_ptr<const DerivedProgram> vjp_program(const std::shared_ptr<const fused::Program>& program, at::TensorList operands,
                                                  const std::vector<bool>& wanted, const std::vector<bool>& given,
                                                  std::size_t most_outputs);
// The tangents of the outputs; there are the program's operands, then the tangents of the operands in `given`.
std::shared_ptr<const DerivedProgram> jvp_program(const std::shared_ptr<const fused::Program>& program, at::TensorList operands,
                                                  const std::vector<bool>& given);

// What these have made is kept; and to keep it no longer.
std::size_t derived_bytes();
void forget_derived();

}  // namespace wengert::ops
