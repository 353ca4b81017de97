// Lazy elementwise expressions: a hash-consed, simplified DAG that can be differentiated symbolically to any order.
#pragma once
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fused/primitives.h"

namespace wengert::fused {

using ExprId = std::int32_t;
inline constexpr ExprId kNone = -1;  // absent: an argument the caller does not have
inline constexpr ExprId kZero = 0;   // structural zero: "does not depend on", exact even against inf and nan
inline constexpr ExprId kOne = 1;    // the constant 1

// Arguments of a node always have smaller ids than the node, so ascending ids are a topological order.  A pool that is no longer
// written to may be read by several threads.
class ExprPool {
 public:
  ExprPool();
  ExprId constant(double value);       // constant(0) is the number 0, not the structural zero
  ExprId operand(std::int32_t index);  // leaf: the index-th operand of the loop nest
  ExprId apply(Prim prim, std::span<const ExprId> args);

  ExprId add(ExprId a, ExprId b);
  ExprId sub(ExprId a, ExprId b);
  // value * factor, in this order; see the notes on masks and on order in primitives.h.
  ExprId mul(ExprId value, ExprId factor) { return multiply(value, factor, nodes_[value].masks); }
  // The same where value is what arrives at a node (kOne: a factor is being written down): masks apply to it, whatever follows.
  ExprId pull(ExprId value, ExprId factor) { return multiply(value, factor, true); }
  bool masks(ExprId factor) const { return nodes_[factor].masks; }  // what it is multiplied with
  ExprId div(ExprId a, ExprId b);
  ExprId neg(ExprId a);
  // A product as (what reads an operand k with inside[k], or no operand at all) * (the rest).
  std::pair<ExprId, ExprId> split(ExprId product, const std::vector<bool>& inside);

  // d prim(args) / d args[arg].  `result` is prim(args) itself.  Uses exactly those of args/result that PyTorch's own formula
  // (derivatives.yaml) saves; the others may be kNone.  Returns kZero for a derivative that is identically zero, kNone where the
  // table has no formula (parameters such as the beta of softplus).
  ExprId partial(Prim prim, int arg, std::span<const ExprId> args, ExprId result);
  // d expr / d operand; throws std::domain_error where a formula is missing
  ExprId derivative(ExprId expr, std::int32_t operand);
  // Reverse sweep: sum_j cotangents[j] * d exprs[j] / d operand, as (operand, expression) pairs by ascending operand, multiplied
  // in the order PyTorch's engine multiplies.  Operands that receive nothing are left out.
  std::vector<std::pair<std::int32_t, ExprId>> pullback(std::span<const ExprId> exprs, std::span<const ExprId> cotangents);
  // Forward sweep: the tangent of expr where operand k has tangent tangents[k] (kZero: none).
  ExprId pushforward(ExprId expr, std::span<const ExprId> tangents);
  // Rebuilds `expr` of pool `from` (may be *this) here, with leaf k replaced by leaves[k].
  ExprId substitute(const ExprPool& from, ExprId expr, std::span<const ExprId> leaves);

  bool is_constant(ExprId expr, double* value = nullptr) const;
  bool is_operand(ExprId expr, std::int32_t* index = nullptr) const;
  // Number of distinct non-leaf nodes below and with expr; counting stops at kSizeLimit.
  int size(ExprId expr) const;
  static constexpr int kSizeLimit = 1024;
  std::vector<std::int32_t> operands(ExprId expr) const;               // distinct leaves, ascending
  std::vector<ExprId> reachable(std::span<const ExprId> roots) const;  // all nodes below and with the roots, ascending
  Prim prim(ExprId expr) const;
  std::span<const ExprId> args(ExprId expr) const;

 private:
  enum class Kind : std::uint8_t { constant, operand, apply };
  struct Node {
    Kind kind;
    Prim prim;
    std::uint8_t arity;
    std::int32_t index;
    double value;
    ExprId args[kMaxArity];
    bool masks = false;  // a select that what arrives at a node has passed, or a product, quotient or sum behind one
  };
  ExprId intern(const Node& node);
  ExprId make(Prim prim, std::span<const ExprId> args);
  ExprId simplify_sum(Prim prim, ExprId a, ExprId b);
  ExprId simplify_product(Prim prim, ExprId a, ExprId b);
  ExprId fold(Prim prim, std::span<const ExprId> args);
  bool is_neg(ExprId expr, ExprId* inner) const;
  ExprId multiply(ExprId value, ExprId factor, bool arrives);
  ExprId through_masks(ExprId value, ExprId factor, std::unordered_map<ExprId, ExprId>& done);
  ExprId passed(ExprId select);
  bool follows_mask(const Node& node) const;
  std::vector<std::pair<std::int32_t, ExprId>> pullback(std::span<const ExprId> exprs, std::span<const ExprId> cotangents,
                                                        bool arrives);
  void grow();

  std::vector<Node> nodes_;
  std::vector<ExprId> table_;  // open addressing, power of two, kNone = free
  std::unordered_map<ExprId, std::vector<std::pair<std::int32_t, ExprId>>> gradients_;
};

}  // namespace wengert::fused
