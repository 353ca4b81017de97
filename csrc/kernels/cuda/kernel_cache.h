// Compiled kernels on disk, one file each.
//
// NOTE [Files of the cache]
// A file holds a magic word, the full key, the length and a checksum before the payload; whatever does not match is taken for
// absent and written anew.  Files are written under a temporary name and renamed, so readers and other processes see whole files
// only.  The folder is private, because what is read from it is run.  Nothing here throws: without a folder that can be written
// to there is simply no cache.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace wengert::kernels::cuda {

// WENGERT_CACHE_DIR, else XDG_CACHE_HOME or ~/.cache with wengert/kernels below it; empty: no folder is known.
std::string cache_folder();

std::optional<std::vector<char>> read_cached(std::string_view key);
// Removes the oldest files beyond WENGERT_CACHE_MEGABYTES (256).
void write_cached(std::string_view key, const std::vector<char>& payload);

}  // namespace wengert::kernels::cuda
