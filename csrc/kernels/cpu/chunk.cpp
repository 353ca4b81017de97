#include "kernels/cpu/chunk.h"

#include <algorithm>

namespace wengert::kernels {

using fused::Dtype;

namespace {

constexpr std::int64_t kFarStep = 128;  // bytes: beyond it a tile would span too much of the cache
constexpr std::int64_t kDirectTile = 1 << 14;
constexpr int kScatterBlock = 128;  // elements of each strided output written in turn, so that rows of results are touched once

}  // namespace

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
  tile_bytes = kLargestTile;  // few registers take longer tiles: less to decide per element
  while (tile_bytes > kTileBytes && registers * tile_bytes > kCacheBytes) tile_bytes /= 2;
  tile = static_cast<int>(tile_bytes) / element;
  lanes = nest.backend_->vector_bytes / element;
  if (fresh) {
    memory = scratch.reserve(kTileStart + registers * (tile_bytes + kTileGap));
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
    for (fused::Register r : code.outputs) {
      if (is_constant(r)) spread(r, most);
    }
  }
  scratch.sources.assign(loads, Scratch::kNothing);
  scratch.varying.assign(registers, 0);
  scratch.aimed.assign(nest.outputs_.size(), false);
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
  const int tail = (lanes - n % lanes) % lanes;
  if (nest.wide_) {
    double* end = reinterpret_cast<double*>(tile_data) + n;
    std::fill_n(end, tail, end[-1]);
  } else {
    float* end = reinterpret_cast<float*>(tile_data) + n;
    std::fill_n(end, tail, end[-1]);
  }
}

void LoopNest::Chunk::execute(int n) const {
  if (scratch.ahead.empty()) {
    instructions(n, [] {});
    return;
  }
  std::int64_t lines = 0;
  for (const Scratch::Stretch& stretch : scratch.ahead) lines += stretch.lines;
  const std::int64_t share = lines / static_cast<std::int64_t>(nest.program_->bytecode().instructions.size()) + 1;
  auto stretch = scratch.ahead.begin();
  instructions(n, [&] {
    for (std::int64_t left = share; left > 0 && stretch != scratch.ahead.end();) {
      const std::int64_t count = std::min(left, stretch->lines);
      for (std::int64_t k = 0; k < count; ++k) __builtin_prefetch(stretch->data + k * kCacheLine, 0, 2);
      left -= count;
      stretch->data += count * kCacheLine;
      if ((stretch->lines -= count) == 0) ++stretch;
    }
  });
  scratch.ahead.clear();
}

// Runs the program on a tile; calls before() before each instruction.
template <class Before>
void LoopNest::Chunk::instructions(int n, Before before) const {
  const fused::Bytecode& code = nest.program_->bytecode();
  const Kernel* kernels = nest.backend_->kernels[nest.wide_];
  const int whole = (n + lanes - 1) / lanes * lanes;
  const char* const* registers = scratch.registers.data();
  const unsigned* mask = scratch.masks.data();
  for (const fused::Instruction& instruction : code.instructions) {
    before();
    const void* args[fused::kMaxArity];
    for (int k = 0; k < fused::kMaxArity; ++k) args[k] = registers[instruction.args[k]];
    kernels[static_cast<int>(instruction.prim)](const_cast<char*>(registers[instruction.result]), args, *mask,
                                                *mask ? whole : lanes);
    ++mask;
  }
}

