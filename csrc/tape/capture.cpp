#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "common/behind.h"
#include "common/key.h"
#include "common/node_ptr.h"
#include "common/pointer_index.h"
#include "common/recycled.h"
#include "ops/backend.h"
#include "ops/fused_autograd.h"
#include "ops/graph_stream.h"
#include "tape/ambient.h"
#include "tape/custom.h"
#include "tape/reader.h"
#include "tape/streams.h"

namespace wengert::tape {

namespace {

namespace autograd = torch::autograd;

// Hooks have to see every gradient that PyTorch would show them.
void check_hooks(autograd::Node& fn, bool runs) {
  if (has_tensor_hooks(fn)) throw Unsupported("a tensor with hooks or retain_grad");
  if (runs && has_node_hooks(fn)) throw Unsupported("a graph node with hooks");
}

// The backward of a reentrant checkpoint starts a whole backward pass of its own, which PyTorch allows only below .backward().
void check_custom(const autograd::Node& fn) {
  if (fn.name() == "CheckpointFunctionBackward") throw Unsupported("reentrant checkpointing");
  if (saves_through_hooks(fn)) throw Unsupported("saved tensors with hooks");
}

void read_meta(const autograd::InputMetadata& metadata, Meta& meta) {
  meta.shape.clear();
  meta.complex = false;
  if (metadata.was_default_constructed()) {  // an output the op left undefined: nothing refers to it
    meta.dtype = at::ScalarType::Undefined;
    return;
  }
  if (metadata.is_tensor_subclass()) throw Unsupported("a tensor subclass");
  if (metadata.is_nested_tensor()) throw Unsupported("a nested tensor");
  if (metadata.layout() != at::kStrided) throw Unsupported("a layout other than strided");
  meta.dtype = c10::typeMetaToScalarType(metadata.dtype());
  if (at::isQIntType(meta.dtype)) throw Unsupported("quantised numbers");
  if (metadata.grad_dtype().has_value() && *metadata.grad_dtype() != meta.dtype) throw Unsupported("a gradient dtype of its own");
  const c10::SymIntArrayRef shape = metadata.shape_as_dim_vector();
  meta.shape.reserve(shape.size());
  for (const c10::SymInt& extent : shape) meta.shape.push_back(Take::concrete(extent));
  meta.complex = at::isComplexType(meta.dtype);
  if (meta.complex) {
    meta.dtype = at::toRealValueType(meta.dtype);
    meta.shape.push_back(2);
  }
}

bool is_complex(const autograd::InputMetadata& metadata) {
  return !metadata.was_default_constructed() && at::isComplexType(c10::typeMetaToScalarType(metadata.dtype()));
}

bool touches_complex(const autograd::Node& fn) {
  for (std::uint32_t o = 0; o < fn.num_inputs(); ++o) {
    if (is_complex(fn.input_metadata(o))) return true;
  }
  return std::ranges::any_of(fn.next_edges(), [](const autograd::Edge& edge) {
    return edge.function && is_complex(edge.function->input_metadata(edge.input_nr));
  });
}

// type_info objects of PyTorch's nodes are unique, so a small direct-mapped cache spares hashing their names.
const Reader* find_reader(const autograd::Node& fn) {
  struct Cell {
    const std::type_info* type = nullptr;
    const Reader* reader = nullptr;
  };
  static thread_local std::array<Cell, 512> cache;
  const std::type_info& type = typeid(fn);
  Cell& cell = cache[(reinterpret_cast<std::uintptr_t>(&type) >> 4) % cache.size()];
  if (cell.type != &type) {
    const Reader* reader = table().find(type);
    if (reader == nullptr) reader = type == typeid(autograd::AccumulateGrad) ? &accumulate_reader() : &opaque_reader();
    cell = {&type, reader};
  }
  return cell.reader;
}

// Few programs have such nodes: no cache.
const Reader* find_complex_reader(const autograd::Node& fn) {
  const Reader* reader = complex_table().find(typeid(fn));
  return reader != nullptr ? reader : &opaque_reader();
}

// In the place of nodes of composed ops: the graph of what they are composed of.
using Rewritten = std::map<autograd::Node*, autograd::Edge>;

struct Visit {
  autograd::Node* fn;
  std::int32_t first_request = -1;  // head of the chain of requested inputs that are outputs of this node
  std::int32_t first_target = 0;    // where the visits its edges lead to are listed
  std::int32_t tape_index = -1;
  bool seen = false;
  bool below = false;    // a requested input is reached through one of its edges
  bool reached = false;  // a wanted edge or a requested output leads here
};

class Walk {
 public:
  Walk(const std::vector<autograd::Edge>& outputs, const std::vector<autograd::Edge>& inputs, Rewritten rewritten = {})
      : outputs_(outputs),
        inputs_(inputs),
        rewritten_(std::move(rewritten)),
        next_request_(inputs.size(), -1),
        input_reached_(inputs.size(), false) {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].function) continue;
      least_ = std::min(least_, common::topological_nr(*inputs[i].function));
      Visit& visit = visits_[find(inputs[i].function.get())];
      next_request_[i] = visit.first_request;
      visit.first_request = static_cast<std::int32_t>(i);
    }
    search();
    mark();
  }

  // The visits that belong on the tape, each before all it leads to.
  const std::vector<std::int32_t>& order() const { return order_; }
  const Visit& visit(std::int32_t index) const { return visits_[index]; }
  bool input_reached(std::size_t i) const { return input_reached_[i]; }

  Value value(const autograd::Edge& given) {
    const autograd::Edge& edge = resolved(given);
    return value(edge, edge.function ? find(edge.function.get()) : -1);
  }
  // Of the visit's edge k.
  Value value(const Visit& visit, std::size_t k) const {
    return value(resolved(visit.fn->next_edges()[k]), targets_[visit.first_target + k]);
  }
  bool requested(autograd::Node* fn) { return visits_[find(fn)].first_request >= 0; }

 private:
  const autograd::Edge& resolved(const autograd::Edge& edge) const {
    if (rewritten_.empty()) return edge;
    const auto found = rewritten_.find(edge.function.get());
    return found == rewritten_.end() ? edge : found->second;
  }

  std::int32_t find(autograd::Node* fn) {
    std::int32_t& index = index_[fn];
    if (index < 0) {
      index = static_cast<std::int32_t>(visits_.size());
      visits_.push_back(Visit{fn});
    }
    return index;
  }

  // Calls f with each requested input that is what this edge leads to.
  template <class F>
  void requests(const autograd::Edge& edge, std::int32_t target, F f) const {
    for (std::int32_t i = visits_[target].first_request; i >= 0; i = next_request_[i]) {
      if (inputs_[i].input_nr == edge.input_nr) f(i);
    }
  }

  // Does a derivative through this edge arrive at a requested input?
  bool wanted(const autograd::Edge& edge, std::int32_t target) const {
    if (target < 0) return false;
    bool requested = visits_[target].below;
    requests(edge, target, [&](std::int32_t) { requested = true; });
    return requested;
  }

  Value value(const autograd::Edge& edge, std::int32_t target) const {
    if (!wanted(edge, target)) return {};
    return {visits_[target].tape_index, static_cast<std::int32_t>(edge.input_nr)};
  }

  void search() {
    struct Frame {
      std::int32_t visit;
      std::uint32_t edge;
    };
    c10::SmallVector<Frame, 32> stack;
    const auto enter = [&](std::int32_t index) {
      Visit& visit = visits_[index];
      if (visit.seen || common::topological_nr(*visit.fn) < least_) return;
      visit.seen = true;
      visit.first_target = static_cast<std::int32_t>(targets_.size());
      targets_.resize(targets_.size() + visit.fn->num_outputs(), -1);
      stack.push_back({index, 0});
    };
    for (const autograd::Edge& given : outputs_) {
      const autograd::Edge& output = resolved(given);
      if (output.function) enter(find(output.function.get()));
      while (!stack.empty()) {
        Frame& frame = stack.back();
        Visit& visit = visits_[frame.visit];
        const autograd::edge_list& edges = visit.fn->next_edges();
        if (frame.edge < edges.size()) {
          const std::uint32_t k = frame.edge++;
          const autograd::Edge& edge = resolved(edges[k]);
          if (!edge.function) continue;
          const std::int32_t first = visit.first_target, target = find(edge.function.get());  // which may move the visits
          targets_[first + k] = target;
          enter(target);
          continue;
        }
        for (std::size_t k = 0; k < edges.size() && !visit.below; ++k) {
          visit.below = wanted(resolved(edges[k]), targets_[visit.first_target + k]);
        }
        order_.push_back(frame.visit);
        stack.pop_back();
      }
    }
    std::reverse(order_.begin(), order_.end());
  }

  void reach(const autograd::Edge& edge, std::int32_t target) {
    if (!wanted(edge, target)) return;
    visits_[target].reached = true;
    requests(edge, target, [&](std::int32_t i) { input_reached_[i] = true; });
  }

  void mark() {
    for (const autograd::Edge& given : outputs_) {
      const autograd::Edge& output = resolved(given);
      if (output.function) reach(output, find(output.function.get()));
    }
    std::size_t kept = 0;
    for (const std::int32_t index : order_) {
      Visit& visit = visits_[index];
      if (!visit.reached) continue;
      visit.tape_index = static_cast<std::int32_t>(kept);
      order_[kept++] = index;
      const autograd::edge_list& edges = visit.fn->next_edges();
      for (std::size_t k = 0; k < edges.size(); ++k) reach(resolved(edges[k]), targets_[visit.first_target + k]);
    }
    order_.resize(kept);
  }

  const std::vector<autograd::Edge>& outputs_;
  const std::vector<autograd::Edge>& inputs_;
  const Rewritten rewritten_;
  // Of the inputs' nodes: what has a lower number leads to none of them.
  std::uint64_t least_ = std::numeric_limits<std::uint64_t>::max();
  common::PointerIndex index_;
  common::RecycledVector<Visit> visits_;
  common::RecycledVector<std::int32_t> order_, targets_;
  std::vector<std::int32_t> next_request_;
  std::vector<bool> input_reached_;
};

