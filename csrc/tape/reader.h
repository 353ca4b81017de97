// The reader table: one row per PyTorch node type, saying what to take from a node and which operator it is.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>
#include <c10/core/SymInt.h>
#include <c10/util/OptionalArrayRef.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <typeindex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/pointer_index.h"
#include "common/recycled.h"
#include "tape/parameters.h"
#include "tape/saved.h"
#include "tape/tape.h"

namespace wengert::tape {

using torch::autograd::SavedVariable;

// Where saved tensors go: equal tensors (storage, geometry, dtype, and history where there is a graph to be made) share a slot.
class SlotTable {
 public:
  explicit SlotTable(std::vector<at::Tensor>& slots);
  std::int32_t add(at::Tensor tensor);

 private:
  struct History {
    const torch::autograd::Node* fn = nullptr;
    std::uint32_t output = 0;
    bool any = false;

    bool operator==(const History&) const = default;
  };
  History history_of(const at::Tensor& tensor) const;

  std::vector<at::Tensor>& slots_;
  const bool by_history_;
  common::PointerIndex by_hash_;                 // the latest slot of a hash
  common::RecycledVector<std::int32_t> before_;  // of each slot: the one before with the same hash
};

// What a row sees while its node is read; it gives the values of the row's parameters.  Everything describe() depends on must be
// among these.
class Take {
 public:
  Take(Node& node, SlotTable& slots, bool one_row) : node_(node), slots_(slots), one_row_(one_row) {}

  bool needs(int edge) const { return edge < std::ssize(node_.inputs) && node_.inputs[edge].node >= 0; }
  bool one_row() const { return one_row_; }  // see capture
  const Node& node() const { return node_; }
  const NodePtr& fn() const { return node_.fn; }

  // What the node saved, with PyTorch's complaints where it was freed or changed since, by another thread for instance.
  at::Tensor unpack(const SavedVariable& saved, bool is_result = false) const { return tape::unpack(fn(), saved, is_result); }
  std::vector<at::Tensor> unpack(const std::vector<SavedVariable>& saved, const bool& released) const {
    return tape::unpack(fn(), saved, released);
  }
  Slot saved(const SavedVariable& saved, bool wanted = true);   // an argument of the op
  Slot result(const SavedVariable& saved, bool wanted = true);  // an output of the op
  // A tensor computed while reading (under the caller's grad mode, so that it keeps its history when a graph is wanted).
  Slot derived(at::Tensor tensor);
  at::Tensor flags(at::IntArrayRef shape) const;  // all true, where the node's values lie; for a mask to be derived from

  static double number(const at::Scalar& value);
  // Sizes and the like, of either type: which it is differs between PyTorch's versions.
  static std::int64_t concrete(const c10::SymInt& value);
  static std::int64_t concrete(std::int64_t value) { return value; }
  static Integers concrete(c10::ArrayRef<c10::SymInt> values);
  static Integers concrete(c10::ArrayRef<std::int64_t> values) { return Integers(values); }
  // Of which one may stand for all axes.
  static Integers per_axis(c10::ArrayRef<c10::SymInt> values, std::int64_t axes) {
    return values.size() == 1 ? Integers(axes, concrete(values[0])) : concrete(values);
  }

  void program(std::shared_ptr<const fused::Program> program) { node_.program = std::move(program); }

  template <class P>
  void keep(const P& taken) {
    parameters::write(taken, node_);
  }

 private:
  Node& node_;
  SlotTable& slots_;
  bool one_row_;
};

// One edge to be described.
struct Site {
  const Tape& tape;
  const Node& node;
  int output;
  int input;
  fused::ExprPool& pool;

  const Meta& output_meta() const { return node.outputs[output]; }
  const Meta& input_meta() const {
    const Value value = node.inputs[input];
    return tape.nodes[value.node].outputs[value.output];
  }
  const Shape& y() const { return output_meta().shape; }
  const Shape& x() const { return input_meta().shape; }
  bool has(Slot saved) const { return saved.number >= 0; }
  bool has(Slot saved, const Shape& shape) const { return has(saved) && slot(saved).sizes() == at::IntArrayRef(shape); }
  const at::Tensor& slot(Slot saved) const { return tape.slots[saved.number]; }
};

// What the operator of a row is, in its data where edges differ.
enum class Op : std::uint8_t {
  elementwise,  // a factor at each element, inputs broadcast
  broadcast,    // the input repeated along axes
  reduction,    // new loops over the reduced axes, with a factor
  view,         // axes moved, dropped, split or sliced
  index,        // read at the entries of an index tensor
  product,      // matrix products: the contracted axis is a new loop, the other matrix the factor
  scatter,      // written into a part of the output, at an offset or at the entries of an index tensor
  zero,         // the derivative is zero everywhere
  local,        // the node is called; axes that it does not couple stay tied
  composed,     // read as the graph of what it is composed of
  program,      // the expression of a fused loop nest
  opaque,       // the node is called with everything it has
};
const char* name(Op op);

using Function = void (*)();  // typed functions of a row, which the erased ones next to them know how to call
using ErasedRead = void (*)(Function, Take&, const torch::autograd::Node&);
using ErasedDescribe = Pullback (*)(Function, const Site&);
using Hooked = bool (*)(torch::autograd::Node&);
using ErasedRewrite = at::Tensor (*)(Function, const Take&, const torch::autograd::Node&);

struct Reader {
  const char* name;  // PyTorch's name of the node
  Op op = Op::opaque;
  fused::Prim prim = fused::Prim::add;       // for rows that share a describe and differ in the primitive
  ErasedRead erased_read = nullptr;          // null: nothing is taken
  ErasedDescribe erased_describe = nullptr;  // null: opaque
  ErasedRewrite erased_rewrite = nullptr;    // null: the node is read as it is
  Hooked saves_through_hooks = nullptr;      // null: the node is never called
  Function typed_read = nullptr, typed_describe = nullptr, typed_rewrite = nullptr;

