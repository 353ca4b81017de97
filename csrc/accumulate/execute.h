// Runs a plan on the tensors of one tape.  Throws GaveNothing where a node that is called turns out to be connected to less.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "accumulate/calls.h"
#include "blocks/plan.h"
#include "tape/tape.h"

namespace wengert::accumulate {

// Of results.  PyTorch's gradients have those that the last node gave them, as long as they are dense.
enum class Strides : std::uint8_t { contiguous, dense };

// Straight on memory, below autograd.  Undefined tensors stand for results that are not connected.
std::vector<at::Tensor> execute(const blocks::Plan& plan, const tape::Tape& tape, at::TensorList cotangents, Strides strides,
                                Calls& calls);

// Through differentiable dispatcher ops, so that the results can be differentiated again.
std::vector<at::Tensor> execute_differentiably(const blocks::Plan& plan, const tape::Tape& tape, at::TensorList cotangents,
                                               Strides strides, Calls& calls);

// Numbers of steps run so far, for ratchets.
struct StepCounts {
  std::int64_t matmuls = 0;
  std::int64_t node_calls = 0;
  std::int64_t takes = 0;
};
StepCounts step_counts();
void reset_step_counts();

}  // namespace wengert::accumulate