// Nodes of composed ops on the walk that can be rewritten: not those that PyTorch would show to hooks, nor inputs themselves.
Rewritten rewritten(Walk& walk) {
  Rewritten out;
  for (const std::int32_t index : walk.order()) {
    const Visit& visit = walk.visit(index);
    autograd::Node& fn = *visit.fn;
    const Reader& reader = *find_reader(fn);
    if (!visit.below || reader.erased_rewrite == nullptr || walk.requested(&fn)) continue;
    if (has_tensor_hooks(fn) || has_node_hooks(fn)) continue;
    Node node;
    node.fn = common::share(&fn);
    const at::AutoGradMode with_history(true);
    std::vector<at::Tensor> unused;
    SlotTable slots(unused);
    const at::Tensor result = reader.rewritten(Take(node, slots, /*one_row=*/false), fn);
    if (result.defined() && result.requires_grad()) out[&fn] = autograd::impl::gradient_edge(result);
  }
  return out;
}

autograd::Edge input_edge(const at::Tensor& input) {
  if (const NodePtr& fn = input.grad_fn()) return {fn, static_cast<std::uint32_t>(input.output_nr())};
  return {autograd::impl::try_get_grad_accumulator(input), 0};
}

// How many numbers follow, of what type they are, and one more fact, in a word.
std::size_t typed(std::size_t count, at::ScalarType dtype, bool flag) {
  return count << 9 | static_cast<std::size_t>(dtype) << 1 | static_cast<std::size_t>(flag);
}

