// The autograd node of wengert::fused.
#pragma once
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <string>
#include <vector>

#include "fused/program.h"

namespace wengert::ops {

// One input edge per operand.  The backward is one call of wengert::fused on the operands and the cotangents, so it can be
// differentiated to any order.  All operands are saved: they also carry the extents of the nest.
struct FusedBackward : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& cotangents) override;
  std::string name() const override { return "wengert::FusedBackward"; }
  void release_variables() override;
  // The edges that receive anything from an output: an operand of which the nest only takes the sign, say, receives nothing.
  std::vector<bool> effective_edges(std::size_t output);

  std::vector<torch::autograd::SavedVariable> operands_;
  std::shared_ptr<const fused::Program> program_;
};

// One program that gives, for each operand in `wanted`, the gradient reduced to that operand's sizes.  Its operands are the
// program's, then the cotangents of the outputs in `given`.  An operand that receives nothing has no output: `outputs` holds -1.
struct DerivedProgram {
  std::string text;          // empty: nothing is nonzero
  std::vector<int> outputs;  // per operand (vjp) or per output (jvp) of the program: which output of the text, -1: zero
};
std::shared_ptr<const DerivedProgram> vjp_program(const std::shared_ptr<const fused::Program>& program, at::TensorList operands,
                                                  const std::vector<bool>& wanted, const std::vector<bool>& given);
// The tangents of the outputs; operands are the program's, then the tangents of the operands in `given`.
std::shared_ptr<const DerivedProgram> jvp_program(const std::shared_ptr<const fused::Program>& program,
                                                  const std::vector<bool>& given);

// What the two have made is kept; and to keep it no longer.
std::size_t derived_bytes();
void forget_derived();

}  // namespace wengert::ops
