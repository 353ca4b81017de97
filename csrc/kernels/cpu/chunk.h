// How LoopNest runs a chunk; included by loop_nest.cpp and chunk.cpp only.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels/cpu/loop_nest.h"
#include "kernels/cpu/walk.h"

namespace wengert::kernels {

inline constexpr std::int64_t kShortRow = 256;  // rows shorter than this share a tile
inline constexpr int kCacheLine = 64;
inline constexpr std::size_t kTileBytes = 2048, kLargestTile = 4096;
// Loads and stores whose addresses agree in the last 12 bits wait for each other, and outputs often begin on a page: tiles do
// not.
inline constexpr std::size_t kTileStart = 2048, kTileGap = 128;
inline constexpr std::size_t kCacheBytes = 32 * 1024;  // tiles of all registers together, to stay in the L1 cache

// Buffers of one thread.
struct LoopNest::Scratch {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory;
  std::size_t bytes = 0;
  std::vector<Walk> walks;
  std::vector<const char*> registers;
  std::vector<char> varying;
  std::vector<char> aimed;  // per output: its register is where it is to be stored, see aim()
  std::vector<unsigned> masks;
  std::vector<std::int64_t> offsets;
  struct Stretch {
    const char* data;
    std::int64_t lines;
  };
  std::vector<Stretch> ahead;  // what the next tile will touch
  struct Source {              // what the tile of an operand holds: rows * count elements, each row the same
    const char* data;
    std::int64_t rows, count;
    bool operator==(const Source&) const = default;
  };
  static constexpr Source kNothing{nullptr, 0, 0};
  std::vector<Source> sources;
  std::vector<double> sums;

  char* reserve(std::size_t size) {
    if (size > bytes) {
      bytes = (size + 4095) / 4096 * 4096;
      memory.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
    }
    return memory.get();
  }
};

// Everything about a chunk that does not change from tile to tile.
struct LoopNest::Chunk {
  const LoopNest& nest;
  Scratch& scratch;
  std::int64_t index;          // of the chunk
  std::int64_t first, length;  // its part of the chunked loop
  std::int64_t lengths[kMaxLoops];
  std::size_t tile_bytes;
  int tile, lanes, element;  // elements of a tile and of a vector, bytes of an element
  char* memory;
  bool rows;    // tiles are pieces of rows (long inner loop)
  bool direct;  // no instructions, and every operand is read in place: tiles may be of any size

  double* sums_of(const Output& output) const {
    if (output.partials) return nest.partials_.data() + index * nest.partial_sums_ + output.offset;
    return scratch.sums.data() + output.offset;
  }
  char* tile_at(std::size_t which) const { return memory + kTileStart + which * (tile_bytes + kTileGap); }
  char* base_of(const View& view) const { return view.data + first * view.strides[nest.chunked_] * view.bytes; }

  void setup(bool fresh);
  void fill_tail(char* tile_data, int n) const;
  void execute(int n) const;
  template <class Before>
  void instructions(int n, Before before) const;
  bool is_constant(fused::Register r) const {
    const fused::Bytecode& code = nest.program_->bytecode();
    return r >= code.loads.size() && r < code.loads.size() + code.constants.size();
  }
  void load(std::size_t i, const char* source, std::int64_t stride, int n) const;
  void look_ahead(const char* data, std::int64_t step) const;
  void spread(fused::Register r, int n) const;
  const char* output_tile(std::size_t i, int n) const;
  void aim(std::size_t i, char* target, std::int64_t stride, int n) const;
  void reset_registers() const;
  void run_rows();
  void run_packed();
};

}  // namespace wengert::kernels
