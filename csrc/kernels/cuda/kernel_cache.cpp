#include "kernels/cuda/kernel_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "common/sha256.h"

namespace wengert::kernels::cuda {
namespace {

namespace fs = std::filesystem;

constexpr char kMagic[8] = {'w', 'e', 'n', 'g', 'k', 'r', 'n', '2'};
constexpr std::string_view kSuffix = ".kernel", kUnfinished = ".XXXXXX";
constexpr std::size_t kNameDigits = 32;
constexpr std::uint64_t kDefaultMegabytes = 256;

struct Header {
  char magic[8];
  std::uint64_t key_bytes, payload_bytes;
  common::Digest checksum;  // of the payload
};

fs::path file_of(std::string_view key) {
  std::string name = common::hexadecimal(common::Sha256::of(key)).substr(0, kNameDigits);
  return fs::path(cache_folder()) / name.append(kSuffix);
}

// Whether this cache gave the file its name; it leaves all others alone.
bool is_ours(std::string_view name) {
  const auto lower_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  const auto letter_or_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  if (name.size() < kNameDigits || !std::ranges::all_of(name.substr(0, kNameDigits), lower_digit)) return false;
  name.remove_prefix(kNameDigits);
  if (!name.starts_with(kSuffix)) return false;
  name.remove_prefix(kSuffix.size());
  return name.empty() ||
         (name.size() == kUnfinished.size() && name.front() == '.' && std::ranges::all_of(name.substr(1), letter_or_digit));
}

std::uint64_t most_bytes() {
  std::uint64_t megabytes = kDefaultMegabytes;
  if (const char* given = std::getenv("WENGERT_CACHE_MEGABYTES")) {
    std::from_chars(given, given + std::strlen(given), megabytes);  // what is no number changes nothing
  }
  return megabytes << 20;
}

// The folder, if it is a directory of this user's that nobody else may write to.
bool is_private(const fs::path& folder) {
  struct stat status;
  return stat(folder.c_str(), &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == geteuid() &&
         (status.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

bool make_folder(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder.parent_path(), error);
  mkdir(folder.c_str(), S_IRWXU);
  return is_private(folder);
}

bool write_all(int file, const void* data, std::size_t size) {
  const char* next = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = write(file, next, size);
    if (written <= 0) return false;
    next += written;
    size -= static_cast<std::size_t>(written);
  }
  return true;
}

// The whole of a regular file.
std::optional<std::vector<char>> read_all(const fs::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return std::nullopt;
  struct stat status;
  std::optional<std::vector<char>> content;
  if (fstat(file, &status) == 0 && S_ISREG(status.st_mode)) {
    content.emplace(static_cast<std::size_t>(status.st_size));
    std::size_t count = 0;
    while (count < content->size()) {
      const ssize_t got = read(file, content->data() + count, content->size() - count);
      if (got <= 0) break;
      count += static_cast<std::size_t>(got);
    }
    if (count < content->size()) content.reset();
  }
  close(file);
  return content;
}

void evict(const fs::path& folder) {
  struct Entry {
    fs::file_time_type time;
    std::uint64_t size;
    fs::path path;
  };
  std::vector<Entry> entries;
  std::uint64_t total = 0;
  std::error_code error;
  for (fs::directory_iterator item(folder, error), end; !error && item != end; item.increment(error)) {
    if (!is_ours(item->path().filename().native())) continue;
    std::error_code gone;  // another process may be evicting too
    if (!item->is_regular_file(gone)) continue;
    Entry entry{item->last_write_time(gone), item->file_size(gone), item->path()};
    if (gone) continue;
    total += entry.size;
    entries.push_back(std::move(entry));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.time < b.time; });
  for (const Entry& entry : entries) {
    if (total <= most_bytes()) return;
    std::error_code gone;
    fs::remove(entry.path, gone);
    if (!gone) total -= entry.size;
  }
}

}  // namespace

std::string cache_folder() {
  auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value ? value : "");
  };
  if (std::string folder = variable("WENGERT_CACHE_DIR"); !folder.empty()) return folder;
  if (std::string base = variable("XDG_CACHE_HOME"); !base.empty()) return base + "/wengert/kernels";
  if (std::string home = variable("HOME"); !home.empty()) return home + "/.cache/wengert/kernels";
  return {};
}

std::optional<std::vector<char>> read_cached(std::string_view key) {
  const std::string folder = cache_folder();
  if (folder.empty() || !is_private(folder)) return std::nullopt;
  const std::optional<std::vector<char>> content = read_all(file_of(key));
  Header header;
  if (!content || content->size() < sizeof header) return std::nullopt;
  std::memcpy(&header, content->data(), sizeof header);
  const std::string_view rest(content->data() + sizeof header, content->size() - sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.key_bytes != key.size()) return std::nullopt;
  if (rest.size() < key.size() || rest.substr(0, key.size()) != key) return std::nullopt;
  const std::string_view payload = rest.substr(key.size());
  if (payload.size() != header.payload_bytes || common::Sha256::of(payload) != header.checksum) return std::nullopt;
  return std::vector<char>(payload.begin(), payload.end());
}

void write_cached(std::string_view key, const std::vector<char>& payload) {
  const fs::path folder = cache_folder();
  if (folder.empty() || !make_folder(folder)) return;
  const fs::path target = file_of(key);
  std::string temporary = target.string().append(kUnfinished);
  const int file = mkstemp(temporary.data());  // readable and writable by the owner alone
  if (file < 0) return;
  Header header{.magic = {},
                .key_bytes = key.size(),
                .payload_bytes = payload.size(),
                .checksum = common::Sha256::of({payload.data(), payload.size()})};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  bool whole = write_all(file, &header, sizeof header) && write_all(file, key.data(), key.size()) &&
               write_all(file, payload.data(), payload.size());
  whole = close(file) == 0 && whole;
  if (!whole || std::rename(temporary.c_str(), target.c_str()) != 0) {
    unlink(temporary.c_str());
    return;
  }
  evict(folder);
}

}  // namespace wengert::kernels::cuda
