// Keys of caches: words that say a structure completely.  Parts are typed and lists carry their length, so that no key is the
// beginning of another and different structures never have one key.
#pragma once
#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace wengert::common {

using Key = std::vector<std::int64_t>;

class KeyWriter {
 public:
  explicit KeyWriter(Key& words) : words_(words) {}

  // Room for so many words, which the puts that follow fill without a check each; fewer may not follow before the next room().
  void room(std::size_t count) {
    const std::size_t size = words_.size();
    words_.resize(size + count);
    next_ = words_.data() + size;
  }
  static std::size_t length(const auto& list) { return 1 + list.size(); }

  template <class T>
    requires(std::integral<T> || std::is_enum_v<T>)
  void put(T item) {
    *next_++ = static_cast<std::int64_t>(item);
  }
  void put(double item) { *next_++ = std::bit_cast<std::int64_t>(item); }
  void put(const void* item) { *next_++ = reinterpret_cast<std::intptr_t>(item); }
  template <class List>
    requires requires(const List& list) { list.size(), list.begin(); }
  void put(const List& list) {
    put(list.size());
    for (const auto& item : list) put(item);
  }

 private:
  Key& words_;
  std::int64_t* next_ = nullptr;
};

}  // namespace wengert::common
