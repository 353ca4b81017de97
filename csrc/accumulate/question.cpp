#include "accumulate/question.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "common/fork_safe_mutex.h"

namespace wengert::accumulate {

namespace {

namespace autograd = torch::autograd;

constexpr std::size_t kMostQuestions = 32;
constexpr std::size_t kMostBytes = 1 << 20;  // of a graph
constexpr std::size_t kNodeBytes = 512;
constexpr std::size_t kMostNodesBehind = 64;  // the tape

// What it lets go of may run destructors of the user's: never under the lock.
class Remembered {
 public:
  void put(std::int64_t number, std::shared_ptr<const Question> question) {
    std::shared_ptr<const Question> oldest;
    const std::lock_guard lock(mutex_);
    if (entries_.size() == kMostQuestions) {
      oldest = std::move(entries_.front().second);
      entries_.erase(entries_.begin());
      ++forgotten_;
    }
    entries_.emplace_back(number, std::move(question));
  }
  std::shared_ptr<const Question> find(std::int64_t number) {
    const std::lock_guard lock(mutex_);
    const Entry* entry = look_up(number);
    return entry == nullptr ? nullptr : entry->second;
  }
  void erase(std::int64_t number) {
    std::shared_ptr<const Question> question;
    const std::lock_guard lock(mutex_);
    const auto at = std::ranges::find(entries_, number, &Entry::first);
    if (at == entries_.end()) return;
    question = std::move(at->second);
    entries_.erase(at);
  }
  void clear() {
    std::vector<Entry> all;
    const std::lock_guard lock(mutex_);
    forgotten_ += entries_.size();
    all.swap(entries_);
  }
  bool knows(std::int64_t number) {
    const std::lock_guard lock(mutex_);
    std::vector<std::int64_t> numbers{number};
    for (std::size_t k = 0; k < numbers.size(); ++k) {
      const Entry* entry = look_up(numbers[k]);
      if (entry == nullptr) return false;
      for (const std::int64_t other : entry->second->behind) {
        if (std::ranges::find(numbers, other) == numbers.end()) numbers.push_back(other);
      }
    }
    return true;
  }
  std::uint64_t forgotten() const { return forgotten_; }

 private:
  using Entry = std::pair<std::int64_t, std::shared_ptr<const Question>>;

  const Entry* look_up(std::int64_t number) const {
    const auto at = std::ranges::find(entries_, number, &Entry::first);
    return at == entries_.end() ? nullptr : &*at;
  }

  common::ForkSafeMutex mutex_;
  std::vector<Entry> entries_;  // the latest last
  std::atomic<std::uint64_t> forgotten_ = 0;
};

Remembered& remembered() {
  static auto* instance = new Remembered;  // never destroyed: threads may outlive static destructors
  return *instance;
}
[[maybe_unused]] const Remembered& made_at_load = remembered();  // see common::ForkSafeMutex

std::size_t bytes_of(const at::Tensor& tensor) { return tensor.defined() ? tensor.nbytes() : 0; }

std::size_t bytes_of(const autograd::Node& fn) {
  if (const auto* leaf = dynamic_cast<const autograd::AccumulateGrad*>(&fn)) return kNodeBytes + bytes_of(leaf->variable);
  std::size_t bytes = kNodeBytes;
  for (std::uint32_t o = 0; o < fn.num_inputs(); ++o) {
    const autograd::InputMetadata& metadata = fn.input_metadata(o);
    if (metadata.was_default_constructed() || metadata.is_nested_tensor()) continue;
    std::size_t values = metadata.dtype().itemsize();
    for (const c10::SymInt& extent : metadata.shape_as_dim_vector())
      values *= static_cast<std::size_t>(extent.maybe_as_int().value_or(1));
    bytes += values;
  }
  return bytes;
}

}  // namespace

Edges edges_of(at::TensorList tensors) {
  Edges out;
  for (const at::Tensor& tensor : tensors) {
    out.push_back(tensor.defined() && tensor.requires_grad() ? autograd::impl::gradient_edge(tensor) : autograd::Edge());
  }
  return out;
}

Question::Cotangent Question::Cotangent::of(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {.given = true, .shape = tensor.sizes().vec(), .options = tensor.options(), .edge = edges_of({tensor})[0]};
}

at::Tensor Question::Cotangent::stand_in() const {
  const at::Tensor tensor = at::ones(shape, options);
  if (edge.is_valid()) autograd::impl::set_gradient_edge(tensor, edge);
  return tensor;
}

Provenance::Provenance(std::int64_t structure, std::shared_ptr<const Question> question, std::size_t bytes)
    : Origin(structure), number_([] {
        static std::atomic<std::int64_t> made = 0;
        return made++;
      }()) {
  if (bytes <= kMostBytes) remembered().put(number_, std::move(question));
}

Provenance::~Provenance() { remembered().erase(number_); }

bool Provenance::is_known() const { return remembered().knows(number_); }

std::shared_ptr<const Question> Provenance::question() const { return remembered().find(number_); }

std::size_t graph_bytes(const tape::Tape& tape, const Edges& ends) {
  std::size_t bytes = 0;
  std::unordered_set<const autograd::Node*> met;
  std::vector<const autograd::Node*> behind;
  const auto meet = [&](const autograd::Edge& edge) {
    if (edge.is_valid() && met.insert(edge.function.get()).second) behind.push_back(edge.function.get());
  };
  for (const at::Tensor& slot : tape.slots) bytes += bytes_of(slot);
  for (const tape::Node& node : tape.nodes) {
    bytes += bytes_of(*node.fn);
    if (bytes > kMostBytes) return bytes;
    met.insert(node.fn.get());
  }
  for (const tape::Node& node : tape.nodes) std::ranges::for_each(node.fn->next_edges(), meet);
  std::ranges::for_each(ends, meet);
  for (std::size_t k = 0; k < behind.size(); ++k) {
    bytes += bytes_of(*behind[k]);
    if (k == kMostNodesBehind || bytes > kMostBytes) return std::numeric_limits<std::size_t>::max();
    std::ranges::for_each(behind[k]->next_edges(), meet);
  }
  return bytes;
}

void forget_questions() { remembered().clear(); }
std::uint64_t forgotten_questions() { return remembered().forgotten(); }

}  // namespace wengert::accumulate
