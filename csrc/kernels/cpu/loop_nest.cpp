#include "kernels/cpu/loop_nest.h"

#include <algorithm>
#include <cstdlib>

#include "kernels/cpu/chunk.h"

namespace wengert::kernels {

using fused::Dtype;

namespace {

constexpr std::int64_t kChunkWork = 32768;  // elements: some 20 us of work, far above the cost of handing it to a thread
constexpr std::int64_t kTinyRow = 8;
constexpr std::int64_t kTinyKept = 4;
constexpr std::int64_t kBlockRow = 512;          // of a transposing nest: a cache line each, they stay in the L2 cache
constexpr std::int64_t kBlockWork = 4096;        // elements of a chunk of such rows
constexpr std::int64_t kRowSums = 2048;          // doubles: sums along a row stay in the L1 cache
constexpr std::int64_t kPartialLimit = 1 << 16;  // doubles kept for all chunks of a sum over the chunked loop
constexpr std::int64_t kFarBytes = 1 << 20;      // windows beyond the L2 cache are prefetched
constexpr std::size_t kFarInstructions = 6;      // a shorter program has no time to hide a prefetch in

}  // namespace

void LoopNest::prepare(const fused::Program& program, std::span<const std::int64_t> extents,
                       std::span<const OperandView> operands, std::span<const OutputView> outputs) {
  program_ = &program;
  backend_ = &backend();
  wide_ = program.compute() == Dtype::f64;
  collect(program, extents, operands, outputs);
  if (elements_ == 0) {
    chunks_ = 0;
    return;
  }
  far_ = program.bytecode().instructions.size() >= kFarInstructions &&
         elements_ * static_cast<std::int64_t>(operands_.size()) * (wide_ ? 8 : 4) > kFarBytes;
  order();
  merge();
  lengthen_rows();
  choose_chunks();
}

// One dense array summed over its rows or its columns is read as it lies.
bool LoopNest::sums_dense() const {
  if (rank_ != 2 || extents_[1] > kMaxColumns) return false;
  for (const View& view : operands_) {
    if (view.strides[1] != 1 || view.strides[0] != extents_[1]) return false;
  }
  return std::all_of(outputs_.begin(), outputs_.end(), [](const Output& output) { return output.reduced != 0; });
}

// Very short rows cost more than strided access: the innermost long loop goes inside.
void LoopNest::lengthen_rows() {
  const int inner = rank_ - 1;
  std::uint32_t summed = 0;
  for (const Output& output : outputs_) summed |= output.reduced;
  const bool kept_rows = summed && !(summed >> inner & 1);  // whose sums are added row by row as they lie
  if (rank_ < 2 || extents_[inner] > (kept_rows ? kTinyKept : kTinyRow) || sums_dense()) return;
  for (int k = rank_ - 2; k >= 0; --k) {
    if (extents_[k] < kShortRow) continue;
    for (; k < rank_ - 1; ++k) swap(k, k + 1);
    return;
  }
}

// Whether a window jumps from cache line to cache line along the rows but would stay on them from one row to the next.
bool LoopNest::transposes() const {
  const int inner = rank_ - 1;
  if (extents_[inner] < kShortRow) return false;
  auto jumps = [&](const View& view) {
    if (std::abs(view.strides[inner]) * view.bytes < kCacheLine) return false;
    for (int k = 0; k < inner; ++k) {
      if (view.strides[k] != 0 && std::abs(view.strides[k]) * view.bytes < kCacheLine) return true;
    }
    return false;
  };
  return std::any_of(operands_.begin(), operands_.end(), jumps) || std::any_of(outputs_.begin(), outputs_.end(), jumps);
}

void LoopNest::choose_chunks() {
  if (rank_ == 0) {
    rank_ = 1;
    extents_[0] = 1;
    for (View& view : operands_) view.strides[0] = 0;
    for (Output& view : outputs_) view.strides[0] = 0;
  }
  const int inner = rank_ - 1;
  std::uint32_t summed = 0;
  for (const Output& output : outputs_) summed |= output.reduced;
  // Prefer a loop nobody sums over; among those an outer one, unless it is too short to share out.
  chunked_ = -1;
  for (int pass = 0; pass < 2 && chunked_ < 0; ++pass) {
    const std::int64_t enough = pass == 0 ? 16 : 2;
    for (int k = 0; k < rank_ && chunked_ < 0; ++k) {
      if (!(summed >> k & 1) && extents_[k] >= (k == inner && rank_ > 1 ? enough * kShortRow : enough)) chunked_ = k;
    }
  }
  blocked_ = !(summed >> inner & 1) && transposes();
  if (blocked_) chunked_ = inner;
  if (chunked_ < 0) chunked_ = static_cast<int>(std::max_element(extents_, extents_ + rank_) - extents_);
  const std::int64_t extent = extents_[chunked_];
  std::int64_t length = std::max<std::int64_t>(1, kChunkWork / std::max<std::int64_t>(1, elements_ / extent));

  std::int64_t kept_elements = 0;  // sums a chunk must leave behind when the chunked loop is summed over
  for (Output& output : outputs_) {
    if (!(output.reduced >> chunked_ & 1)) continue;
    std::int64_t size = 1;
    for (int k = 0; k < rank_; ++k) size *= output.reduced >> k & 1 ? 1 : extents_[k];
    kept_elements += size;
  }
  if (kept_elements > 0) {
    std::int64_t most =
        std::max<std::int64_t>(1, std::min(kPartialLimit, std::max<std::int64_t>(elements_ / 8, 1)) / kept_elements);
    length = std::max(length, (extent + most - 1) / most);
  }
  if (chunked_ == inner && summed && kept_elements == 0) length = std::min(length, kRowSums);
  if (blocked_) {
    length = std::max<std::int64_t>(1, kBlockWork / kBlockRow / std::max<std::int64_t>(1, elements_ / extent)) * kBlockRow;
  } else if (chunked_ == inner)
    length = (length + 1023) / 1024 * 1024;  // whole tiles
  chunk_length_ = std::min(length, extent);
  chunks_ = (extent + chunk_length_ - 1) / chunk_length_;

  thread_sums_ = partial_sums_ = 0;
  for (Output& output : outputs_) {
    output.sums = 0;
    output.partials = false;
    if (output.reduced == 0) continue;
    output.partials = (output.reduced >> chunked_ & 1) && chunks_ > 1;
    std::int64_t size = 1;
    for (int k = rank_ - 1; k >= 0; --k) {
      bool reduced = output.reduced >> k & 1;
      output.sum_strides[k] = reduced ? 0 : size;
      if (!reduced) size *= k == chunked_ ? chunk_length_ : extents_[k];
    }
    output.sums = size;
    std::int64_t& total = output.partials ? partial_sums_ : thread_sums_;
    output.offset = total;
    total += size;
  }
  if (partial_sums_ > 0) partials_.resize(chunks_ * partial_sums_);
}

void LoopNest::run(std::int64_t first_chunk, std::int64_t last_chunk) const {
  thread_local Scratch scratch;
  if (static_cast<std::int64_t>(scratch.sums.size()) < thread_sums_) scratch.sums.resize(thread_sums_);
  Chunk chunk{.nest = *this, .scratch = scratch};
  for (std::int64_t c = first_chunk; c < last_chunk; ++c) {
    chunk.index = c;
    chunk.first = c * chunk_length_;
    chunk.length = std::min(chunk_length_, extents_[chunked_] - chunk.first);
    chunk.setup(c == first_chunk);
    if (chunk.rows) {
      chunk.run_rows();
    } else {
      chunk.run_packed();
    }
    for (const Output& output : outputs_) {
      if (output.sums && !output.partials) flush(output, chunk.sums_of(output), chunk.first, chunk.length);
    }
  }
}

// Writes a buffer of sums to its output: the kept loops, with the chunked one from `first` on.
void LoopNest::flush(const Output& output, const double* sums, std::int64_t first, std::int64_t length) const {
  int rank = 0;
  std::int64_t lengths[kMaxLoops], from[kMaxLoops], to[kMaxLoops], index[kMaxLoops] = {};
  for (int k = 0; k < rank_; ++k) {
    const std::int64_t extent = output.reduced >> k & 1 ? 1 : k == chunked_ ? length : extents_[k];
    if (extent == 1) continue;
    const bool merge = rank > 0 && from[rank - 1] == output.sum_strides[k] * extent && to[rank - 1] == output.strides[k] * extent;
    if (!merge) ++rank;
    lengths[rank - 1] = merge ? lengths[rank - 1] * extent : extent;
    from[rank - 1] = output.sum_strides[k];
    to[rank - 1] = output.strides[k];
  }
  if (rank == 0 || from[rank - 1] != 1) {  // the buffer's innermost loop has a single iteration here
    lengths[rank] = from[rank] = 1;
    to[rank++] = 0;
  }
  char* base = output.data + (output.reduced >> chunked_ & 1 ? 0 : first * output.strides[chunked_] * output.bytes);
  const Store store = backend_->stores[1][static_cast<int>(output.dtype)];
  const int inner = rank - 1;
  while (true) {
    std::int64_t source = 0, target = 0;
    for (int k = 0; k < inner; ++k) {
      source += index[k] * from[k];
      target += index[k] * to[k];
    }
    constexpr std::int64_t kPiece = 1 << 20;
    for (std::int64_t start = 0; start < lengths[inner]; start += kPiece) {
      const std::int64_t n = std::min(kPiece, lengths[inner] - start);
      store(base + (target + start * to[inner]) * output.bytes, sums + source + start, {0, to[inner], 1, static_cast<int>(n)},
            output.accumulate);
    }
    int k = inner - 1;
    for (; k >= 0; --k) {
      if (++index[k] < lengths[k]) break;
      index[k] = 0;
    }
    if (k < 0) return;
  }
}

void LoopNest::finish() {
  if (elements_ == 0) {
    fill_zero();
    return;
  }
  if (partial_sums_ == 0) return;
  double* total = partials_.data();
  for (std::int64_t c = 1; c < chunks_; ++c) {
    const double* part = partials_.data() + c * partial_sums_;
    for (std::int64_t i = 0; i < partial_sums_; ++i) total[i] += part[i];
  }
  for (const Output& output : outputs_) {
    if (output.sums && output.partials) flush(output, total + output.offset, 0, extents_[chunked_]);
  }
}

// An empty nest: sums over nothing are 0, outputs without elements are left alone.
void LoopNest::fill_zero() {
  for (const Output& output : outputs_) {
    if (output.reduced == 0 || output.accumulate) continue;
    std::int64_t lengths[kMaxLoops], count = 1;
    for (int k = 0; k < rank_; ++k) {
      lengths[k] = output.reduced >> k & 1 ? 1 : extents_[k];
      count *= lengths[k];
    }
    if (count == 0) continue;
    Walk walk;
    walk.start(rank_, lengths, output.strides);
    const double zero = 0;
    walk.runs(count, [&](std::int64_t offset, std::int64_t stride, std::int64_t, std::int64_t n) {
      for (std::int64_t k = 0; k < n; ++k) {
        backend_->stores[1][static_cast<int>(output.dtype)](output.data + (offset + k * stride) * output.bytes, &zero,
                                                            {0, 1, 1, 1}, false);
      }
    });
  }
}

}  // namespace wengert::kernels