void put_values(common::KeyPart& part, const auto& values) {
  part.put(values.size());
  for (const Value& value : values)
    part.put(static_cast<std::int64_t>(value.node) << 32 | static_cast<std::uint32_t>(value.output));
}

// What a signature holds of a node.
void sign(common::Key& key, const Node& node) {
  using common::length_in_key;
  std::size_t shapes = 0;
  for (const Meta& meta : node.outputs) shapes += length_in_key(meta.shape);
  common::KeyPart part(key, 2 + length_in_key(node.ints) + length_in_key(node.reals) + length_in_key(node.slots) +
                                length_in_key(node.inputs) + shapes);
  part.put(node.reader);
  part.put(node.ints);
  part.put(node.reals);
  part.put(node.slots);
  put_values(part, node.inputs);
  part.put(node.outputs.size());
  for (const Meta& meta : node.outputs) {
    part.put(typed(meta.shape.size(), meta.dtype, meta.complex));
    for (const std::int64_t extent : meta.shape) part.put(extent);
  }
  if (node.reader == &opaque_reader()) {  // which nodes without a row of their own share, so that their names tell them apart
    const std::string name = node.fn->name();
    common::KeyPart(key, length_in_key(name)).put(name);
  }
}

void sign(common::Key& key, const std::vector<Value>& values) {
  common::KeyPart part(key, common::length_in_key(values));
  put_values(part, values);
}

