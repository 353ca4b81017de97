#include "kernels/cuda/module_cache.h"

#include <algorithm>
#include <utility>

namespace wengert::kernels::cuda {

void ModuleCache::Entry::use(const LaunchSite& site) {
  forever = forever || site.forever;
  if (!forever && std::ranges::find(sites, site) == sites.end()) sites.push_back(site);
}

std::shared_ptr<const Module> ModuleCache::known(std::uint64_t key, const LaunchSite& site) {
  const auto found = index_.find(key);
  if (found == index_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, found->second);
  found->second->use(site);
  return found->second->module;
}

std::shared_ptr<const Module> ModuleCache::find(std::uint64_t key, const LaunchSite& site) {
  std::lock_guard lock(mutex_);
  return known(key, site);
}

int ModuleCache::load(std::uint64_t key, const std::vector<char>& image, const std::string& entry, const LaunchSite& site,
                      std::shared_ptr<const Module>& module) {
  std::lock_guard lock(mutex_);
  module = known(key, site);
  if (module) return 0;
  auto loaded = std::make_shared<Module>();
  if (const int status = driver_.load(image, entry, *loaded); status != 0) return status;
  entries_.push_front({.key = key, .module = loaded, .bytes = image.size(), .sites = {}});
  entries_.front().use(site);
  index_.emplace(key, entries_.begin());
  bytes_ += image.size();
  module = std::move(loaded);
  unload_ended();
  shrink(most_bytes_);
  return 0;
}

void ModuleCache::clear() {
  std::lock_guard lock(mutex_);
  shrink(0);
  unload_ended();
}

std::size_t ModuleCache::bytes() const {
  std::lock_guard lock(mutex_);
  return bytes_ + retired_bytes_;
}

void ModuleCache::shrink(std::size_t most_bytes) {
  for (auto at = entries_.end(); at != entries_.begin() && bytes_ > most_bytes;) {
    --at;
    if (at->forever || at->module.use_count() > 1 || !retire(*at)) continue;
    bytes_ -= at->bytes;
    index_.erase(at->key);
    at = entries_.erase(at);
  }
}

bool ModuleCache::retire(const Entry& entry) {
  Retired retired{.module = entry.module, .bytes = entry.bytes, .events = {}};
  bool all = true;
  for (const LaunchSite& site : entry.sites) {
    void* event = driver_.record(site);
    if (event == nullptr) {
      all = false;
      break;
    }
    retired.events.push_back(event);
  }
  if (!all) {  // events that were recorded are of no use
    retired.module = nullptr;
    retired.bytes = 0;
    if (retired.events.empty()) return false;
  }
  retired_bytes_ += retired.bytes;
  retired_.push_back(std::move(retired));
  return all;
}

void ModuleCache::unload_ended() {
  std::erase_if(retired_, [&](Retired& retired) {
    std::erase_if(retired.events, [&](void* event) { return driver_.passed(event); });
    if (!retired.events.empty()) return false;
    if (retired.module) driver_.unload(*retired.module);
    retired_bytes_ -= retired.bytes;
    return true;
  });
}

}  // namespace wengert::kernels::cuda
