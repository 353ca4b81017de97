// Values by key within a budget of bytes: the least recently used go first.  The caller has the lock.
#pragma once
#include <cstddef>
#include <functional>
#include <list>
#include <unordered_map>
#include <utility>

namespace wengert::common {

template <class Key, class Value, class Hash = std::hash<Key>>
class Lru {
 public:
  explicit Lru(std::size_t most_bytes) : most_bytes_(most_bytes) {}

  // Null where there is none; valid until the next insertion.
  Value* find(const Key& key) {
    const auto at = index_.find(key);
    if (at == index_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, at->second);
    return &at->second->value;
  }

  // The value that is kept: another that was there already stays.  `bytes` is what both take together.
  Value& insert(Key key, Value value, std::size_t bytes) {
    const auto [at, fresh] = index_.try_emplace(std::move(key));
    if (!fresh) return at->second->value;
    entries_.push_front({std::move(value), bytes, &at->first});
    at->second = entries_.begin();
    bytes_ += bytes;
    while (bytes_ > most_bytes_ && entries_.size() > 1) {
      bytes_ -= entries_.back().bytes;
      index_.erase(*entries_.back().key);
      entries_.pop_back();
    }
    return entries_.front().value;
  }

  void erase(const Key& key) {
    const auto at = index_.find(key);
    if (at == index_.end()) return;
    bytes_ -= at->second->bytes;
    entries_.erase(at->second);
    index_.erase(at);
  }

  void clear() {
    index_.clear();
    entries_.clear();
    bytes_ = 0;
  }

  std::size_t bytes() const { return bytes_; }
  std::size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    Value value;
    std::size_t bytes;
    const Key* key;  // in the index, where it does not move
  };

  std::size_t most_bytes_, bytes_ = 0;
  std::list<Entry> entries_;
  std::unordered_map<Key, typename std::list<Entry>::iterator, Hash> index_;
};

}  // namespace wengert::common