  // The op's only result, computed once more by ops that have readers, from what the node saved, with its history; undefined
  // where that is not possible or does not pay.
  at::Tensor rewritten(const Take& take, const torch::autograd::Node& node) const {
    return erased_rewrite ? erased_rewrite(typed_rewrite, take, node) : at::Tensor();
  }

  // Throws Unsupported where hooks of the user's would run in calls of the node.
  void check_hooks(torch::autograd::Node& node) const {
    if (saves_through_hooks && saves_through_hooks(node)) throw Unsupported("saved tensors with hooks");
  }

  void read(Take& take, const torch::autograd::Node& node) const {
    if (erased_read) erased_read(typed_read, take, node);
  }

  bool describes() const { return erased_describe != nullptr; }
  Pullback describe(const Site& site) const { return erased_describe(typed_describe, site); }
};

class Table {
 public:
  // A row: `read` makes parameters of a node, from which and the shapes alone `describe` makes the operator of an edge.
  template <class N, class Read, class Describe>
    requires std::invocable<Read, Take&, const N&>
  void add(const char* name, Op op, Read read, Describe describe, fused::Prim prim = fused::Prim::add) {
    add_typed<N>(name, op, +read, +describe, prim);
  }
  // A row whose operator follows from the shapes alone.
  template <class N>
  void add(const char* name, Op op, Pullback (*describe)(const Site&), fused::Prim prim = fused::Prim::add) {
    Reader row{name, op, prim};
    row.typed_describe = reinterpret_cast<Function>(describe);
    row.erased_describe = [](Function typed, const Site& site) {
      return reinterpret_cast<Pullback (*)(const Site&)>(typed)(site);
    };
    put<N>(row);
  }
  // A row for an op that stands for a composition of others.
  template <class N>
  void add_composed(const char* name, at::Tensor (*rewrite)(const Take&, const N&)) {
    Reader row{name, Op::composed};
    row.typed_rewrite = reinterpret_cast<Function>(rewrite);
    row.erased_rewrite = [](Function typed, const Take& take, const torch::autograd::Node& node) {
      return reinterpret_cast<at::Tensor (*)(const Take&, const N&)>(typed)(take, static_cast<const N&>(node));
    };
    put<N>(row);
  }
  const Reader* find(const std::type_info& type) const {
    const auto row = rows_.find(std::type_index(type));
    return row == rows_.end() ? nullptr : &row->second;
  }
  const std::unordered_map<std::type_index, Reader>& rows() const { return rows_; }

 private:
  template <class N, class P, class Given>
  void add_typed(const char* name, Op op, P (*read)(Take&, const N&), Pullback (*describe)(const Site&, Given),
                 fused::Prim prim) {
    static_assert(std::same_as<P, std::remove_cvref_t<Given>>, "describe takes what read gives");
    Reader row{name, op, prim};
    row.typed_read = reinterpret_cast<Function>(read);
    row.erased_read = [](Function typed, Take& take, const torch::autograd::Node& node) {
      take.keep(reinterpret_cast<P (*)(Take&, const N&)>(typed)(take, static_cast<const N&>(node)));
    };
    row.typed_describe = reinterpret_cast<Function>(describe);
    row.erased_describe = [](Function typed, const Site& site) {
      return reinterpret_cast<Pullback (*)(const Site&, Given)>(typed)(site, parameters::read<P>(site.node));
    };
    put<N>(row);
  }
  template <class N>
  void put(Reader row) {
    const bool read_throughout = row.op < Op::index || row.op == Op::product || row.op == Op::program;
    if (!read_throughout) row.saves_through_hooks = tape::saves_through_hooks<N>;
    rows_.insert_or_assign(std::type_index(typeid(N)), row);
  }

  std::unordered_map<std::type_index, Reader> rows_;
};

// The families.
void add_elementwise(Table& table);
void add_activations(Table& table);
void add_views(Table& table);
void add_reductions(Table& table);
void add_matmul(Table& table);
void add_index(Table& table);
void add_shape(Table& table);
void add_local(Table& table);
void add_normalization(Table& table);
void add_losses(Table& table);
void add_inplace(Table& table);
void add_fused(Table& table);
void add_complex(Table& table);
void add_attention(Table& table);

const Table& table();
const Table& complex_table();  // of nodes with a complex tensor on either side
const Reader& opaque_reader();
const Reader& accumulate_reader();

}  // namespace wengert::tape
