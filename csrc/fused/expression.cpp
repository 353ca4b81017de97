#include "fused/expression.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "fused/primitive_ops.h"

namespace wengert::fused {

namespace prim {

// What a partial's formula is written over: an expression with operators.
struct Handle {
  ExprPool* pool;
  ExprId id;

  Handle zero() const { return {pool, kZero}; }
  Handle one() const { return {pool, kOne}; }
  Handle none() const { return {pool, kNone}; }
  Handle num(double value) const { return {pool, pool->constant(value)}; }
  bool is_number(double* value) const { return id != kNone && pool->is_constant(id, value); }
};

#define WENGERT_HANDLE_OPERATOR(symbol, method)                                                      \
  inline Handle operator symbol(Handle a, Handle b) { return {a.pool, a.pool->method(a.id, b.id)}; } \
  inline Handle operator symbol(double a, Handle b) { return b.num(a) symbol b; }                    \
  inline Handle operator symbol(Handle a, double b) { return a symbol a.num(b); }
WENGERT_HANDLE_OPERATOR(+, add)
WENGERT_HANDLE_OPERATOR(-, sub)
WENGERT_HANDLE_OPERATOR(*, mul)
WENGERT_HANDLE_OPERATOR(/, div)
#undef WENGERT_HANDLE_OPERATOR
inline Handle operator-(Handle a) { return {a.pool, a.pool->neg(a.id)}; }

#define WENGERT_HANDLE_FUNCTION(name)                        \
  template <class... Rest>                                   \
  Handle name(Handle first, Rest... rest) {                  \
    const ExprId ids[] = {first.id, rest.id...};             \
    return {first.pool, first.pool->apply(Prim::name, ids)}; \
  }
WENGERT_FOR_EACH_PRIM(WENGERT_HANDLE_FUNCTION)
#undef WENGERT_HANDLE_FUNCTION

}  // namespace prim

const PrimInfo& info(Prim prim) {
  static const PrimInfo table[] = {
#define WENGERT_ROW(name) {#name, prim::Op<Prim::name>::kArity, prim::Op<Prim::name>::kCommutative},
      WENGERT_FOR_EACH_PRIM(WENGERT_ROW)
#undef WENGERT_ROW
  };
  return table[static_cast<int>(prim)];
}

namespace {

const std::unordered_map<std::string_view, Prim>& prims_by_name() {
  static const auto* names = [] {
    auto* map = new std::unordered_map<std::string_view, Prim>;
    for (int i = 0; i < kPrimCount; ++i) map->emplace(info(static_cast<Prim>(i)).name, static_cast<Prim>(i));
    return map;
  }();
  return *names;
}
[[maybe_unused]] const auto& made_at_load = prims_by_name();  // see common::ForkSafeMutex

}  // namespace

bool find_prim(std::string_view name, Prim* prim) {
  const auto found = prims_by_name().find(name);
  if (found == prims_by_name().end()) return false;
  *prim = found->second;
  return true;
}

namespace {

// Marks of visited nodes, valid while the epoch lasts: no clearing between walks.
struct Visited {
  std::vector<std::uint32_t> marks;
  std::uint32_t epoch = 0;
  std::vector<ExprId> stack;

