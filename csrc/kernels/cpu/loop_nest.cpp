#include "kernels/cpu/loop_nest.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels/cpu/walk.h"

namespace wengert::kernels {

using fused::Dtype;

namespace {

constexpr int kTileBytes = 2048;            // about 16 live registers fit the L1 cache
constexpr std::int64_t kChunkWork = 32768;  // elements: some 20 us of work, far above the cost of handing it to a thread
constexpr std::int64_t kShortRow = 256;     // rows shorter than this share a tile
constexpr std::int64_t kTinyRow = 8;
constexpr std::int64_t kShortKept = 32;
constexpr std::int64_t kBlockRow = 512;          // of a transposing nest: a cache line each, they stay in the L2 cache
constexpr std::int64_t kBlockWork = 4096;        // elements of a chunk of such rows
constexpr std::int64_t kRowSums = 2048;          // doubles: sums along a row stay in the L1 cache
constexpr std::int64_t kPartialLimit = 1 << 16;  // doubles kept for all chunks of a sum over the chunked loop
constexpr std::int64_t kFarBytes = 1 << 20;      // windows beyond the L2 cache are prefetched
constexpr std::size_t kFarInstructions = 6;      // a shorter program has no time to hide a prefetch in
constexpr std::int64_t kFarStep = 128;           // bytes: beyond it a tile would span too much of the cache
constexpr std::int64_t kDirectTile = 1 << 14;
constexpr int kCacheLine = 64;
constexpr int kScatterBlock = 128;  // elements of each strided output written in turn, so that rows of results are touched once

}  // namespace

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
  std::vector<unsigned> masks;
  std::vector<std::int64_t> offsets;
  struct Stretch {
    const char* data;
    std::int64_t lines;
  };
  std::vector<Stretch> ahead;  // what the next tile will touch
  struct Source {              // what the tile of an operand holds
    const char* data;
    int count;
  };
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

void LoopNest::prepare(const fused::Program& program, std::span<const std::int64_t> extents,
                       std::span<const OperandView> operands, std::span<const OutputView> outputs) {
  program_ = &program;
  backend_ = &backend();
  wide_ = program.compute() == Dtype::f64;
  const std::vector<std::int32_t>& loads = program.bytecode().loads;
  operands_.resize(loads.size());
  outputs_.resize(outputs.size());
  elements_ = 1;
  rank_ = 0;
  std::int64_t axes[kMaxLoops];
  for (std::size_t axis = 0; axis < extents.size(); ++axis) {
    elements_ *= extents[axis];
    if (extents[axis] == 1) continue;
    axes[rank_] = static_cast<std::int64_t>(axis);
    extents_[rank_++] = extents[axis];
  }
  for (std::size_t i = 0; i < loads.size(); ++i) {
    const OperandView& given = operands[loads[i]];
    View& view = operands_[i];
    view.data = static_cast<char*>(const_cast<void*>(given.data));
    view.dtype = given.dtype;
    view.bytes = fused::size_in_bytes(given.dtype);
    for (int k = 0; k < rank_; ++k) view.strides[k] = given.strides[axes[k]];
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const OutputView& given = outputs[i];
    Output& view = outputs_[i];
    view.data = static_cast<char*>(given.data);
    view.dtype = given.dtype;
    view.bytes = fused::size_in_bytes(given.dtype);
    view.accumulate = given.accumulate;
    view.reduced = 0;
    for (int k = 0; k < rank_; ++k) {
      bool reduced = program.outputs()[i].reduced >> axes[k] & 1;
      view.reduced |= static_cast<std::uint32_t>(reduced) << k;
      view.strides[k] = reduced ? 0 : given.strides[axes[k]];
    }
  }
  if (elements_ == 0) {
    chunks_ = 0;
    return;
  }
  far_ = program.bytecode().instructions.size() >= kFarInstructions &&
         elements_ * static_cast<std::int64_t>(operands_.size()) * (wide_ ? 8 : 4) > kFarBytes;
  order_loops();
  merge_loops();
  lengthen_rows();
  choose_chunks();
}

// Insertion sort, outer to inner by falling strides; outputs decide before operands, and views that do not move along both loops
// have no say.
void LoopNest::order_loops() {
  auto inner_first = [&](int a, int b) {  // whether loop a should be inside loop b
    auto vote = [&](const View& view) {
      std::int64_t x = std::abs(view.strides[a]), y = std::abs(view.strides[b]);
      return x == 0 || y == 0 || x == y ? 0 : x < y ? 1 : -1;
    };
    for (const Output& output : outputs_) {
      if (int v = vote(output)) return v > 0;
    }
    for (const View& operand : operands_) {
      if (int v = vote(operand)) return v > 0;
    }
    return false;
  };
  for (int k = 1; k < rank_; ++k) {
    for (int j = k; j > 0 && inner_first(j - 1, j); --j) swap_loops(j - 1, j);
  }
}

void LoopNest::swap_loops(int a, int b) {
  std::swap(extents_[a], extents_[b]);
  for (View& view : operands_) std::swap(view.strides[a], view.strides[b]);
  for (Output& view : outputs_) {
    std::swap(view.strides[a], view.strides[b]);
    std::uint32_t difference = (view.reduced >> a ^ view.reduced >> b) & 1;
    view.reduced ^= difference << a | difference << b;
  }
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
  // Sums kept along short rows are many little ones: they gain even where the rows are not that short.
  const bool kept_rows = summed && !(summed >> inner & 1);
  if (rank_ < 2 || extents_[inner] > (kept_rows ? kShortKept : kTinyRow) || sums_dense()) return;
  for (int k = rank_ - 2; k >= 0; --k) {
    if (extents_[k] < kShortRow || (extents_[inner] > kTinyRow && summed >> k & 1)) continue;
    for (; k < rank_ - 1; ++k) swap_loops(k, k + 1);
    return;
  }
}

void LoopNest::merge_loops() {
  if (rank_ == 0) return;
  int last = 0;
  auto mergeable = [&](const View& view, int outer, int inner) {
    return view.strides[outer] == view.strides[inner] * extents_[inner];
  };
  for (int k = 1; k < rank_; ++k) {
    bool merge = true;
    for (const View& view : operands_) merge = merge && mergeable(view, last, k);
    for (const Output& view : outputs_) {
      merge = merge && mergeable(view, last, k) && (view.reduced >> last & 1) == (view.reduced >> k & 1);
    }
    int target = merge ? last : last + 1;
    extents_[target] = merge ? extents_[last] * extents_[k] : extents_[k];
    for (View& view : operands_) view.strides[target] = view.strides[k];
    for (Output& view : outputs_) {
      view.strides[target] = view.strides[k];
      std::uint32_t bit = view.reduced >> k & 1;
      view.reduced = (view.reduced & ~(std::uint32_t{1} << target)) | bit << target;
    }
    last = target;
  }
  rank_ = last + 1;
  for (Output& view : outputs_) view.reduced &= rank_ == 32 ? ~std::uint32_t{0} : (std::uint32_t{1} << rank_) - 1;
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
  } else if (chunked_ == inner) length = (length + 1023) / 1024 * 1024;  // whole tiles
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

// Everything about a chunk that does not change from tile to tile.
struct LoopNest::Chunk {
  const LoopNest& nest;
  Scratch& scratch;
  std::int64_t index;          // of the chunk
  std::int64_t first, length;  // its part of the chunked loop
  std::int64_t lengths[kMaxLoops];
  int tile, lanes, element;  // elements of a tile and of a vector, bytes of an element
  char* memory;
  bool rows;    // tiles are pieces of rows (long inner loop)
  bool direct;  // no instructions, and every operand is read in place: tiles may be of any size

