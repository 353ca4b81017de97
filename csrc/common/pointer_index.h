// A map from pointers to integers for short-lived use: open addressing, and memory that the next one of the thread takes over.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace wengert::common {

class PointerIndex {
 public:
  PointerIndex() {
    cells_.swap(spare());
    cells_.assign(kCells, Cell{nullptr, -1});
  }
  ~PointerIndex() {
    if (cells_.size() == kCells) cells_.swap(spare());
  }
  PointerIndex(const PointerIndex&) = delete;
  PointerIndex& operator=(const PointerIndex&) = delete;

  std::int32_t& operator[](const void* key) {  // -1 at first
    if (2 * (filled_ + 1) > cells_.size()) grow();
    Cell& cell = locate(key);
    filled_ += cell.key == nullptr;
    cell.key = key;
    return cell.value;
  }

 private:
  static constexpr std::size_t kCells = 256;
  struct Cell {
    const void* key;
    std::int32_t value;
  };
  static std::vector<Cell>& spare() {
    thread_local std::vector<Cell> cells;
    return cells;
  }
  Cell& locate(const void* key) {
    const std::size_t mask = cells_.size() - 1;
    std::size_t at = (reinterpret_cast<std::uintptr_t>(key) >> 4) * 0x9E3779B97F4A7C15ull >> 20 & mask;
    while (cells_[at].key != nullptr && cells_[at].key != key) at = (at + 1) & mask;
    return cells_[at];
  }
  void grow() {
    std::vector<Cell> old(2 * cells_.size(), Cell{nullptr, -1});
    old.swap(cells_);
    for (const Cell& cell : old) {
      if (cell.key != nullptr) locate(cell.key) = cell;
    }
  }

  std::vector<Cell> cells_;
  std::size_t filled_ = 0;
};

}  // namespace wengert::common