void sign(common::Key& key, const at::Tensor& slot) {
  const at::IntArrayRef sizes = slot.sizes(), strides = slot.strides();
  common::KeyPart part(key, 1 + sizes.size() + strides.size());
  part.put(typed(sizes.size(), slot.scalar_type(), slot.requires_grad()));
  for (const std::int64_t extent : sizes) part.put(extent);
  for (const std::int64_t stride : strides) part.put(stride);
}

}  // namespace

void check_tensor(const at::Tensor& tensor) {
  static const c10::DispatchKeySet kForeign({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                             c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Batched,
                                             c10::DispatchKey::Functionalize, c10::DispatchKey::Conjugate,
                                             c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
  if (tensor.key_set().has_any(kForeign)) throw Unsupported("a wrapped, lazily negated or subclass tensor");
  if (tensor.layout() != at::kStrided || tensor.is_nested()) throw Unsupported("a layout other than strided");
  if (tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) throw Unsupported("symbolic sizes");
  if (at::isComplexType(tensor.scalar_type())) throw Unsupported("complex numbers");
  if (at::isQIntType(tensor.scalar_type())) throw Unsupported("quantised numbers");
}

void Node::clear() {
  reader = nullptr;
  fn = nullptr;
  program = nullptr;
  ints.clear();
  reals.clear();
  slots.clear();
  inputs.clear();
}

Tape::Tape() : TapeContents(common::Spare<TapeContents>::take()) {}

Tape::~Tape() {
  constexpr std::size_t kKept = 256;  // nodes
  if (nodes.empty() || nodes.capacity() > kKept) return;
  device = at::kCPU;
  custom = false;
  rewritten.clear();
  for (Node& node : nodes) node.clear();
  slots.clear();
  outputs.clear();
  inputs.clear();
  signature.clear();
  common::Spare<TapeContents>::give(std::move(*this));
}

SlotTable::SlotTable(std::vector<at::Tensor>& slots) : slots_(slots), by_history_(at::GradMode::is_enabled()) {}

// Leaves have none but themselves: two of them are never the same.
SlotTable::History SlotTable::history_of(const at::Tensor& tensor) const {
  if (!by_history_ || !tensor.requires_grad()) return {};
  return {tensor.grad_fn().get(), static_cast<std::uint32_t>(tensor.output_nr()), true};
}

std::int32_t SlotTable::add(at::Tensor tensor) {
  check_tensor(tensor);
  const History history = history_of(tensor);
  const void* data = tensor.const_data_ptr();
  std::size_t hash = reinterpret_cast<std::uintptr_t>(data);
  const auto mix = [&hash](std::size_t word) { hash = (hash ^ word) * 0x9E3779B97F4A7C15ull; };
  mix(reinterpret_cast<std::uintptr_t>(history.fn));
  for (const std::int64_t extent : tensor.sizes()) mix(static_cast<std::size_t>(extent));
  for (const std::int64_t stride : tensor.strides()) mix(static_cast<std::size_t>(stride));
  std::int32_t& latest = by_hash_[reinterpret_cast<const void*>(hash)];
  for (std::int32_t known = latest; known >= 0; known = before_[known]) {
    const at::Tensor& other = slots_[known];
    if (other.is_same(tensor)) return known;
    if (other.const_data_ptr() != data || other.scalar_type() != tensor.scalar_type() || other.sizes() != tensor.sizes() ||
        other.strides() != tensor.strides() || !other.storage().is_alias_of(tensor.storage())) {
      continue;
    }
    const History before = history_of(other);
    if (before == history && (!history.any || history.fn != nullptr)) return known;
  }
  slots_.push_back(std::move(tensor));
  before_.push_back(latest);
  return latest = static_cast<std::int32_t>(before_.size()) - 1;
}

Slot Take::saved(const SavedVariable& saved, bool wanted) { return wanted ? derived(unpack(saved)) : Slot(); }

Slot Take::result(const SavedVariable& saved, bool wanted) { return wanted ? derived(unpack(saved, true)) : Slot(); }

Slot Take::derived(at::Tensor tensor) { return {tensor.defined() ? slots_.add(std::move(tensor)) : -1}; }

at::Tensor Take::flags(at::IntArrayRef shape) const {
  return at::ones(shape, at::TensorOptions().dtype(at::kBool).device(node_.fn->input_metadata(0).device()));
}

double Take::number(const at::Scalar& value) {
  if (value.isComplex()) throw Unsupported("complex numbers");
  if (value.isSymbolic()) throw Unsupported("symbolic sizes");
  return value.toDouble();
}

std::int64_t Take::concrete(const c10::SymInt& value) {
  if (value.is_heap_allocated()) throw Unsupported("symbolic sizes");
  return value.as_int_unchecked();
}

Integers Take::concrete(c10::ArrayRef<c10::SymInt> values) {
  Integers result;
  for (const c10::SymInt& value : values) result.push_back(concrete(value));
  return result;
}

namespace {

// The device of the graph's values, which has to be one.
class OneDevice {
 public:
  void see(const autograd::InputMetadata& metadata) {
    if (metadata.was_default_constructed()) return;
    if (!device_) device_ = metadata.device();
    if (*device_ != metadata.device()) throw Unsupported("tensors on several devices");
  }
  at::Device operator()(const std::vector<at::Tensor>& slots) const {
    const at::Device device = device_.value_or(at::kCPU);
    for (const at::Tensor& slot : slots) {
      if (slot.device() != device && !(slot.is_cpu() && slot.dim() == 0)) throw Unsupported("tensors on several devices");
    }
    return device;
  }

 private:
  std::optional<at::Device> device_;
};

std::vector<autograd::Edge> output_edges(at::TensorList outputs) {
  std::vector<autograd::Edge> edges;
  edges.reserve(outputs.size());
  for (const at::Tensor& output : outputs) {
    check_tensor(output);
    edges.push_back(output.requires_grad() ? autograd::impl::gradient_edge(output) : autograd::Edge());
  }
  return edges;
}

std::vector<autograd::Edge> input_edges(at::TensorList inputs) {
  std::vector<autograd::Edge> edges;
  edges.reserve(inputs.size());
  for (const at::Tensor& input : inputs) {
    check_tensor(input);
    edges.push_back(input.requires_grad() ? input_edge(input) : autograd::Edge());
  }
  return edges;
}

}  // namespace

std::optional<c10::Stream> foreign_stream(at::TensorList outputs, at::TensorList inputs) {
  if (outputs.empty() || outputs[0].is_cpu() || ambient_refusal() != nullptr) return std::nullopt;
  const std::vector<autograd::Edge> from = output_edges(outputs), to = input_edges(inputs);
  const Walk walk(from, to);
  const at::Device device = outputs[0].device();
  const c10::Stream caller = ops::current_stream(device);
  std::optional<c10::Stream> graph;
  std::optional<bool> captures;  // whether the caller's does; asked only where there is another stream
  for (const std::int32_t index : walk.order()) {
    const Visit& visit = walk.visit(index);
    if (!visit.below) continue;
    for (std::uint32_t o = 0; o < visit.fn->num_inputs(); ++o) {
      const autograd::InputMetadata& metadata = visit.fn->input_metadata(o);
      if (metadata.was_default_constructed() || metadata.device() != device) continue;
      const c10::Stream stream = metadata.stream();
      if (stream != caller) {
        if (!captures) captures = ops::is_capturing(caller);
        if (*captures != ops::is_capturing(stream)) {
          if (*captures) continue;
          throw Unsupported("a graph that another stream captures");
        }
      }
      if (graph && *graph != stream) throw Unsupported("a graph made on several streams");
      graph = stream;
    }
  }
  return graph == caller ? std::nullopt : graph;
}

Tape capture(at::TensorList outputs, at::TensorList inputs, bool one_row) {
  if (const char* reason = ambient_refusal()) throw Unsupported(reason);
  const std::vector<autograd::Edge> from = output_edges(outputs), to = input_edges(inputs);
  std::optional<Walk> first(std::in_place, from, to);
  const Rewritten composed = one_row ? Rewritten() : rewritten(*first);
  if (!composed.empty()) first.emplace(from, to, composed);
  Walk& walk = *first;

  Tape tape;
  for (const auto& [fn, graph] : composed) tape.rewritten.push_back(common::share(fn));
  tape.nodes.resize(walk.order().size());
  SlotTable slots(tape.slots);
  OneDevice device;
  for (std::size_t k = 0; k < tape.nodes.size(); ++k) {
    const Visit& visit = walk.visit(walk.order()[k]);
    Node& node = tape.nodes[k];
    node.fn = common::share(visit.fn);
    node.reader = touches_complex(*visit.fn) ? find_complex_reader(*visit.fn) : find_reader(*visit.fn);
    check_hooks(*visit.fn, visit.below);
    const bool custom = node.reader == &opaque_reader() && is_custom(*visit.fn);
    if (custom) {
      check_custom(*visit.fn);
      tape.custom = true;
    }
    node.outputs.resize(visit.fn->num_inputs());
    for (std::uint32_t o = 0; o < visit.fn->num_inputs(); ++o) {
      const autograd::InputMetadata& metadata = visit.fn->input_metadata(o);
      device.see(metadata);
      read_meta(metadata, node.outputs[o]);
    }
    node.inputs.resize(visit.fn->num_outputs());
    for (std::size_t i = 0; i < node.inputs.size(); ++i) node.inputs[i] = walk.value(visit, i);
    if (custom &&
        std::ranges::all_of(node.outputs, [](const Meta& y) { return std::ranges::find(y.shape, 0) != y.shape.end(); })) {
      throw Unsupported("a custom Function of tensors without elements");  // which the engine would not call
    }
    if (visit.below) {
      node.reader->check_hooks(*visit.fn);
      Take take(node, slots, one_row);
      node.reader->read(take, *visit.fn);
    }
    sign(tape.signature, node);
  }
  tape.device = device(tape.slots);
  common::KeyPart counts(tape.signature, 2);
  counts.put(tape.nodes.size());
  counts.put(tape.slots.size());
  for (const autograd::Edge& edge : from) tape.outputs.push_back(walk.value(edge));
  for (std::size_t i = 0; i < to.size(); ++i) {
    tape.inputs.push_back(walk.input_reached(i) ? walk.value(to[i]) : Value());
  }
  sign(tape.signature, tape.outputs);
  sign(tape.signature, tape.inputs);
  for (const at::Tensor& slot : tape.slots) sign(tape.signature, slot);
  return tape;
}

std::vector<bool> have_other_leaves(at::TensorList outputs, at::TensorList inputs, at::TensorList attached, std::uint64_t begun) {
  common::PointerIndex own, leading;
  for (const at::Tensor& input : inputs) own[input.unsafeGetTensorImpl()] = 0;
  for (const at::Tensor& input : attached) leading[input.grad_fn().get()] = 0;
  const auto is_own = [&](const at::Tensor& leaf) { return own[leaf.unsafeGetTensorImpl()] >= 0; };
  // A node, or what of a fused one is behind one of its outputs: another result of it may lead elsewhere.
  struct Place {
    autograd::Node* fn;
    std::uint32_t edge = 0;
    std::int32_t some = -1;    // which of `parts`: of the edges; else all
    std::int32_t behind = -1;  // the place that the edge leads to, while it is looked at
    bool leads = false;
  };
  common::RecycledVector<Place> places;
  common::RecycledVector<std::int32_t> stack;
  std::vector<std::vector<bool>> parts;
  common::PointerIndex index;
  const std::uint64_t thread = at::RecordFunction::currentThreadId();
  const auto enter = [&](autograd::Node* fn, std::uint32_t output) {
    constexpr int kAddressBits = 48;
    const auto* fused = typeid(*fn) == typeid(ops::FusedBackward) ? static_cast<const ops::FusedBackward*>(fn) : nullptr;
    const std::uintptr_t part = static_cast<std::uintptr_t>(fused != nullptr ? output + 1 : 0) << kAddressBits;
    std::int32_t& place = index[reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(fn) ^ part)];
    if (place >= 0) return place;
    place = static_cast<std::int32_t>(places.size());
    stack.push_back(place);
    places.push_back({.fn = fn});
    if (fused != nullptr) {
      places.back().some = static_cast<std::int32_t>(parts.size());
      parts.push_back(fused->onwards(output));
    }
    if (fn->num_outputs() == 0 && typeid(*fn) == typeid(autograd::AccumulateGrad)) {
      places.back().leads = !is_own(static_cast<autograd::AccumulateGrad*>(fn)->variable);
    } else {
      const bool older = fn->sequence_nr() < begun && fn->thread_id() == thread;
      places.back().leads = older || (!attached.empty() && leading[fn] >= 0);
    }
    return place;
  };
  const auto leads = [&](const at::Tensor& output) {
    const NodePtr& fn = output.grad_fn();
    if (!fn) return output.requires_grad() && !is_own(output);
    const std::int32_t root = enter(fn.get(), static_cast<std::uint32_t>(output.output_nr()));
    while (!stack.empty()) {
      const std::int32_t at = stack.back();
      Place& place = places[at];
      if (place.behind >= 0) place.leads = places[std::exchange(place.behind, -1)].leads;
      if (place.leads || place.edge == place.fn->num_outputs()) {
        stack.pop_back();
        continue;
      }
      const std::uint32_t k = place.edge++;
      const autograd::Edge& edge = place.fn->next_edge(k);
      if (!edge.function || (place.some >= 0 && !parts[place.some].empty() && !parts[place.some][k])) continue;
      const std::int32_t behind = enter(edge.function.get(), edge.input_nr);  // which may move the places
      places[at].behind = behind;
    }
    return places[root].leads;
  };
  std::vector<bool> out;
  for (const at::Tensor& output : outputs) out.push_back(leads(output));
  return out;
}

void release(Tape& tape) {
  for (Node& node : tape.nodes) {
    const bool ran = std::any_of(node.inputs.begin(), node.inputs.end(), [](const Value& value) { return value.node >= 0; });
    if (!ran) continue;
    node.fn->will_release_variables();
    node.fn->release_variables();
  }
  for (const NodePtr& fn : tape.rewritten) {
    fn->will_release_variables();
    fn->release_variables();
  }
}

}  // namespace wengert::tape