// Brings n elements (one vector of the same where stride is 0) into the operand's tile, unless they are still there.
void LoopNest::Chunk::load(std::size_t i, const char* source, std::int64_t stride, int n) const {
  scratch.registers[i] = tile_at(i);
  const int count = stride == 0 ? lanes : n;
  const Scratch::Source wanted{source, 1, count};
  if (scratch.sources[i] == wanted) return;
  scratch.sources[i] = wanted;
  nest.backend_->loads[nest.wide_][static_cast<int>(nest.operands_[i].dtype)](tile_at(i), source, {0, stride, 1, count});
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
void LoopNest::Chunk::spread(fused::Register r, int n) const {
  const Dtype compute = nest.wide_ ? Dtype::f64 : Dtype::f32;
  nest.backend_->loads[nest.wide_][static_cast<int>(compute)](tile_at(r), scratch.registers[r], {0, 0, 1, n});
}

// The n elements of an output.  Constants were spread when the thread began.
const char* LoopNest::Chunk::output_tile(std::size_t i, int n) const {
  const fused::Register r = nest.program_->bytecode().outputs[i];
  if (!scratch.varying[r] && !is_constant(r)) spread(r, n);
  return scratch.registers[r];
}

// Lets the instructions write an output straight to its place where that is a contiguous run of whole vectors.
void LoopNest::Chunk::aim(std::size_t i, char* target, std::int64_t stride, int n) const {
  const fused::Bytecode& code = nest.program_->bytecode();
  const Output& output = nest.outputs_[i];
  const fused::Register r = code.outputs[i];
  const bool computed = r >= code.loads.size() + code.constants.size() && scratch.varying[r];
  if (!computed || stride != 1 || output.accumulate || n % lanes != 0 || scratch.registers[r] != tile_at(r)) return;
  if (output.dtype != (nest.wide_ ? Dtype::f64 : Dtype::f32)) return;
  scratch.registers[r] = target;
  scratch.aimed[i] = true;
}

void LoopNest::Chunk::reset_registers() const {
  const fused::Bytecode& code = nest.program_->bytecode();
  std::fill(scratch.aimed.begin(), scratch.aimed.end(), false);
  for (fused::Register r : code.outputs) {
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
          } else if (!scratch.aimed[i]) {
            backend.stores[wide][static_cast<int>(output.dtype)](target_of(i), values, {0, output.strides[inner], 1, n},
                                                                 output.accumulate);
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
          backend.stores[wide][static_cast<int>(output.dtype)](target_of(i) + from * stride * output.bytes,
                                                               scratch.registers[code.outputs[i]] + from * element,
                                                               {0, stride, 1, count}, output.accumulate);
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
  const std::int64_t step =
      direct ? std::max<std::int64_t>(1, kDirectTile / lengths[nest.rank_ - 1]) * lengths[nest.rank_ - 1] : tile;
  for (std::int64_t start = 0; start < total; start += step) {
    const int n = static_cast<int>(std::min<std::int64_t>(step, total - start));
    for (std::size_t i = 0; i < loads; ++i) {
      const View& view = nest.operands_[i];
      Walk& walk = scratch.walks[i];
      const char* base = base_of(view);
      if (walk.rank == 1 && walk.strides[0] == 1 && view.dtype == compute) {
        look_ahead(base + start * view.bytes, view.bytes);
        if (direct || n % lanes == 0) {
          scratch.registers[i] = base + start * view.bytes;
          walk.skip(n);
          continue;
        }
      }
      if (!scratch.varying[i]) {
        load(i, base, 0, lanes);
        continue;
      }
      scratch.registers[i] = tile_at(i);
      const Load gather = backend.loads[wide][static_cast<int>(view.dtype)];
      bool held = false;
      walk.rows(n, [&](std::int64_t offset, std::int64_t step, std::int64_t stride, std::int64_t position, std::int64_t rows,
                       std::int64_t count) {
        const char* source = base + offset * view.bytes;
        // The tile that repeats one row is often the one of the step before.
        const Scratch::Source wanted = step == 0 && rows * count == n ? Scratch::Source{source, rows, count} : Scratch::kNothing;
        held = wanted.data && scratch.sources[i] == wanted;
        if (held) return;
        scratch.sources[i] = wanted;
        gather(tile_at(i) + position * element, source, {step, stride, static_cast<int>(rows), static_cast<int>(count)});
      });
      if (!held) fill_tail(tile_at(i), n);
    }
    auto target_of = [&](std::size_t i) { return base_of(nest.outputs_[i]) + start * nest.outputs_[i].bytes; };
    for (std::size_t i = 0; i < nest.outputs_.size(); ++i) {
      const Walk& walk = scratch.walks[loads + i];
      if (nest.outputs_[i].sums == 0 && walk.rank == 1) aim(i, target_of(i), walk.strides[0], n);
    }
    execute(n);
    for (std::size_t i = 0; i < nest.outputs_.size(); ++i) {
      const Output& output = nest.outputs_[i];
      Walk& walk = scratch.walks[loads + i];
      const char* values = output_tile(i, n);
      auto piece = [&](std::int64_t position) { return values + position * element; };
      if (output.sums == 0) {
        if (scratch.aimed[i]) {  // it stands where it belongs
          walk.skip(n);
          continue;
        }
        const Store store = backend.stores[wide][static_cast<int>(output.dtype)];
        char* base = base_of(output);
        walk.rows(n, [&](std::int64_t offset, std::int64_t step, std::int64_t stride, std::int64_t position, std::int64_t rows,
                         std::int64_t count) {
          store(base + offset * output.bytes, piece(position), {step, stride, static_cast<int>(rows), static_cast<int>(count)},
                output.accumulate);
        });
      } else {
        double* sums = sums_of(output);
        const std::int64_t row = walk.extents[walk.rank - 1];
        if (walk.rank == 2 && start % row == 0 && n % row == 0) {
          const int count = static_cast<int>(n / row);
          if (walk.strides[0] == 1 && walk.strides[1] == 0) {
            backend.sum_rows[wide](sums + start / row, values, count, static_cast<int>(row));
            walk.skip(n);
            continue;
          }
          if (walk.strides[0] == 0 && walk.strides[1] == 1 && row <= kMaxColumns) {
            backend.sum_columns[wide](sums, values, count, static_cast<int>(row));
            walk.skip(n);
            continue;
          }
        }
        walk.runs(n, [&](std::int64_t offset, std::int64_t stride, std::int64_t position, std::int64_t count) {
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

}  // namespace wengert::kernels
