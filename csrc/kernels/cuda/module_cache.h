// Kernels that are loaded on devices, within a budget of bytes.
//
// NOTE [Unloading kernels]
// A kernel may be unloaded when every launch of it has ended, and nobody may wait for that: whoever launches might be capturing a
// graph.  So each module knows the streams it was launched on, and one that has to go is first retired: an event is recorded
// behind what those streams have queued, and at some later load, when all have passed, it is unloaded.  It stays
//   while somebody holds it, to launch it: the launch may not have been queued yet;
//   while one of its streams is being captured: no event can be recorded there;
//   for good, if a graph captured a launch, which can be replayed at any time, or if it ran on a stream that is not PyTorch's,
//   which may have been destroyed since.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace wengert::kernels::cuda {

// Where a kernel is about to be launched.
struct LaunchSite {
  int device = 0;
  void* stream = nullptr;
  bool forever = false;  // captured by a graph, or a stream that may not live as long as the process

  bool operator==(const LaunchSite&) const = default;
};

struct Module {
  void* library = nullptr;
  void* kernel = nullptr;
};

// What is asked of the CUDA runtime; tests have another one.
struct ModuleDriver {
  std::function<int(const std::vector<char>& image, const std::string& entry, Module&)> load;  // 0 is success
  std::function<void(Module&)> unload;
  std::function<void*(const LaunchSite&)> record;  // an event behind all that was queued there; null: not now
  std::function<bool(void* event)> passed;         // the event is gone then
};

class ModuleCache {
 public:
  ModuleCache(ModuleDriver driver, std::size_t most_bytes) : driver_(std::move(driver)), most_bytes_(most_bytes) {}

  // Null where it is not loaded.  To be held until the launch has been queued.
  std::shared_ptr<const Module> find(std::uint64_t key, const LaunchSite& site);
  // Loads the image, unless another thread was faster.
  int load(std::uint64_t key, const std::vector<char>& image, const std::string& entry, const LaunchSite& site,
           std::shared_ptr<const Module>& module);
  // Retires all that can be, and unloads what has ended.
  void clear();

  std::size_t bytes() const;  // retired ones that are still loaded included

 private:
  struct Entry {
    std::uint64_t key;
    std::shared_ptr<Module> module;
    std::size_t bytes;
    std::vector<LaunchSite> sites;
    bool forever = false;

    void use(const LaunchSite& site);
  };
  using Entries = std::list<Entry>;
  struct Retired {
    std::shared_ptr<Module> module;
    std::size_t bytes;
    std::vector<void*> events;
  };

  std::shared_ptr<const Module> known(std::uint64_t key, const LaunchSite& site);
  void shrink(std::size_t most_bytes);
  bool retire(const Entry& entry);
  void unload_ended();

  const ModuleDriver driver_;
  const std::size_t most_bytes_;
  mutable std::mutex mutex_;
  Entries entries_;  // the last used first
  std::unordered_map<std::uint64_t, Entries::iterator> index_;
  std::vector<Retired> retired_;
  std::size_t bytes_ = 0, retired_bytes_ = 0;
};

}  // namespace wengert::kernels::cuda
