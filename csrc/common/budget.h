// Memory for what is kept between calls, in all WENGERT_PLAN_CACHE_MEGABYTES (256), which is read once.
#pragma once
#include <cstddef>
#include <cstdlib>

namespace wengert::common {

inline std::size_t budget() {
  static const std::size_t bytes = [] {
    double megabytes = 256;
    if (const char* given = std::getenv("WENGERT_PLAN_CACHE_MEGABYTES")) {
      char* end = nullptr;
      const double value = std::strtod(given, &end);
      if (end != given && value >= 0) megabytes = value;
    }
    return static_cast<std::size_t>(megabytes * (1 << 20));
  }();
  return bytes;
}

// Most of it is the plans'.
inline std::size_t plan_budget() { return budget() / 2; }
inline std::size_t program_budget() { return budget() / 4; }  // programs by their texts
inline std::size_t derived_budget() { return budget() / 4; }  // programs of derivatives of programs

}  // namespace wengert::common