  void start(std::size_t nodes) {
    if (marks.size() < nodes) marks.resize(nodes + nodes / 2, 0);
    if (++epoch == 0) {
      std::fill(marks.begin(), marks.end(), 0);
      epoch = 1;
    }
    stack.clear();
  }
  bool first_visit(ExprId id) {
    if (marks[id] == epoch) return false;
    marks[id] = epoch;
    return true;
  }
};

Visited& visited() {
  thread_local Visited scratch;
  return scratch;
}

// Calls on(id) once for each node below and with the roots; stops when it returns false.
template <class ArgsOf, class On>
void walk(std::size_t nodes, std::span<const ExprId> roots, ArgsOf args_of, On on) {
  Visited& scratch = visited();
  scratch.start(nodes);
  for (ExprId root : roots) {
    if (scratch.first_visit(root)) scratch.stack.push_back(root);
  }
  while (!scratch.stack.empty()) {
    ExprId id = scratch.stack.back();
    scratch.stack.pop_back();
    if (!on(id)) return;
    for (ExprId arg : args_of(id)) {
      if (scratch.first_visit(arg)) scratch.stack.push_back(arg);
    }
  }
}

// A value for each of some nodes of a pool, which may have many more: ids ascend.
template <class T>
class Over {
 public:
  Over(const std::vector<ExprId>& ids, T value) : ids_(ids), values_(ids.size(), value) {}
  T& operator[](ExprId id) { return values_[std::lower_bound(ids_.begin(), ids_.end(), id) - ids_.begin()]; }

