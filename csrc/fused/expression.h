// Lazy elementwise expressions: a hash-consed, simplified DAG that can be differentiated symbolically to any order.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "fused/primitives.h"

namespace wengert::fused {

using ExprId = std::int32_t;
inline constexpr ExprId kNone = -1;  // absent: an argument the caller does not have
inline constexpr ExprId kZero = 0;   // structural zero: "does not depend on", exact even against inf and nan
inline constexpr ExprId kOne = 1;    // the constant 1

class ExprPool {
 public:
  ExprPool();
  ExprId constant(double value);
  ExprId operand(std::int32_t index);  // leaf: the index-th operand of the loop nest
  ExprId apply(Prim prim, std::span<const ExprId> args);

  ExprId add(ExprId a, ExprId b);
  ExprId sub(ExprId a, ExprId b);
  ExprId mul(ExprId a, ExprId b);
  ExprId div(ExprId a, ExprId b);
  ExprId neg(ExprId a);

  // d prim(args) / d args[arg].  `result` is prim(args) itself.  Uses exactly those of args/result that PyTorch's own formula
  // (derivatives.yaml) saves; the others may be kNone.  Returns kZero for a derivative that is identically zero.
  ExprId partial(Prim prim, int arg, std::span<const ExprId> args, ExprId result);
  // d expr / d operand
  ExprId derivative(ExprId expr, std::int32_t operand);
  // Rebuilds `expr` of pool `from` (may be *this) here, with leaf k replaced by leaves[k].
  ExprId substitute(const ExprPool& from, ExprId expr, std::span<const ExprId> leaves);

  bool is_constant(ExprId expr, double* value = nullptr) const;
  bool is_operand(ExprId expr, std::int32_t* index = nullptr) const;
  int size(ExprId expr) const;                                     // number of distinct non-leaf nodes below and with expr
  std::vector<std::int32_t> operands(ExprId expr) const;           // distinct leaves, ascending
  Prim prim(ExprId expr) const;
  std::span<const ExprId> args(ExprId expr) const;
};

}  // namespace wengert::fused
