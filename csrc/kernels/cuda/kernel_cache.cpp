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
#include <fstream>
#include <iterator>

namespace wengert::kernels::cuda {
namespace {

namespace fs = std::filesystem;

constexpr char kMagic[8] = {'w', 'e', 'n', 'g', 'k', 'r', 'n', '1'};
constexpr const char* kSuffix = ".kernel";
constexpr std::uint64_t kDefaultMegabytes = 256;

struct Header {
  char magic[8];
  std::uint64_t key_bytes, payload_bytes, checksum;
};

// FNV-1a, 64 bits; two seeds make a file name of 128.
std::uint64_t hash(std::string_view text, std::uint64_t seed = 0xcbf29ce484222325u) {
  for (unsigned char c : text) seed = (seed ^ c) * 0x100000001b3u;
  return seed;
}

std::string hexadecimal(std::uint64_t value) {
  std::string digits(16, '0');
  for (int k = 15; k >= 0; --k, value >>= 4) digits[k] = "0123456789abcdef"[value & 15];
  return digits;
}

fs::path file_of(std::string_view key) {
  return fs::path(cache_folder()) / (hexadecimal(hash(key)) + hexadecimal(hash(key, 0x6c62272e07bb0142u)) + kSuffix);
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
    if (item->path().filename().string().find(kSuffix) == std::string::npos) continue;  // temporary ones of the dead count too
    std::error_code gone;                                                               // another process may be evicting too
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
    total -= entry.size;
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
  std::ifstream file(file_of(key), std::ios::binary);
  std::vector<char> content{std::istreambuf_iterator<char>(file), {}};
  Header header;
  if (content.size() < sizeof header) return std::nullopt;
  std::memcpy(&header, content.data(), sizeof header);
  const std::string_view rest(content.data() + sizeof header, content.size() - sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.key_bytes != key.size()) return std::nullopt;
  if (rest.size() < key.size() || rest.substr(0, key.size()) != key) return std::nullopt;
  const std::string_view payload = rest.substr(key.size());
  if (payload.size() != header.payload_bytes || hash(payload) != header.checksum) return std::nullopt;
  return std::vector<char>(payload.begin(), payload.end());
}

void write_cached(std::string_view key, const std::vector<char>& payload) {
  const fs::path folder = cache_folder();
  if (folder.empty() || !make_folder(folder)) return;
  const fs::path target = file_of(key);
  std::string temporary = target.string() + ".XXXXXX";
  const int file = mkstemp(temporary.data());  // readable and writable by the owner alone
  if (file < 0) return;
  Header header{.magic = {}, .key_bytes = key.size(), .payload_bytes = payload.size(), .checksum = 0};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.checksum = hash({payload.data(), payload.size()});
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
