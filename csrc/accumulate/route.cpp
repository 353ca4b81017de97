#include "accumulate/route.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <string>
#include <string_view>
#include <typeinfo>

#include "common/behind.h"
#include "common/fork_safe_mutex.h"
#include "common/lru.h"
#include "common/node_ptr.h"
#include "common/pointer_index.h"
#include "ops/fused_autograd.h"
#include "ops/tether.h"

namespace wengert::accumulate {

namespace {

namespace autograd = torch::autograd;

// Fitted to both ways through the benchmark's networks.
constexpr double kSecondsPerPass = 11e-6, kSecondsPerNode = 4e-6, kSecondsPerView = 1.8e-6, kBytesPerSecond = 5e9;
// An instruction of a nest, for an element: when it runs, and in the derivatives that follow.
constexpr double kSecondsPerInstruction = 0.45e-9;
constexpr double kWorthwhile = 1.05;  // what follows is the quicker for our nests

bool compares_ways() {
  static const bool compares = [] {
    const char* value = std::getenv("WENGERT_COMPARE_WAYS");
    return value == nullptr || std::string_view(value) != "0";
  }();
  return compares;
}

double elements_of(const autograd::InputMetadata& metadata) {
  if (metadata.was_default_constructed() || metadata.is_nested_tensor()) return 0;
  double elements = 1;
  for (const c10::SymInt& extent : metadata.shape_as_dim_vector()) {
    elements *= static_cast<double>(extent.maybe_as_int().value_or(1));
  }
  return elements;
}

double bytes_of(const autograd::Node& node) {
  double bytes = 0;
  for (std::uint32_t k = 0; k < node.num_inputs(); ++k) {
    const autograd::InputMetadata& metadata = node.input_metadata(k);
    if (const double elements = elements_of(metadata); elements != 0) {
      bytes += elements * static_cast<double>(metadata.dtype().itemsize());
    }
  }
  return bytes;
}

// Of nodes whose results share memory.
bool is_view(const autograd::Node& node) {
  constexpr std::string_view kViews[] = {"View",    "Select",    "Slice", "Expand",    "Permute",  "Transpose",    "TBackward",
                                         "Squeeze", "Unsqueeze", "Alias", "AsStrided", "Diagonal", "ReshapeAlias", "UnsafeView"};
  const std::string name = node.name();
  return name.find("BackwardBackward") == std::string::npos &&
         std::ranges::any_of(kViews, [&](std::string_view view) { return name.starts_with(view); });
}

// What the nest of a fused node does: elements times instructions.
double work_of(const ops::FusedBackward& node) {
  double elements = 1;
  for (std::uint32_t k = 0; k < node.num_inputs(); ++k) elements = std::max(elements, elements_of(node.input_metadata(k)));
  for (const autograd::Edge& edge : node.next_edges()) {
    if (!edge.is_valid() || edge.input_nr >= edge.function->num_inputs()) continue;
    elements = std::max(elements, elements_of(edge.function->input_metadata(edge.input_nr)));
  }
  return elements * static_cast<double>(node.program_->bytecode().instructions.size());
}

// Estimated seconds for a pass that gives the results, by the nodes that lead to them, but for those of the graph that was
// differentiated.
double seconds_of(const std::vector<at::Tensor>& results, common::PointerIndex& differentiated) {
  common::PointerIndex seen;
  std::vector<const autograd::Node*> stack;
  const auto enter = [&](const autograd::Node* node) {
    if (node == nullptr || differentiated[node] >= 0) return;
    std::int32_t& mark = seen[node];
    if (mark < 0) mark = 0, stack.push_back(node);
  };
  for (const at::Tensor& result : results) {
    if (result.defined()) enter(result.grad_fn().get());
  }
  double seconds = kSecondsPerPass;
  while (!stack.empty()) {
    const autograd::Node& node = *stack.back();
    stack.pop_back();
    if (is_view(node)) {
      seconds += kSecondsPerView;
    } else if (typeid(node) != typeid(ops::TetherBackward)) {
      seconds += kSecondsPerNode + bytes_of(node) / kBytesPerSecond;
      if (typeid(node) == typeid(ops::FusedBackward)) {
        seconds += kSecondsPerInstruction * work_of(static_cast<const ops::FusedBackward&>(node));
      }
    }
    for (const autograd::Edge& edge : node.next_edges()) enter(edge.function.get());
  }
  return seconds;
}

// Structures that are PyTorch's.
class Known {
 public:
  bool contains(std::uint64_t structure) {
    const std::lock_guard lock(mutex_);
    return structures_.find(structure) != nullptr;
  }
  void insert(std::uint64_t structure) {
    const std::lock_guard lock(mutex_);
    structures_.insert(structure, true, kBytesEach);
  }
  std::size_t bytes() {
    const std::lock_guard lock(mutex_);
    return structures_.bytes();
  }
  void clear() {
    const std::lock_guard lock(mutex_);
    structures_.clear();
  }

