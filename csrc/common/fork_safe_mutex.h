// A mutex of the whole process that a fork finds free, for caches: the child of a fork has only the thread that forked, and a
// mutex that another one held would stay locked in it for ever.
#pragma once
#include <pthread.h>

#include <mutex>
#include <thread>
#include <vector>

namespace wengert::common {

// Never destroyed, and made while the library is loaded: a thread that makes one at its first use waits for a fork that goes on,
// within the guard of the static object it belongs to, which the child then finds held.
class ForkSafeMutex : public std::mutex {
 public:
  ForkSafeMutex() {
    const std::lock_guard lock(all().mutex);
    all().members.push_back(this);
  }
  ForkSafeMutex(const ForkSafeMutex&) = delete;
  ForkSafeMutex& operator=(const ForkSafeMutex&) = delete;

 private:
  struct All {
    std::mutex mutex;
    std::vector<std::mutex*> members;
  };

  static All& all() {
    static All* instance = [] {
      ::pthread_atfork(take, give, give);
      return new All;
    }();
    return *instance;
  }

  // Some may be held one inside another, in an order that is not known here: so none is waited for while others are held.
  static void take() {
    all().mutex.lock();
    const std::vector<std::mutex*>& members = all().members;
    for (;;) {
      std::size_t held = 0;
      while (held < members.size() && members[held]->try_lock()) ++held;
      if (held == members.size()) return;
      while (held > 0) members[--held]->unlock();
      std::this_thread::yield();
    }
  }

  static void give() {
    for (std::mutex* member : all().members) member->unlock();
    all().mutex.unlock();
  }
};

}  // namespace wengert::common