  double* sums_of(const Output& output) const {
    if (output.partials) return nest.partials_.data() + index * nest.partial_sums_ + output.offset;
    return scratch.sums.data() + output.offset;
  }
  char* tile_at(std::size_t which) const { return memory + which * kTileBytes; }
  char* base_of(const View& view) const { return view.data + first * view.strides[nest.chunked_] * view.bytes; }

  void setup(bool fresh);
  void fill_tail(char* tile_data, int n) const;
  void execute(int n) const;
  bool is_constant(std::uint16_t r) const {
    const fused::Bytecode& code = nest.program_->bytecode();
    return r >= code.loads.size() && r < code.loads.size() + code.constants.size();
  }
  void load(std::size_t i, const char* source, std::int64_t stride, int n) const;
  void look_ahead(const char* data, std::int64_t step) const;
  void spread(std::uint16_t r, int n) const;
  const char* output_tile(std::size_t i, int n) const;
  void aim(std::size_t i, char* target, std::int64_t stride, int n) const;
  void reset_registers() const;
  void run_rows();
  void run_packed();
};

// Decides which registers vary along a tile and lays out the scratch memory: a tile for each register.
void LoopNest::Chunk::setup(bool fresh) {
  const fused::Bytecode& code = nest.program_->bytecode();
  const std::size_t loads = code.loads.size(), constants = code.constants.size();
  const std::size_t registers = loads + constants + code.slots;
  const int inner = nest.rank_ - 1;
  for (int k = 0; k < nest.rank_; ++k) lengths[k] = nest.extents_[k];
  lengths[nest.chunked_] = length;
  std::int64_t row_count = 1;
  for (int k = 0; k < inner; ++k) row_count *= lengths[k];
  rows = nest.blocked_ || lengths[inner] >= kShortRow || row_count == 1;
  element = nest.wide_ ? 8 : 4;
  tile = kTileBytes / element;
  lanes = nest.backend_->vector_bytes / element;
  if (fresh) {
    memory = scratch.reserve(registers * kTileBytes);
    scratch.registers.resize(registers);
    for (std::size_t r = 0; r < registers; ++r) scratch.registers[r] = tile_at(r);
    for (std::size_t c = 0; c < constants; ++c) {
      for (int lane = 0; lane < lanes; ++lane) {
        const double value = code.constants[c];
        if (nest.wide_) {
          reinterpret_cast<double*>(tile_at(loads + c))[lane] = value;
        } else {
          reinterpret_cast<float*>(tile_at(loads + c))[lane] = static_cast<float>(value);
        }
      }
    }
    const int most = static_cast<int>(std::min<std::int64_t>(tile, nest.elements_));
    for (std::uint16_t r : code.outputs) {
      if (is_constant(r)) spread(r, most);
    }
    scratch.sources.assign(loads, {nullptr, 0});
  }
  scratch.varying.assign(registers, 0);
  scratch.walks.resize(loads + nest.outputs_.size());
  for (std::size_t i = 0; i < loads; ++i) {
    const View& view = nest.operands_[i];
    if (rows) {
      scratch.varying[i] = view.strides[inner] != 0;
    } else {
      Walk& walk = scratch.walks[i];
      walk.start(nest.rank_, lengths, view.strides);
      scratch.varying[i] = walk.rank > 1 || walk.strides[0] != 0;
    }
  }
  if (!rows) {
    for (std::size_t i = 0; i < nest.outputs_.size(); ++i) {
      const Output& output = nest.outputs_[i];
      scratch.walks[loads + i].start(nest.rank_, lengths, output.sums ? output.sum_strides : output.strides);
    }
  }
  direct = code.instructions.empty() && code.constants.empty();
  for (std::size_t i = 0; direct && i < loads; ++i) {
    const View& view = nest.operands_[i];
    direct = view.dtype == (nest.wide_ ? Dtype::f64 : Dtype::f32);
    direct = direct && (rows ? view.strides[inner] == 1 : scratch.walks[i].rank == 1 && scratch.walks[i].strides[0] == 1);
  }
  scratch.masks.clear();
  for (const fused::Instruction& instruction : code.instructions) {
    unsigned mask = 0;
    for (int k = 0; k < fused::info(instruction.prim).arity; ++k) {
      mask |= static_cast<unsigned>(scratch.varying[instruction.args[k]]) << k;
    }
    scratch.varying[instruction.result] = mask != 0;
    scratch.masks.push_back(mask);
  }
  for (const Output& output : nest.outputs_) {
    if (output.sums) std::fill_n(sums_of(output), output.sums, 0.0);
  }
}

// Kernels run over whole vectors; the rest of the last one repeats a value of the tile, so that it can neither trap nor be slow.
void LoopNest::Chunk::fill_tail(char* tile_data, int n) const {
  for (int i = n; i % lanes != 0; ++i) std::memcpy(tile_data + i * element, tile_data + (n - 1) * element, element);
}

void LoopNest::Chunk::execute(int n) const {
  const fused::Bytecode& code = nest.program_->bytecode();
  const Kernel* kernels = nest.backend_->kernels[nest.wide_];
  const int whole = (n + lanes - 1) / lanes * lanes;
  const char* const* registers = scratch.registers.data();
  const unsigned* mask = scratch.masks.data();
  std::int64_t lines = 0;
  for (const Scratch::Stretch& stretch : scratch.ahead) lines += stretch.lines;
  const std::int64_t share = lines > 0 ? lines / static_cast<std::int64_t>(code.instructions.size()) + 1 : 0;
  auto stretch = scratch.ahead.begin();
  auto prefetch = [&] {
    for (std::int64_t left = share; left > 0 && stretch != scratch.ahead.end();) {
      const std::int64_t count = std::min(left, stretch->lines);
      for (std::int64_t k = 0; k < count; ++k) __builtin_prefetch(stretch->data + k * kCacheLine, 0, 2);
      left -= count;
      stretch->data += count * kCacheLine;
      if ((stretch->lines -= count) == 0) ++stretch;
    }
  };
  for (const fused::Instruction& instruction : code.instructions) {
    if (lines > 0) prefetch();
    const void* args[fused::kMaxArity];
    for (int k = 0; k < fused::kMaxArity; ++k) args[k] = registers[instruction.args[k]];
    kernels[static_cast<int>(instruction.prim)](const_cast<char*>(registers[instruction.result]), args, *mask,
                                                *mask ? whole : lanes);
    ++mask;
  }
  scratch.ahead.clear();
}

// Brings n elements (one vector of the same where stride is 0) into the operand's tile, unless they are still there.
void LoopNest::Chunk::load(std::size_t i, const char* source, std::int64_t stride, int n) const {
  scratch.registers[i] = tile_at(i);
  const int count = stride == 0 ? lanes : n;
  Scratch::Source& held = scratch.sources[i];
  if (held.data == source && held.count == count) return;
  held = {source, count};
  nest.backend_->loads[nest.wide_][static_cast<int>(nest.operands_[i].dtype)](tile_at(i), source, stride, count);
  fill_tail(tile_at(i), count);
}

// The hardware's prefetchers follow a stream within a page; tiles visit several streams in turn, half a page of each.  What the
// next tile touches is therefore asked for while this one is computed, windows of one array (columns, say) once.
void LoopNest::Chunk::look_ahead(const char* data, std::int64_t step) const {
  if (!nest.far_ || step <= 0 || step > kFarStep) return;
  data += tile * step;
  for (const Scratch::Stretch& other : scratch.ahead) {
    if (data > other.data - step && data < other.data + step) return;
  }
  scratch.ahead.push_back({data, tile * step / kCacheLine});
}

// Repeats the one vector of a register over n elements of its tile.
void LoopNest::Chunk::spread(std::uint16_t r, int n) const {
  const Dtype compute = nest.wide_ ? Dtype::f64 : Dtype::f32;
  nest.backend_->loads[nest.wide_][static_cast<int>(compute)](tile_at(r), scratch.registers[r], 0, n);
}

// The n elements of an output.  Constants were spread when the thread began.
const char* LoopNest::Chunk::output_tile(std::size_t i, int n) const {
  const std::uint16_t r = nest.program_->bytecode().outputs[i];
  if (!scratch.varying[r] && !is_constant(r)) spread(r, n);
  return scratch.registers[r];
}

// Lets the instructions write an output straight to its place where that is a contiguous run of whole vectors.
void LoopNest::Chunk::aim(std::size_t i, char* target, std::int64_t stride, int n) const {
  const fused::Bytecode& code = nest.program_->bytecode();
  const Output& output = nest.outputs_[i];
  const std::uint16_t r = code.outputs[i];
  const bool computed = r >= code.loads.size() + code.constants.size() && scratch.varying[r];
  if (!computed || stride != 1 || output.accumulate || n % lanes != 0 || scratch.registers[r] != tile_at(r)) return;
  if (output.dtype != (nest.wide_ ? Dtype::f64 : Dtype::f32)) return;
  scratch.registers[r] = target;
}

void LoopNest::Chunk::reset_registers() const {
  const fused::Bytecode& code = nest.program_->bytecode();
  for (std::uint16_t r : code.outputs) {
    if (r >= code.loads.size()) scratch.registers[r] = tile_at(r);
  }
}

void LoopNest::Chunk::run_rows() {
  const fused::Bytecode& code = nest.program_->bytecode();
  const Backend& backend = *nest.backend_;
  const int wide = nest.wide_, inner = nest.rank_ - 1;
  const Dtype compute = wide ? Dtype::f64 : Dtype::f32;
  const std::size_t loads = code.loads.size(), outputs = nest.outputs_.size();
  const std::int64_t row = lengths[inner];
  const std::int64_t step = direct ? kDirectTile : tile;
  scratch.offsets.assign(loads + outputs, 0);  // bytes for operands and stores, elements for sums
  std::int64_t* offsets = scratch.offsets.data();
  auto stride_of = [&](std::size_t v, int k) -> std::int64_t {
    if (v < loads) return nest.operands_[v].strides[k] * nest.operands_[v].bytes;
    const Output& output = nest.outputs_[v - loads];
    return output.sums ? output.sum_strides[k] : output.strides[k] * output.bytes;
  };
  std::int64_t index[kMaxLoops] = {};
  while (true) {
    for (std::int64_t start = 0; start < row; start += step) {
      const int n = static_cast<int>(std::min<std::int64_t>(step, row - start));
      for (std::size_t i = 0; i < loads; ++i) {
        const View& view = nest.operands_[i];
        const std::int64_t stride = view.strides[inner];
        const char* source = base_of(view) + offsets[i] + start * stride * view.bytes;
        look_ahead(source, stride * view.bytes);
        if (direct || (stride == 1 && view.dtype == compute && n % lanes == 0)) {
          scratch.registers[i] = source;
        } else {
          load(i, source, stride, n);
        }
      }
      auto target_of = [&](std::size_t i) {
        const Output& output = nest.outputs_[i];
        return base_of(output) + offsets[loads + i] + start * output.strides[inner] * output.bytes;
      };
      for (std::size_t i = 0; i < outputs; ++i) {
        const Output& output = nest.outputs_[i];
        if (output.sums) continue;
        aim(i, target_of(i), output.strides[inner], n);
        look_ahead(target_of(i), output.strides[inner] * output.bytes);
      }
      execute(n);
      bool scattered = false;
      for (std::size_t i = 0; i < outputs; ++i) {
        const Output& output = nest.outputs_[i];
        const char* values = output_tile(i, n);
        if (output.sums == 0) {
          if (n > kScatterBlock && output.strides[inner] != 1) {
            scattered = true;
          } else if (values != target_of(i)) {
            backend.stores[wide][static_cast<int>(output.dtype)](target_of(i), output.strides[inner], values, n, output.accumulate);
          }
        } else {
          double* sums = sums_of(output) + offsets[loads + i];
          if (output.sum_strides[inner] == 0) {
            *sums += backend.sum[wide](values, n);
          } else {
            backend.add_into[wide](sums + start, values, n);  // the innermost kept loop of the buffer: unit stride
          }
        }
      }
      for (int from = 0; scattered && from < n; from += kScatterBlock) {
        const int count = std::min(kScatterBlock, n - from);
        for (std::size_t i = 0; i < outputs; ++i) {
          const Output& output = nest.outputs_[i];
          const std::int64_t stride = output.strides[inner];
          if (output.sums || stride == 1) continue;
          backend.stores[wide][static_cast<int>(output.dtype)](target_of(i) + from * stride * output.bytes, stride,
                                                               scratch.registers[code.outputs[i]] + from * element, count,
                                                               output.accumulate);
        }
      }
      reset_registers();
    }
    int k = inner - 1;
    for (; k >= 0; --k) {
      bool carry = ++index[k] == lengths[k];
      const std::int64_t steps = carry ? 1 - lengths[k] : 1;
      for (std::size_t v = 0; v < loads + outputs; ++v) offsets[v] += steps * stride_of(v, k);
      if (!carry) break;
      index[k] = 0;
    }
    if (k < 0) return;
  }
}

void LoopNest::Chunk::run_packed() {
  const fused::Bytecode& code = nest.program_->bytecode();
  const Backend& backend = *nest.backend_;
  const int wide = nest.wide_;
  const Dtype compute = wide ? Dtype::f64 : Dtype::f32;
  const std::size_t loads = code.loads.size();
  std::int64_t total = 1;
  for (int k = 0; k < nest.rank_; ++k) total *= lengths[k];
  const std::int64_t step = direct ? std::max<std::int64_t>(1, kDirectTile / lengths[nest.rank_ - 1]) * lengths[nest.rank_ - 1] : tile;
  for (std::int64_t start = 0; start < total; start += step) {
    const int n = static_cast<int>(std::min<std::int64_t>(step, total - start));
    for (std::size_t i = 0; i < loads; ++i) {
      const View& view = nest.operands_[i];
      const Walk& walk = scratch.walks[i];
      const char* base = base_of(view);
      if (walk.rank == 1 && walk.strides[0] == 1 && view.dtype == compute) {
        look_ahead(base + start * view.bytes, view.bytes);
        if (direct || n % lanes == 0) {
          scratch.registers[i] = base + start * view.bytes;
          continue;
        }
      }
      if (!scratch.varying[i]) {
        load(i, base, 0, lanes);
        continue;
      }
      scratch.registers[i] = tile_at(i);
      const Load gather = backend.loads[wide][static_cast<int>(view.dtype)];
      walk.runs(start, n, [&](std::int64_t offset, std::int64_t stride, std::int64_t position, std::int64_t count) {
        gather(tile_at(i) + position * element, base + offset * view.bytes, stride, static_cast<int>(count));
      });
      fill_tail(tile_at(i), n);
    }
    auto target_of = [&](std::size_t i) { return base_of(nest.outputs_[i]) + start * nest.outputs_[i].bytes; };
    for (std::size_t i = 0; i < nest.outputs_.size(); ++i) {
      const Walk& walk = scratch.walks[loads + i];
      if (nest.outputs_[i].sums == 0 && walk.rank == 1) aim(i, target_of(i), walk.strides[0], n);
    }
    execute(n);
    for (std::size_t i = 0; i < nest.outputs_.size(); ++i) {
      const Output& output = nest.outputs_[i];
      const Walk& walk = scratch.walks[loads + i];
      const char* values = output_tile(i, n);
      auto piece = [&](std::int64_t position) { return values + position * element; };
      if (values == target_of(i)) continue;
      if (output.sums == 0) {
        const Store store = backend.stores[wide][static_cast<int>(output.dtype)];
        char* base = base_of(output);
        walk.runs(start, n, [&](std::int64_t offset, std::int64_t stride, std::int64_t position, std::int64_t count) {
          store(base + offset * output.bytes, stride, piece(position), static_cast<int>(count), output.accumulate);
        });
      } else {
        double* sums = sums_of(output);
        const std::int64_t row = walk.extents[walk.rank - 1];
        if (walk.rank == 2 && start % row == 0 && n % row == 0) {
          const int count = static_cast<int>(n / row);
          if (walk.strides[0] == 1 && walk.strides[1] == 0) {
            backend.sum_rows[wide](sums + start / row, values, count, static_cast<int>(row));
            continue;
          }
          if (walk.strides[0] == 0 && walk.strides[1] == 1 && row <= kMaxColumns) {
            backend.sum_columns[wide](sums, values, count, static_cast<int>(row));
            continue;
          }
        }
        walk.runs(start, n, [&](std::int64_t offset, std::int64_t stride, std::int64_t position, std::int64_t count) {
          if (stride == 0) {
            sums[offset] += backend.sum[wide](piece(position), static_cast<int>(count));
          } else if (stride == 1) {
            backend.add_into[wide](sums + offset, piece(position), static_cast<int>(count));
          } else {
            for (std::int64_t k = 0; k < count; ++k) {
              sums[offset + k * stride] += wide ? reinterpret_cast<const double*>(piece(position))[k]
                                                : static_cast<double>(reinterpret_cast<const float*>(piece(position))[k]);
            }
          }
        });
      }
    }
    reset_registers();
  }
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
    const bool merge =
        rank > 0 && from[rank - 1] == output.sum_strides[k] * extent && to[rank - 1] == output.strides[k] * extent;
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
      store(base + (target + start * to[inner]) * output.bytes, to[inner], sums + source + start, static_cast<int>(n),
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
    walk.runs(0, count, [&](std::int64_t offset, std::int64_t stride, std::int64_t, std::int64_t n) {
      for (std::int64_t k = 0; k < n; ++k) {
        backend_->stores[1][static_cast<int>(output.dtype)](output.data + (offset + k * stride) * output.bytes, 1, &zero, 1,
                                                            false);
      }
    });
  }
}

}  // namespace wengert::kernels
