// Keys of caches: words that say a structure completely.  Parts are typed and lists carry their length, so that no key is the
// beginning of another and different structures never have one key.
#pragma once
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace wengert::common {

using Key = std::vector<std::int64_t>;

inline std::size_t length_in_key(const auto& list) { return 1 + list.size(); }

// Appends so many words to a key, which the puts fill without a check each: neither more nor fewer.  A local variable, so that
// where it writes is kept in a register.
class KeyPart {
 public:
  KeyPart(Key& key, std::size_t count) {
    const std::size_t size = key.size();
    key.resize(size + count);
    next_ = key.data() + size;
  }

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
  std::int64_t* next_;
};

}  // namespace wengert::common
