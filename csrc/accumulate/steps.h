// Steps that both ways of running a plan share; all are made of differentiable ATen ops.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "accumulate/execute.h"
#include "blocks/plan.h"

namespace wengert::accumulate {

// The same product once its scale is multiplied into a: loops of batch that b does not move along are rows of a.
blocks::Matmul unscaled(const blocks::Matmul& step);
// The loops of one side of a matrix product, in the order matmul() wants them: (batch, m, k) of a, (batch, k, n) of b.
std::vector<std::size_t> matmul_axes(const blocks::Matmul& step, bool left);
// a and b are views over matmul_axes; the result has axes (batch, m, n), each group spread out again to `shape`.
at::Tensor matmul(const blocks::Matmul& step, const blocks::Shape& shape, const at::Tensor& a, const at::Tensor& b);
// source.flatten()[index], with index's shape
at::Tensor take(const at::Tensor& source, const at::Tensor& index, std::optional<std::size_t> axis);

// A slot's tensor as the caller gets it: in memory that nobody else holds and that can be resized (a node may return a saved
// tensor, the same tensor for two edges, an expanded one), viewed in the result's shape, which may differ in axes of extent 1.
at::Tensor result(at::Tensor tensor, const blocks::Shape& shape, Strides strides);

void count_matmul();
void count_take();
void count_calls(std::int64_t calls);

}  // namespace wengert::accumulate
