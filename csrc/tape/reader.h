// The reader table: one row per PyTorch node type, saying what to take from a node and which operator it is.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>
#include <c10/core/SymInt.h>
#include <c10/util/OptionalArrayRef.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstdint>
#include <optional>
#include <span>
#include <typeindex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/pointer_index.h"
#include "common/recycled.h"
#include "tape/saved.h"
#include "tape/tape.h"

namespace wengert::tape {

using torch::autograd::SavedVariable;

// Where saved tensors go: equal tensors (storage, geometry, dtype, history) share a slot.
class SlotTable {
 public:
  explicit SlotTable(std::vector<at::Tensor>& slots) : slots_(slots) {}
  std::int32_t add(at::Tensor tensor);

 private:
  std::vector<at::Tensor>& slots_;
  common::PointerIndex by_data_;                 // the latest slot at an address
  common::RecycledVector<std::int32_t> before_;  // of each slot: the one before at the same address
};

// What a row sees while its node is read.  Everything describe() depends on must be taken here, as it makes the signature.
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
  void slot(const SavedVariable& saved, bool wanted = true);    // an argument of the op
  void result(const SavedVariable& saved, bool wanted = true);  // an output of the op
  // A tensor computed while reading (under the caller's grad mode, so that it keeps its history when a graph is wanted).
  void derived(at::Tensor tensor);
  void no_slot() { node_.slots.push_back(-1); }
  at::Tensor flags(at::IntArrayRef shape) const;  // all true, where the node's values lie; for a mask to be derived from

  void integer(std::int64_t value) { node_.ints.push_back(value); }
  void integer(const c10::SymInt& value) { node_.ints.push_back(concrete(value)); }
  void integers(c10::ArrayRef<std::int64_t> values) { node_.ints.insert(node_.ints.end(), values.begin(), values.end()); }
  void integers(c10::ArrayRef<c10::SymInt> values) {
    for (const c10::SymInt& value : values) integer(value);
  }
  void real(double value) { node_.reals.push_back(value); }
  void real(const at::Scalar& value);

  void program(std::shared_ptr<const fused::Program> program) { node_.program = std::move(program); }

  static std::int64_t concrete(const c10::SymInt& value);

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
  std::int64_t integer(int k) const { return node.ints[k]; }
  double real(int k) const { return node.reals[k]; }
  bool has(int k) const { return k < std::ssize(node.slots) && node.slots[k] >= 0; }
  const at::Tensor& slot(int k) const { return tape.slots[node.slots[k]]; }
};

using TypedRead = void (*)();
using ErasedRead = void (*)(TypedRead, Take&, const torch::autograd::Node&);
using ErasedRewrite = at::Tensor (*)(TypedRead, const Take&, const torch::autograd::Node&);
using Describe = Pullback (*)(const Site&);

struct Reader {
  const char* name;                     // PyTorch's name of the node
  Describe describe = nullptr;          // null: opaque
  fused::Prim prim = fused::Prim::add;  // for rows that share a describe and differ in the primitive
  ErasedRead erased = nullptr;          // null: nothing is taken
  TypedRead typed = nullptr;
  ErasedRewrite erased_rewrite = nullptr;  // null: the node is read as it is
  TypedRead typed_rewrite = nullptr;

  // The op's only result, computed once more by ops that have readers, from what the node saved, with its history; undefined
  // where that is not possible or does not pay.
  at::Tensor rewritten(const Take& take, const torch::autograd::Node& node) const {
    return erased_rewrite ? erased_rewrite(typed_rewrite, take, node) : at::Tensor();
  }

  void read(Take& take, const torch::autograd::Node& node) const {
    if (erased) erased(typed, take, node);
  }
};

class Table {
 public:
  template <class N>
  void add(const char* name, void (*read)(Take&, const N&), Describe describe, fused::Prim prim = fused::Prim::add) {
    Reader row{name, describe, prim};
    row.typed = reinterpret_cast<TypedRead>(read);
    row.erased = [](TypedRead typed, Take& take, const torch::autograd::Node& node) {
      reinterpret_cast<void (*)(Take&, const N&)>(typed)(take, static_cast<const N&>(node));
    };
    rows_.insert_or_assign(std::type_index(typeid(N)), row);
  }
  // A row whose operator follows from the shapes alone.
  template <class N>
  void add(const char* name, Describe describe, fused::Prim prim = fused::Prim::add) {
    rows_.insert_or_assign(std::type_index(typeid(N)), Reader{name, describe, prim});
  }
  // A row for an op that stands for a composition of others.
  template <class N>
  void add_composed(const char* name, at::Tensor (*rewrite)(const Take&, const N&)) {
    Reader row{name};
    row.typed_rewrite = reinterpret_cast<TypedRead>(rewrite);
    row.erased_rewrite = [](TypedRead typed, const Take& take, const torch::autograd::Node& node) {
      return reinterpret_cast<at::Tensor (*)(const Take&, const N&)>(typed)(take, static_cast<const N&>(node));
    };
    rows_.insert_or_assign(std::type_index(typeid(N)), row);
  }
  const Reader* find(const std::type_info& type) const {
    const auto row = rows_.find(std::type_index(type));
    return row == rows_.end() ? nullptr : &row->second;
  }

 private:
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
