#include <deque>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>

#include "common/fork_safe_mutex.h"
#include "tape/build.h"
#include "tape/reader.h"

namespace wengert::tape {

const Table& table() {
  static const Table& rows = *[] {  // never destroyed: threads may outlive static destructors
    auto* made = new Table;
    Table& table = *made;
    add_elementwise(table);
    add_activations(table);
    add_views(table);
    add_reductions(table);
    add_matmul(table);
    add_index(table);
    add_shape(table);
    add_local(table);
    add_normalization(table);
    add_losses(table);
    add_inplace(table);
    add_fused(table);
    add_attention(table);
    return made;
  }();
  return rows;
}

const Table& complex_table() {
  static const Table& rows = *[] {
    auto* made = new Table;
    add_complex(*made);
    return made;
  }();
  return rows;
}

const char* name(Op op) {
  constexpr const char* kNames[] = {"elementwise", "broadcast", "reduction", "view",     "index",   "product",
                                    "scatter",     "zero",      "local",     "composed", "program", "opaque"};
  return kNames[static_cast<int>(op)];
}

const Reader& opaque_reader() {
  static const auto* row = new Reader{"opaque"};
  return *row;
}

const Reader& accumulate_reader() {
  static const auto* row = new Reader{"torch::autograd::AccumulateGrad"};
  return *row;
}

Pullback describe(const Tape& tape, const Node& node, int output, int input, fused::ExprPool& pool) {
  const Site site{tape, node, output, input, pool};
  if (product(site.y()) == 0) return zero();
  if (!node.reader->describes()) return opaque();  // which may give nothing, also of an input without elements
  return product(site.x()) == 0 ? zero() : node.reader->describe(site);
}

namespace {

// Few distinct names exist; they live as long as the process, as a row's name does.
struct Names {
  common::ForkSafeMutex mutex;
  std::unordered_map<std::string, std::size_t> known;
  std::deque<std::string> names;
};

Names& names_of_nodes() {
  static auto* instance = new Names;  // never destroyed: threads may outlive static destructors
  return *instance;
}

// See common::ForkSafeMutex.
[[maybe_unused]] const auto made_at_load =
    std::tie(table(), complex_table(), opaque_reader(), accumulate_reader(), names_of_nodes());

}  // namespace

const char* name(const Node& node) {
  if (node.reader != &opaque_reader()) return node.reader->name;
  const std::string own = node.fn->name();  // which may take the GIL
  auto& [mutex, known, names] = names_of_nodes();
  const std::lock_guard lock(mutex);
  const auto [entry, fresh] = known.try_emplace(own, names.size());
  if (fresh) names.push_back(entry->first);
  return names[entry->second].c_str();
}

}  // namespace wengert::tape
