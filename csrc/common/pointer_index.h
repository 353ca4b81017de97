// A map from pointers to integers for short-lived use, by open addressing.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "common/recycled.h"

namespace wengert::common {

class PointerIndex {
 public:
  PointerIndex() : table_(Spare<Table>::take()) {
    if (table_.cells.empty()) table_.cells.resize(kCells);
    if (++table_.now == 0) {  // the count has gone round: old cells might look new
      table_.cells.assign(kCells, Cell{});
      table_.now = 1;
    }
  }
  ~PointerIndex() {
    if (table_.cells.size() == kCells) Spare<Table>::give(std::move(table_));
  }
  PointerIndex(const PointerIndex&) = delete;
  PointerIndex& operator=(const PointerIndex&) = delete;

  std::int32_t& operator[](const void* key) {  // -1 at first
    if (2 * (filled_ + 1) > table_.cells.size()) grow();
    Cell& cell = locate(key);
    if (cell.used != table_.now) {
      cell = {key, -1, table_.now};
      ++filled_;
    }
    return cell.value;
  }

 private:
  static constexpr std::size_t kCells = 256;
  struct Cell {
    const void* key = nullptr;
    std::int32_t value = -1;
    std::uint32_t used = 0;  // by which index; all others see an empty cell
  };
  struct Table {
    std::vector<Cell> cells;
    std::uint32_t now = 0;
  };
  Cell& locate(const void* key) {
    const std::size_t mask = table_.cells.size() - 1;
    std::size_t at = (reinterpret_cast<std::uintptr_t>(key) >> 4) * 0x9E3779B97F4A7C15ull >> 20 & mask;
    while (table_.cells[at].used == table_.now && table_.cells[at].key != key) at = (at + 1) & mask;
    return table_.cells[at];
  }
  void grow() {
    std::vector<Cell> old(2 * table_.cells.size());
    old.swap(table_.cells);
    for (const Cell& cell : old) {
      if (cell.used == table_.now) locate(cell.key) = cell;
    }
  }

  Table table_;
  std::size_t filled_ = 0;
};

}  // namespace wengert::common
