// CUDA C++ source of a program's kernel: a description of the nest for the frame in fused/nest_kernel.h.  Formulas come from the
// one table in fused/primitive_ops.h, which is embedded in the library as text and handed to the compiler.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "fused/program.h"

namespace wengert::fused {

// Everything the text depends on beside the program.  Extents, strides and pointers are parameters of the kernel.
struct KernelShape {
  enum class Variant : std::uint8_t {
    map,         // no output is summed
    sum_rows,    // the first outputs are summed, all over the same loops, the innermost one among them
    sum_columns  // the same, and the innermost loop is kept
  };
  struct Load {
    Dtype dtype;
    bool moves;              // along the innermost loop; matters where width > 1
    bool immediate = false;  // the parameter holds the element itself instead of its address

    std::uint8_t kind() const { return static_cast<std::uint8_t>(static_cast<int>(dtype) << 2 | moves << 1 | immediate); }
  };
  struct Store {
    Dtype dtype;
    bool accumulate;
  };

  Variant variant = Variant::map;
  bool wide_index = false;  // 64-bit indices
  bool tail = false;        // the last group of `width` elements may be incomplete
  int rank = 1;             // loops that are kept, at least 1
  int reduced_rank = 1;     // loops that are summed over, at least 1; sums only
  int width = 1;            // neighbouring elements a thread takes together
  int unroll = 1;           // such groups a thread takes at once
  int sums = 0;             // outputs that are summed
  bool streamed = false;    // operands are read right before their first use
  bool in_memory = false;   // operands' addresses and strides lie in memory; streamed only
  std::vector<Load> loads;  // one per load of the bytecode
  std::vector<Store> stores;
};

inline constexpr const char* kMapEntry = "wengert_map";
inline constexpr const char* kSumEntry = "wengert_sum";
inline constexpr const char* kTableEntry = "wengert_table";

std::string cuda_source(const Program& program, const KernelShape& shape);
std::string table_source();  // of the kernel that writes a TablePiece

// The headers that generated source includes, by the names it includes them under.
struct EmbeddedHeader {
  const char* name;
  const char* text;
};
std::span<const EmbeddedHeader> device_headers();

}  // namespace wengert::fused
