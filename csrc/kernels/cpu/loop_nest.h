// Evaluates a program over a strided loop nest in CPU memory.
//
// NOTE [Chunks]
// One loop of the nest (the chunked loop) is cut into chunks that may run on any thread in any order.  Their number depends on
// the extents only.  A reduced output is summed in double, in a buffer of its chunk's own; where the chunked loop itself is
// summed over, the chunks' buffers are kept and added in chunk order at the end.  So results have the same bits for any number of
// threads.
//
// NOTE [Tiles]
// A chunk is run tile by tile, every instruction over a whole tile, so that dispatch is paid once per ~512 elements.  Where the
// inner loop is long a tile is a piece of one row: operands of unit stride are read in place, operands that do not move along the
// row are one vector.  Where rows are short a tile takes several rows, and operands are gathered into it.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "fused/program.h"
#include "kernels/cpu/backend.h"
#include "kernels/loops.h"

namespace wengert::kernels {

struct NestOutput : LoopOutput {
  bool partials;                              // the chunked loop is summed over and there are several chunks
  std::int64_t sum_strides[fused::kMaxRank];  // of the chunk's buffer of sums; 0 on reduced loops
  std::int64_t sums;                          // elements of that buffer
  std::int64_t offset;                        // of that buffer in a thread's (or, for partials, in a chunk's) buffers
};

class LoopNest : Loops<NestOutput> {
 public:
  // Analyses one evaluation.  The object may be prepared again and again; it keeps its buffers.
  void prepare(const fused::Program& program, std::span<const std::int64_t> extents, std::span<const OperandView> operands,
               std::span<const OutputView> outputs);
  std::int64_t chunks() const { return chunks_; }
  std::int64_t elements() const { return elements_; }                 // iterations of the whole nest
  void run(std::int64_t first_chunk, std::int64_t last_chunk) const;  // any thread; disjoint ranges may run at the same time
  void finish();                                                      // after all chunks

 private:
  using View = LoopView;
  using Output = NestOutput;
  struct Chunk;
  struct Scratch;

  void lengthen_rows();
  bool sums_dense() const;
  bool transposes() const;
  void choose_chunks();
  void fill_zero();
  void flush(const Output& output, const double* sums, std::int64_t first, std::int64_t length) const;

  const fused::Program* program_ = nullptr;
  const Backend* backend_ = nullptr;
  int wide_ = 0;      // 0: float, 1: double
  bool far_ = false;  // operands are beyond the L2 cache and worth a prefetch
  int chunked_ = 0;
  bool blocked_ = false;  // a transposing nest: see choose_chunks
  std::int64_t chunk_length_ = 0, chunks_ = 0;
  std::int64_t thread_sums_ = 0, partial_sums_ = 0;  // sizes of the buffers of sums
  mutable std::vector<double> partials_;             // [chunk][partial_sums_]
};

}  // namespace wengert::kernels