 private:
  static constexpr std::size_t kBytesEach = 128, kMostBytes = std::size_t{8} << 20;
  common::ForkSafeMutex mutex_;
  common::Lru<std::uint64_t, bool> structures_{kMostBytes};
};

Known& shorter_there() {
  static Known* known = new Known;  // never destroyed: threads may outlive static destructors
  return *known;
}
[[maybe_unused]] const Known& made_at_load = shorter_there();  // see common::ForkSafeMutex

}  // namespace

Route::Route(int kind, at::TensorList outputs, at::TensorList inputs) : kind_(kind) {
  const auto on_cpu = [](const at::Tensor& tensor) { return tensor.is_cpu(); };
  if (!compares_ways() || !std::ranges::all_of(outputs, on_cpu) || !std::ranges::all_of(inputs, on_cpu)) return;
  outputs_ = outputs;
  inputs_ = inputs;
}

namespace {

class Hash {
 public:
  void mix(std::uint64_t word) {
    value_ = (value_ ^ word) * 0x9E3779B97F4A7C15ull;
    value_ ^= value_ >> 29;
  }
  // By its power of two: what is the shorter way for one length of a sequence is that for the next one too.
  void mix_size(double elements) { mix(std::bit_width(static_cast<std::uint64_t>(elements))); }
  void mix(const autograd::Node& node) {
    mix(reinterpret_cast<std::uintptr_t>(&typeid(node)));  // its hash is one of its name, each time
    mix(node.num_outputs());
    if (node.num_inputs() != 0) mix_size(elements_of(node.input_metadata(0)));
  }
  std::uint64_t value() const { return value_ | 1; }

 private:
  std::uint64_t value_ = 1;
};

}  // namespace

std::uint64_t Route::glance() const {
  constexpr int kFirst = 16;
  if (outputs_.empty()) return 0;
  Hash hash;
  hash.mix(kind_);
  hash.mix(outputs_.size());
  hash.mix(inputs_.size());
  std::uint64_t behind = 0;  // what lies behind the inputs may grow with every step of a program
  for (const at::Tensor& input : inputs_) {
    behind = std::max(behind, common::topological_nr(input));
    hash.mix_size(static_cast<double>(input.numel()));
  }
  for (const at::Tensor& output : outputs_) {
    const autograd::Node* node = output.grad_fn().get();
    if (node != nullptr) hash.mix(common::topological_nr(*node) - behind);
    for (int k = 0; node != nullptr && k < kFirst; ++k) {
      hash.mix(*node);
      const autograd::edge_list& edges = node->next_edges();
      const auto next = std::ranges::find_if(edges, &autograd::Edge::is_valid);
      node = next == edges.end() ? nullptr : next->function.get();
    }
  }
  return hash.value();
}

std::uint64_t Route::walk() const {
  if (outputs_.empty()) return 0;
  Hash hash;
  hash.mix(kind_);
  hash.mix(outputs_.size());
  common::PointerIndex places;  // which nodes the inputs are
  for (const at::Tensor& input : inputs_) {
    if (input.requires_grad())
      places[autograd::impl::gradient_edge(input).function.get()] = static_cast<std::int32_t>(&input - inputs_.data());
  }
  const bool theirs = common::visit_behind(outputs_, inputs_, [&](const autograd::Node& node) {
    hash.mix(node);
    const std::int32_t place = places[&node];
    hash.mix(place);
    return place >= 0 || typeid(node) != typeid(ops::TetherBackward);
  });
  return theirs ? hash.value() : 0;
}

bool Route::is_shorter_there() const {
  const std::uint64_t known = ops::any_tethers() ? walk() : glance();
  return known != 0 && shorter_there().contains(known);
}

void Route::remember() const {
  shorter_there().insert(glance());
  shorter_there().insert(walk());
}

void Route::choose(const std::vector<at::Tensor>& ours, const std::vector<Row>& theirs) const {
  if (walk() == 0) return;
  common::PointerIndex differentiated;
  common::visit_behind(outputs_, {}, [&](const autograd::Node& node) {
    differentiated[&node] = 0;
    return true;
  });
  double seconds = 0;
  for (const Row& row : theirs) seconds += row.times * seconds_of(row.tensors, differentiated);
  if (theirs.empty() || seconds_of(ours, differentiated) <= kWorthwhile * seconds) return;
  remember();
  throw ShorterThere();
}

std::size_t route_bytes() { return shorter_there().bytes(); }
void forget_routes() { shorter_there().clear(); }

}  // namespace wengert::accumulate
