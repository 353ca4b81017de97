// Why nodes of PyTorch have no row in the reader table: for the table in docs/nodes.md.
#pragma once
#include <span>
#include <string_view>
#include <vector>

namespace wengert::tape {

struct OpaqueReason {
  std::string_view why;
  std::vector<std::string_view> nodes;  // names, of which PyTorch's versions have some; a * stands for any letters
};

std::span<const OpaqueReason> opaque_reasons();

}  // namespace wengert::tape
