// Containers for short-lived use whose memory the thread keeps for the next one of their kind: in a loop of small calls neither
// they nor the allocator's housekeeping cost anything.
#pragma once
#include <cstddef>
#include <utility>
#include <vector>

namespace wengert::common {

// Memory of the thread for objects of type T, which are usable but hold nothing of value.
template <class T>
class Spare {
 public:
  static T take() {
    std::vector<T>& kept = list();
    if (kept.empty()) return T();
    T out = std::move(kept.back());
    kept.pop_back();
    return out;
  }
  static void give(T&& object) {
    if (list().size() < kMost) list().push_back(std::move(object));
  }

 private:
  static constexpr std::size_t kMost = 4;  // in use at the same time, usually
  static std::vector<T>& list() {
    thread_local std::vector<T> objects;
    return objects;
  }
};

// A vector, empty at first.  A very long one is not kept.
template <class T>
class RecycledVector : public std::vector<T> {
 public:
  RecycledVector() : std::vector<T>(Spare<std::vector<T>>::take()) { this->clear(); }
  ~RecycledVector() {
    constexpr std::size_t kKept = 64 * 1024;  // bytes
    if (this->capacity() > 0 && this->capacity() * sizeof(T) <= kKept) {
      this->clear();
      Spare<std::vector<T>>::give(std::move(*this));
    }
  }
  RecycledVector(const RecycledVector&) = delete;
  RecycledVector& operator=(const RecycledVector&) = delete;
};

}  // namespace wengert::common
