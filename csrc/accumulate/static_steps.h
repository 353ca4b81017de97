// Steps as launches of the kernels compiled with the library, on devices that have them (ops::can_launch).  Each function says
// whether the kernel takes the step; where it does not, nothing has happened.  None waits for the device.
#pragma once
#include <ATen/core/Tensor.h>

#include <span>

#include "blocks/plan.h"

namespace wengert::accumulate {

// Whether the step writes operands as they are to separate places of one floating array.
bool is_copy(const blocks::Evaluate& step, const blocks::Plan& plan);
// Writes all of the new, contiguous `out`: the copies and zeros around them, in one pass.  One tensor per operand of the step.
bool launch_materialize(const blocks::Evaluate& step, std::span<const at::Tensor> operands, at::Tensor& out);

// Batched products of small matrices, straight from the operands' windows.  `scale` may be undefined; `out` is new and
// contiguous.
bool launch_small_matmul(const blocks::Matmul& step, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale,
                         at::Tensor& out);

// A PutAdd as sums of rows: out[index[p]] += values[p], over views.
struct RowSum {
  at::Tensor out, index, values;
  bool covers;  // the rows are all of the array
};
// `index` is the tensor the step puts at: the one along its axis, or the flat one.
RowSum row_sum(const blocks::PutAdd& step, const at::Tensor& value, const at::Tensor& index, const at::Tensor& out);
// Adds to `out`, or overwrites it: rows at which nothing is put become zero.
bool launch_segment_sum(const RowSum& sum, bool accumulate);

}  // namespace wengert::accumulate