 private:
  const std::vector<ExprId>& ids_;
  std::vector<T> values_;
};

std::size_t mix(std::size_t h, std::uint64_t v) { return (h ^ v) * 0x9E3779B97F4A7C15ull ^ (h >> 29); }

}  // namespace

ExprPool::ExprPool() {
  nodes_.reserve(32);
  table_.assign(64, kNone);
  nodes_.push_back({Kind::constant, Prim::add, 0, /*index=*/1, 0.0, {}});  // index 1 sets it apart from the number 0
  intern({Kind::constant, Prim::add, 0, 0, 1.0, {}});
}

void ExprPool::grow() {
  std::vector<Node> nodes = std::move(nodes_);
  table_.assign(table_.size() * 2, kNone);
  nodes_.clear();
  nodes_.reserve(nodes.size() * 2);
  nodes_.push_back(nodes[0]);
  for (std::size_t i = 1; i < nodes.size(); ++i) intern(nodes[i]);
}

ExprId ExprPool::intern(const Node& node) {
  if (nodes_.size() * 2 > table_.size()) grow();
  std::uint64_t bits = std::bit_cast<std::uint64_t>(node.value);
  std::size_t h = mix(static_cast<std::size_t>(node.kind) << 8 | static_cast<std::size_t>(node.prim), bits);
  h = mix(h, static_cast<std::uint32_t>(node.index));
  for (int i = 0; i < node.arity; ++i) h = mix(h, static_cast<std::uint32_t>(node.args[i]));
  std::size_t mask = table_.size() - 1;
  for (std::size_t slot = (h ^ h >> 32) & mask;; slot = (slot + 1) & mask) {
    ExprId id = table_[slot];
    if (id == kNone) {
      id = static_cast<ExprId>(nodes_.size());
      table_[slot] = id;
      nodes_.push_back(node);
      return id;
    }
    const Node& other = nodes_[id];
    if (other.kind == node.kind && other.prim == node.prim && other.arity == node.arity && other.index == node.index &&
        std::bit_cast<std::uint64_t>(other.value) == bits && std::equal(node.args, node.args + node.arity, other.args)) {
      return id;
    }
  }
}

ExprId ExprPool::constant(double value) { return intern({Kind::constant, Prim::add, 0, 0, value, {}}); }
ExprId ExprPool::operand(std::int32_t index) { return intern({Kind::operand, Prim::add, 0, index, 0.0, {}}); }

bool ExprPool::is_constant(ExprId expr, double* value) const {
  if (nodes_[expr].kind != Kind::constant) return false;
  if (value) *value = nodes_[expr].value;
  return true;
}
bool ExprPool::is_operand(ExprId expr, std::int32_t* index) const {
  if (nodes_[expr].kind != Kind::operand) return false;
  if (index) *index = nodes_[expr].index;
  return true;
}
Prim ExprPool::prim(ExprId expr) const { return nodes_[expr].prim; }
std::span<const ExprId> ExprPool::args(ExprId expr) const { return {nodes_[expr].args, nodes_[expr].arity}; }

bool ExprPool::is_neg(ExprId expr, ExprId* inner) const {
  const Node& node = nodes_[expr];
  if (node.kind != Kind::apply || node.prim != Prim::neg) return false;
  *inner = node.args[0];
  return true;
}

ExprId ExprPool::make(Prim prim, std::span<const ExprId> args) {
  Node node{Kind::apply, prim, static_cast<std::uint8_t>(args.size()), 0, 0.0, {}};
  std::copy(args.begin(), args.end(), node.args);
  if (info(prim).commutative && node.args[0] > node.args[1]) std::swap(node.args[0], node.args[1]);
  node.masks = follows_mask(node);
  return intern(node);
}

bool ExprPool::follows_mask(const Node& node) const {
  switch (node.prim) {
    case Prim::add:
    case Prim::sub:
    case Prim::mul:
      return nodes_[node.args[0]].masks || nodes_[node.args[1]].masks;
    case Prim::neg:
    case Prim::div:
      return nodes_[node.args[0]].masks;
    default:
      return false;
  }
}

// A constant is folded where float and double arithmetic agree, so that the fold is exact for either compute type.
ExprId ExprPool::fold(Prim prim, std::span<const ExprId> args) {
  double x[kMaxArity];
  for (std::size_t i = 0; i < args.size(); ++i) {
    if (!is_constant(args[i], &x[i])) return kNone;
  }
  double wide;
  float narrow;
  auto f = [](double v) { return static_cast<float>(v); };
  switch (prim) {
    case Prim::add:
      wide = x[0] + x[1], narrow = f(x[0]) + f(x[1]);
      break;
    case Prim::sub:
      wide = x[0] - x[1], narrow = f(x[0]) - f(x[1]);
      break;
    case Prim::mul:
      wide = x[0] * x[1], narrow = f(x[0]) * f(x[1]);
      break;
    case Prim::div:
      wide = x[0] / x[1], narrow = f(x[0]) / f(x[1]);
      break;
    case Prim::reciprocal:
      wide = 1 / x[0], narrow = 1 / f(x[0]);
      break;
    case Prim::square:
      wide = x[0] * x[0], narrow = f(x[0]) * f(x[0]);
      break;
    case Prim::sqrt:
      wide = std::sqrt(x[0]), narrow = std::sqrt(f(x[0]));
      break;
    case Prim::neg:
      return constant(-x[0]);
    default:
      return kNone;
  }
  return f(wide) == narrow ? constant(wide) : kNone;
}

ExprId ExprPool::simplify_sum(Prim prim, ExprId a, ExprId b) {
  bool subtract = prim == Prim::sub;
  if (b == kZero) return a;
  if (a == kZero) return subtract ? neg(b) : b;
  ExprId inner;
  if (is_neg(b, &inner)) return subtract ? add(a, inner) : sub(a, inner);
  if (!subtract && is_neg(a, &inner)) return sub(b, inner);
  const ExprId args[] = {a, b};
  return make(prim, args);
}

ExprId ExprPool::simplify_product(Prim prim, ExprId a, ExprId b) {
  bool divide = prim == Prim::div;
  if (a == kZero || (b == kZero && !divide)) return kZero;
  if (b == kOne) return a;
  if (a == kOne && !divide) return b;
  double value = 0;
  bool b_constant = is_constant(b, &value);
  if (b_constant && value == -1) return neg(a);
  if (!divide && is_constant(a, &value) && value == -1) return neg(b);
  ExprId inner;
  auto product = [&](ExprId x, ExprId y) {
    const ExprId args[] = {x, y};
    return apply(prim, args);
  };
  if (is_neg(b, &inner)) return product(neg(a), inner);
  if (is_neg(a, &inner)) return b_constant ? product(inner, neg(b)) : neg(product(inner, b));
  int exponent;
  if (divide && b_constant && std::frexp(value, &exponent) == std::copysign(0.5, value) && std::abs(exponent) < 100) {
    return mul(a, constant(1 / value));  // a power of two: the reciprocal is exact
  }
  const ExprId args[] = {a, b};
  return make(prim, args);
}

ExprId ExprPool::apply(Prim prim, std::span<const ExprId> given) {
  if (static_cast<int>(given.size()) != info(prim).arity) {
    throw std::invalid_argument(std::string("wrong number of arguments for ") + info(prim).name);
  }
  ExprId copy[kMaxArity];  // the caller's span may point into nodes_
  std::copy(given.begin(), given.end(), copy);
  std::span<const ExprId> args(copy, given.size());
  bool structural = std::find(args.begin(), args.end(), kZero) != args.end();
  if (!structural) {
    if (ExprId folded = fold(prim, args); folded != kNone) return folded;
  }
  ExprId inner;
  double value;
  switch (prim) {
    case Prim::add:
    case Prim::sub:
      return simplify_sum(prim, args[0], args[1]);
    case Prim::mul:
    case Prim::div:
      return simplify_product(prim, args[0], args[1]);
    case Prim::pow: {  // further exponents become other primitives in a program's code, after all differentiation
      const bool known = is_constant(args[1], &value);
      if (known && value == 0) return kOne;
      if (known && value == 1) return args[0];
      return known && value == 2 ? apply(Prim::square, args.first(1)) : make(prim, args);
    }
    case Prim::neg: {
      if (args[0] == kZero) return kZero;
      if (is_neg(args[0], &inner)) return inner;
      const Node& node = nodes_[args[0]];
      if (node.kind == Kind::apply && node.prim == Prim::mul) {
        for (int k = 0; k < 2; ++k) {
          if (is_constant(node.args[k], &value)) {
            ExprId other = node.args[1 - k];
            return mul(other, constant(-value));
          }
        }
      }
      return make(prim, args);
    }
    case Prim::where: {
      if (is_constant(args[0], &value)) return value != 0 ? args[1] : args[2];
      if (args[1] == args[2]) return args[1];
      return make(prim, args);
    }
    default:
      return make(prim, args);
  }
}

ExprId ExprPool::add(ExprId a, ExprId b) {
  const ExprId args[] = {a, b};
  return apply(Prim::add, args);
}

std::pair<ExprId, ExprId> ExprPool::split(ExprId product, const std::vector<bool>& inside) {
  const Node node = nodes_[product];  // a copy: nodes_ grows
  if (node.kind == Kind::apply && node.prim == Prim::mul) {
    const auto [a, outside_a] = split(node.args[0], inside);
    const auto [b, outside_b] = split(node.args[1], inside);
    if (outside_a == kOne && outside_b == kOne) return {product, kOne};
    return {mul(a, b), mul(outside_a, outside_b)};
  }
  if (node.kind == Kind::apply && node.prim == Prim::neg) {
    const auto [a, outside] = split(node.args[0], inside);
    return outside == kOne ? std::pair(product, kOne) : std::pair(a, neg(outside));
  }
  const std::vector<std::int32_t> read = operands(product);
  const bool stays = read.empty() || std::ranges::any_of(read, [&](std::int32_t k) { return inside[k]; });
  return stays ? std::pair(product, kOne) : std::pair(kOne, product);
}

ExprId ExprPool::sub(ExprId a, ExprId b) {
  const ExprId args[] = {a, b};
  return apply(Prim::sub, args);
}
ExprId ExprPool::div(ExprId a, ExprId b) {
  const ExprId args[] = {a, b};
  return apply(Prim::div, args);
}
ExprId ExprPool::neg(ExprId a) {
  const ExprId args[] = {a};
  return apply(Prim::neg, args);
}
ExprId ExprPool::multiply(ExprId value, ExprId factor, bool arrives) {
  const Node node = nodes_[factor];  // a copy: nodes_ grows
  if (value != kZero && node.kind == Kind::apply) {
    if (node.prim == Prim::where && (node.args[1] == kZero || node.args[2] == kZero)) {
      const auto branch = [&](ExprId arg) { return arg == kZero ? kZero : multiply(value, arg, arrives); };
      const ExprId args[] = {node.args[0], branch(node.args[1]), branch(node.args[2])};
      const ExprId result = apply(Prim::where, args);
      return arrives || node.masks ? passed(result) : result;
    }
    if (value != kOne && node.masks) {
      std::unordered_map<ExprId, ExprId> done;
      return through_masks(value, factor, done);
    }
    if (value != kOne && node.prim == Prim::div && node.args[0] == kOne) return div(value, node.args[1]);
  }
  const ExprId args[] = {value, factor};
  return apply(Prim::mul, args);
}

// value * factor where masks stand inside the factor: each step of the factor is taken in its order.
ExprId ExprPool::through_masks(ExprId value, ExprId factor, std::unordered_map<ExprId, ExprId>& done) {
  const Node node = nodes_[factor];  // a copy: nodes_ grows
  if (!node.masks || node.prim == Prim::where) return mul(value, factor);
  if (auto found = done.find(factor); found != done.end()) return found->second;
  const auto through = [&](int k) { return node.args[k] == kZero ? kZero : through_masks(value, node.args[k], done); };
  ExprId result = kNone;
  switch (node.prim) {
    case Prim::mul: {
      const int first = nodes_[node.args[0]].masks ? 0 : 1;
      result = mul(through(first), node.args[1 - first]);
      break;
    }
    case Prim::div:
      result = div(through(0), node.args[1]);
      break;
    case Prim::neg:
      result = neg(through(0));
      break;
    default: {  // add, sub
      const ExprId args[] = {through(0), through(1)};
      result = apply(node.prim, args);
    }
  }
  return done.emplace(factor, result).first->second;
}

// The same select, marked: a node of its own, as a select of the same values in the forward computation masks nothing that
// arrives.
ExprId ExprPool::passed(ExprId select) {
  Node node = nodes_[select];
  if (node.kind != Kind::apply || node.prim != Prim::where || node.masks) return select;
  node.index = 1;
  node.masks = true;
  return intern(node);
}

ExprId ExprPool::partial(Prim prim, int arg, std::span<const ExprId> args, ExprId result) {
  prim::Handle handles[kMaxArity];
  for (std::size_t i = 0; i < args.size(); ++i) handles[i] = {this, args[i]};
  prim::Handle r{this, result};
  return prim::visit(prim, [&](auto op) { return decltype(op)::template partial<prim::Handle>(arg, handles, r).id; });
}

std::vector<ExprId> ExprPool::reachable(std::span<const ExprId> roots) const {
  std::vector<ExprId> found;
  walk(
      nodes_.size(), roots, [&](ExprId id) { return args(id); },
      [&](ExprId id) {
        found.push_back(id);
        return true;
      });
  std::sort(found.begin(), found.end());
  return found;
}

int ExprPool::size(ExprId expr) const {
  int count = 0;
  walk(
      nodes_.size(), {&expr, 1}, [&](ExprId id) { return args(id); },
      [&](ExprId id) {
        count += nodes_[id].kind == Kind::apply;
        return count < kSizeLimit;
      });
  return count;
}

std::vector<std::int32_t> ExprPool::operands(ExprId expr) const {
  std::vector<std::int32_t> found;
  walk(
      nodes_.size(), {&expr, 1}, [&](ExprId id) { return args(id); },
      [&](ExprId id) {
        if (nodes_[id].kind == Kind::operand) found.push_back(nodes_[id].index);
        return true;
      });
  std::sort(found.begin(), found.end());
  return found;
}

namespace {

[[noreturn]] void missing(Prim prim, int arg) {
  throw std::domain_error(std::string("no derivative formula for argument ") + std::to_string(arg) + " of " + info(prim).name);
}

}  // namespace

std::vector<std::pair<std::int32_t, ExprId>> ExprPool::pullback(std::span<const ExprId> exprs,
                                                                std::span<const ExprId> cotangents) {
  return pullback(exprs, cotangents, false);
}

std::vector<std::pair<std::int32_t, ExprId>> ExprPool::pullback(std::span<const ExprId> exprs, std::span<const ExprId> cotangents,
                                                                bool arrives) {
  std::vector<ExprId> order = reachable(exprs);
  if (order.empty()) return {};
  Over<ExprId> adjoint(order, kZero);
  for (std::size_t j = 0; j < exprs.size(); ++j) adjoint[exprs[j]] = add(adjoint[exprs[j]], cotangents[j]);
  // Nodes no operand is below need no sweep; a formula missing there is not missed.
  Over<char> depends(order, 0);
  for (ExprId id : order) {
    depends[id] = nodes_[id].kind == Kind::operand;
    for (ExprId arg : args(id)) depends[id] |= depends[arg];
  }
  std::vector<std::pair<std::int32_t, ExprId>> result;
  for (auto it = order.rbegin(); it != order.rend(); ++it) {
    ExprId id = *it;
    if (adjoint[id] == kZero) continue;
    const Node node = nodes_[id];  // a copy: building formulas grows nodes_
    if (node.kind == Kind::operand) result.emplace_back(node.index, adjoint[id]);
    for (int k = 0; k < node.arity; ++k) {
      ExprId arg = node.args[k];
      if (!depends[arg]) continue;
      ExprId factor = partial(node.prim, k, {node.args, node.arity}, id);
      if (factor == kNone) missing(node.prim, k);
      adjoint[arg] = add(adjoint[arg], multiply(adjoint[id], factor, arrives));
    }
  }
  std::sort(result.begin(), result.end());
  return result;
}

ExprId ExprPool::derivative(ExprId expr, std::int32_t operand) {
  auto found = gradients_.find(expr);
  if (found == gradients_.end()) {
    const ExprId seed = kOne;
    found = gradients_.emplace(expr, pullback({&expr, 1}, {&seed, 1}, /*arrives=*/true)).first;
  }
  for (auto [index, value] : found->second) {
    if (index == operand) return value;
  }
  return kZero;
}

ExprId ExprPool::pushforward(ExprId expr, std::span<const ExprId> tangents) {
  std::vector<ExprId> order = reachable({&expr, 1});
  Over<ExprId> tangent(order, kZero);
  for (ExprId id : order) {
    const Node node = nodes_[id];
    if (node.kind == Kind::operand) tangent[id] = tangents[node.index];
    for (int k = 0; k < node.arity; ++k) {
      if (tangent[node.args[k]] == kZero) continue;
      ExprId factor = partial(node.prim, k, {node.args, node.arity}, id);
      if (factor == kNone) missing(node.prim, k);
      tangent[id] = add(tangent[id], mul(tangent[node.args[k]], factor));
    }
  }
  return tangent[expr];
}

ExprId ExprPool::substitute(const ExprPool& from, ExprId expr, std::span<const ExprId> leaves) {
  std::vector<ExprId> order = from.reachable({&expr, 1});
  Over<ExprId> image(order, kNone);
  for (ExprId id : order) {
    const Node node = from.nodes_[id];
    switch (node.kind) {
      case Kind::constant:
        // What another program masked has become a number here.
        image[id] = id == kZero && &from == this ? kZero : constant(node.value);
        break;
      case Kind::operand:
        image[id] = leaves[node.index];
        break;
      case Kind::apply: {
        ExprId args[kMaxArity];
        for (int k = 0; k < node.arity; ++k) args[k] = image[node.args[k]];
        image[id] = apply(node.prim, {args, node.arity});
        if (node.masks && node.prim == Prim::where) image[id] = passed(image[id]);
        break;
      }
    }
  }
  return image[expr];
}

}  // namespace wengert::fused
