// Gradients, Jacobians and Hessians of tensors already computed.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "accumulate/sweep.h"

namespace wengert::accumulate {

// Results without history, results that can be differentiated, and such for which PyTorch computes all rows as one tensor, which
// then requires grad as a whole.
enum class Mode : std::uint8_t { plain, differentiable, at_once };

using TensorRows = std::vector<std::vector<at::Tensor>>;  // undefined = not connected

// [i][j] = d outputs[i] / d inputs[j], of shape outputs[i].shape + inputs[j].shape.  The graph is kept.  Where a node of
// PyTorch's gives no gradient at all, that is zero, or with `none_is_zero` false the call is refused.  `by_sample`: so it is
// where each sample, of which the first axis of the outputs counts some, would take a pass of all of them through a node.
TensorRows jacobian(at::TensorList outputs, at::TensorList inputs, Mode mode, bool none_is_zero = true, bool by_sample = false);

// outputs (B, *out), inputs (B, *in): (B, *out, *in).  With `check`, throws CoupledSamples unless the blocks show that samples
// do not depend on each other; without it, independence is trusted.
TensorRows batch_jacobian(at::TensorList outputs, at::TensorList inputs, Mode mode, bool check);

// Sum over outputs of the vector-Jacobian products with `cotangents`; an undefined cotangent of a one-element output stands
// for 1. With `batched`, every cotangent has one more leading axis, and so has every result.
std::vector<at::Tensor> gradient(at::TensorList outputs, at::TensorList inputs, at::TensorList cotangents, bool retain_graph,
                                 Mode mode, bool batched, bool none_is_zero = false, bool asked = false);

// Whether `gradient` of no batch would be refused since PyTorch's way to a result with a history is known to be shorter; one that
// has `asked` this does not look again.
bool is_shorter_in_pytorch(at::TensorList outputs, at::TensorList inputs);

// [i][j] = d^2 output / d inputs[i] d inputs[j] of a one-element output.
TensorRows hessian(const at::Tensor& output, at::TensorList inputs, Mode mode);

blocks::Plan jacobian_plan(at::TensorList outputs, at::TensorList inputs);

// What would run, printed.
std::string plan_text(at::TensorList outputs, at::TensorList inputs, Seed seed);

Report explain(at::TensorList outputs, at::TensorList inputs);

// Stands for the structure of the graphs this thread's calls have differentiated since the last call; 0 where there were none.
std::size_t take_structures();

std::map<std::string, std::int64_t> counters();
void reset_counters();

// What is kept between calls, by kind; and to keep it no longer.
std::map<std::string, std::int64_t> cache_bytes();
void clear_caches();

}  // namespace wengert::accumulate
