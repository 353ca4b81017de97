// Reverse accumulation over a tape: seeds blocks at the outputs, pulls them node by node to the inputs, and returns the plan that
// computes the dense results.  Works on metadata only.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "blocks/plan.h"
#include "tape/tape.h"

namespace wengert::accumulate {

enum class Seed : std::uint8_t {
  jacobian,          // one result per (output, input) pair, of shape output.shape + input.shape
  batch_summed,      // outputs (B, *out), inputs (B, *in): (B, *out, *in), trusting that samples are independent
  batch_tied,        // the same, with the independence read off the blocks; throws CoupledSamples where they do not show it
  gradient,          // one result per input: sum of the outputs' pulls of their cotangents
  batched_gradient,  // the same for cotangents with one more leading axis
};

// A cotangent the caller gives: slot of its own, or the constant 1.
struct Cotangent {
  bool given = false;
  tape::Shape shape;
  at::ScalarType dtype = at::kFloat;
};

struct Request {
  Seed seed = Seed::jacobian;
  std::vector<Cotangent> cotangents;  // gradients only: one per output
  bool none_is_zero = false;          // nobody asks whether PyTorch would have answered None
  // Jacobians only: the first axis of the outputs counts samples, of which no node is to be called with all for each; throws
  // Unsupported where one would be.
  bool by_sample = false;
};

// One row of explain: what happened to the blocks at one node.
struct NodeReport {
  std::string node, kind, structure;
  std::int64_t blocks = 0;  // arriving
  std::int64_t stored = 0;  // values they hold
  std::int64_t dense = 0;   // values of the dense array
};

struct Report {
  std::vector<NodeReport> nodes;
};

// The blocks do not show samples to be independent where that was asked for.  No proof of the opposite: dependences may cancel,
// and structure may have been lost on the way.
struct CoupledSamples : tape::Unsupported {
  CoupledSamples(const std::string& node, bool read) : Unsupported("samples that meet in " + node), node(node), read(read) {}
  std::string node;  // where they first meet
  bool read;         // by an operator that was read exactly
};

// Structure counters of all plans made so far (see blocks::Loss).
struct Totals {
  std::int64_t blocks = 0;     // blocks that reached an input
  std::int64_t densified = 0;  // losses of any kind
};
Totals totals();
void reset_totals();

// Slots of the plan: the tape's, then one per given cotangent.
blocks::Plan make_plan(const tape::Tape& tape, const Request& request, Report* report = nullptr);

fused::Dtype to_fused(at::ScalarType dtype);  // throws tape::Unsupported

}  // namespace wengert::accumulate
