#include "kernels/cuda/launch_plan.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>

#include "common/fork_safe_mutex.h"
#include "common/lru.h"
#include "fused/kernel_abi.h"
#include "kernels/cuda/pass_geometry.h"

namespace wengert::kernels::cuda {

using fused::Divisor;
using fused::Dtype;
using fused::kBlockThreads;
using fused::KernelShape;
using fused::kParameterBytes;

namespace {

constexpr std::int64_t kMostPieces = 1024;  // of a summed range
constexpr std::int64_t kFewestPieces = 4;   // fewer are not worth a second launch

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// --------------------------------------------------------------------------------------------------------------------- kernels
std::string key_of(const fused::Program& program, const KernelShape& shape) {
  std::string key = program.text();
  auto add = [&](int value) { key += static_cast<char>(value); };
  add(static_cast<int>(shape.variant));
  add(shape.wide_index | shape.tail << 1);
  add(shape.rank);
  add(shape.reduced_rank);
  add(shape.width);
  add(shape.unroll);
  add(shape.sums);
  add(shape.sums >> 8);
  add(shape.streamed | shape.in_memory << 1);
  for (const KernelShape::Load& load : shape.loads) add(load.kind());
  for (const KernelShape::Store& store : shape.stores) add(static_cast<int>(store.dtype) << 1 | store.accumulate);
  return key;
}

struct Kernels {
  static constexpr std::size_t kMostBytes = std::size_t{64} << 20;

  common::ForkSafeMutex mutex;
  std::uint64_t ids = 0;
  common::Lru<std::string, std::shared_ptr<const Kernel>> known{kMostBytes};
};

Kernels& kernels() {
  static auto* instance = new Kernels;  // never destroyed: threads may outlive static destructors
  return *instance;
}
[[maybe_unused]] const Kernels& made_at_load = kernels();  // see common::ForkSafeMutex

std::shared_ptr<const Kernel> kernel_for(const fused::Program& program, const KernelShape& shape) {
  Kernels& k = kernels();
  std::string key = key_of(program, shape);
  {
    std::lock_guard lock(k.mutex);
    if (const auto* found = k.known.find(key)) return *found;
  }
  const char* entry = shape.variant == KernelShape::Variant::map ? fused::kMapEntry : fused::kSumEntry;
  std::string source = fused::cuda_source(program, shape);
  std::lock_guard lock(k.mutex);
  auto kernel = std::make_shared<const Kernel>(Kernel{++k.ids, entry, std::move(source)});
  const std::size_t bytes = sizeof(Kernel) + key.size() + kernel->source.size();
  return k.known.insert(std::move(key), std::move(kernel), bytes);
}

const std::shared_ptr<const Kernel>& table_kernel() {
  static const auto* kernel = new auto(std::make_shared<const Kernel>(Kernel{0, fused::kTableEntry, fused::table_source()}));
  return *kernel;
}

// Fills a parameter struct field by field with natural alignment.
class Parameters {
 public:
  explicit Parameters(bool wide_index) : wide_(wide_index) {}

  // Returns the position.
  template <class T>
  std::size_t put(const T& value, std::size_t alignment = sizeof(T)) {
    const std::size_t position = (bytes_.size() + alignment - 1) / alignment * alignment;
    bytes_.resize(position);
    const char* raw = reinterpret_cast<const char*>(&value);
    bytes_.insert(bytes_.end(), raw, raw + sizeof(T));
    return position;
  }
  std::size_t pointer(const void* address) { return put(reinterpret_cast<std::uint64_t>(address)); }
  void index(std::int64_t value) {
    if (wide_) {
      put(value);
    } else {
      put(static_cast<std::int32_t>(value));
    }
  }
  void divisor(std::int64_t value) {
    if (wide_) {
      put(Divisor<std::int64_t>::of(value));
    } else {
      put(Divisor<std::int32_t>::of(value), alignof(Divisor<std::int32_t>));
    }
  }
  std::vector<char> take() {
    bytes_.resize((bytes_.size() + 7) / 8 * 8);  // pointers come first: the struct is aligned to 8
    return std::move(bytes_);
  }

 private:
  bool wide_;
  std::vector<char> bytes_;
};

void put_extents(Parameters& parameters, const GpuLoops& loops, const SomeLoops& some) {
  if (some.loops.empty()) parameters.divisor(1);
  for (int k : some.loops) parameters.divisor(loops.extents_[k]);
}

void put_strides(Parameters& parameters, const LoopView& view, const SomeLoops& some) {
  if (some.loops.empty()) parameters.index(0);
  for (int k : some.loops) parameters.index(view.strides[k]);
}

// ------------------------------------------------------------------------------------------------------------------- launches
// Which windows of a pass lie in the workspace: their addresses count from its start.
enum class Workspace { unused, read, written };

class Planner {
 public:
  Planner(const Limits& limits, Plan& plan) : limits_(limits), plan_(plan) {}

  // The first outputs are summed, all over the same loops, or none is.
  void pass(const fused::Program& program, std::span<const std::int64_t> extents, std::span<const OperandView> operands,
            std::span<const OutputView> outputs, Workspace workspace) {
    GpuLoops loops;
    loops.collect(program, extents, operands, outputs);
    loops.order();
    loops.merge();
    if (loops.outputs_.front().reduced == 0) {
      map(program, loops, workspace);
    } else {
      sum(program, loops, workspace);
    }
  }

 private:
  void map(const fused::Program& program, const GpuLoops& loops, Workspace workspace) {
    const std::size_t instructions = code_size(program, loops);
    KernelShape shape = shape_of(program, loops, limits_, choose_width(loops, instructions, 0));
    const SomeLoops all = select_loops(loops, 0, false);
    shape.rank = all.rank();
    shape.tail = loops.rank_ == 1 && shape.width > 1;
    shape.unroll = choose_unroll(shape, instructions, false);
    shape.in_memory = goes_to_memory(loops, shape, shape.rank, workspace);
    Parameters parameters(shape.wide_index);
    Launch launch;
    put_pointers(parameters, launch, shape, loops, workspace);
    parameters.index(loops.elements_);
    put_extents(parameters, loops, all);
    put_load_strides(parameters, launch, shape, loops, all);
    for (const LoopOutput& view : loops.outputs_) put_strides(parameters, view, all);
    launch.parameters = parameters.take();
    count_traffic(loops, &launch.bytes_read, &launch.bytes_written);
    add(program, shape, std::move(launch), divide_up(loops.elements_, std::int64_t{kBlockThreads} * shape.width * shape.unroll),
        1);
  }

  // See NOTE [Sums on the device] in fused/nest_kernel.h.
  void sum(const fused::Program& program, GpuLoops& loops, Workspace workspace) {
    const std::uint32_t reduced = loops.outputs_.front().reduced;
    const SomeLoops kept = select_loops(loops, reduced, false), summed = select_loops(loops, reduced, true);
    const bool rows = reduced >> (loops.rank_ - 1) & 1;
    const auto is_sum = [](const LoopOutput& view) { return view.reduced != 0; };
    const int sums = static_cast<int>(std::count_if(loops.outputs_.begin(), loops.outputs_.end(), is_sum));
    const std::size_t instructions = code_size(program, loops);
    const int width = choose_width(loops, instructions, sums);
    const std::int64_t kept_groups = rows ? kept.elements : kept.elements / width;
    const std::int64_t steps = rows ? divide_up(summed.elements, width) : summed.elements;
    const int lanes = choose_lanes(rows, kept_groups, steps);
    const std::int64_t blocks = divide_up(kept_groups, kBlockThreads / lanes);
    const std::int64_t pieces = workspace == Workspace::read ? 1 : choose_pieces(blocks, steps, lanes);
    const std::int64_t piece = divide_up(steps, pieces * lanes) * lanes * (rows ? width : 1);
    const bool partial = pieces > 1;

    const std::vector<LoopOutput> targets(loops.outputs_.begin(), loops.outputs_.begin() + sums);
    const std::int64_t used = divide_up(summed.elements, piece);
    if (partial) {
      for (int i = 0; i < sums; ++i) partial_sums(loops.outputs_[i], loops, kept, used);
      workspace = Workspace::written;
    }
    KernelShape shape = shape_of(program, loops, limits_, width);
    shape.variant = rows ? KernelShape::Variant::sum_rows : KernelShape::Variant::sum_columns;
    shape.tail = rows && loops.rank_ == 1 && width > 1;
    shape.rank = kept.rank();
    shape.reduced_rank = summed.rank();
    shape.sums = sums;
    shape.unroll = choose_unroll(shape, instructions, true);
    shape.in_memory = goes_to_memory(loops, shape, shape.rank + shape.reduced_rank, workspace);
    Parameters parameters(shape.wide_index);
    Launch launch;
    put_pointers(parameters, launch, shape, loops, workspace);
    parameters.index(kept.elements);
    parameters.index(summed.elements);
    parameters.index(piece);
    parameters.index(partial ? kept.elements : 0);
    parameters.put(static_cast<std::int32_t>(lanes));
    put_extents(parameters, loops, kept);
    put_extents(parameters, loops, summed);
    put_load_strides(parameters, launch, shape, loops, kept);
    for (const LoopOutput& view : loops.outputs_) put_strides(parameters, view, kept);
    put_load_strides(parameters, launch, shape, loops, summed);
    for (std::size_t i = sums; i < loops.outputs_.size(); ++i) put_strides(parameters, loops.outputs_[i], summed);
    put_strides(parameters, LoopView{}, summed);
    launch.parameters = parameters.take();
    count_traffic(loops, &launch.bytes_read, &launch.bytes_written);
    if (partial) launch.bytes_written += sums * (used - 1) * kept.elements * fused::size_in_bytes(Dtype::f64);
    add(program, shape, std::move(launch), blocks, used);
    if (partial) add_pieces(loops, targets, kept, used);
  }

  // Neighbouring threads read neighbouring elements in either layout; more lanes share a sum while threads are few.
  int choose_lanes(bool rows, std::int64_t kept_groups, std::int64_t steps) const {
    constexpr std::int64_t kWarp = 32, kWorthSharing = 8;
    const std::int64_t wanted = threads_wanted();
    const auto up_to = [](std::int64_t value, std::int64_t most) {
      return static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(std::min(value, most))));
    };
    if (rows) {
      int lanes = up_to(steps, kWarp);
      while (lanes < kBlockThreads && kept_groups * lanes < wanted && steps / lanes >= kWorthSharing) lanes *= 2;
      return lanes;
    }
    int across = up_to(kept_groups, kBlockThreads);
    while (across > kWarp && kept_groups * (kBlockThreads / across) < wanted &&
           steps / (kBlockThreads / across) >= kWorthSharing) {
      across /= 2;
    }
    return std::min(kBlockThreads / across, up_to(steps, kBlockThreads));
  }

  std::int64_t choose_pieces(std::int64_t blocks, std::int64_t steps, int lanes) const {
    const std::int64_t pieces = std::min({threads_wanted() / kBlockThreads / blocks,
                                          steps / (static_cast<std::int64_t>(lanes) * limits_.iterations_per_lane), kMostPieces});
    return pieces < kFewestPieces ? 1 : pieces;
  }

  std::int64_t threads_wanted() const {
    return static_cast<std::int64_t>(limits_.multiprocessors) * limits_.threads_per_multiprocessor;
  }

  // Sends an output's sums to the end of the workspace, as [piece][kept element] in double.
  void partial_sums(LoopOutput& view, const GpuLoops& loops, const SomeLoops& kept, std::int64_t pieces) {
    view.data = reinterpret_cast<char*>(plan_.workspace_bytes);
    view.dtype = Dtype::f64;
    view.bytes = fused::size_in_bytes(view.dtype);
    view.accumulate = false;
    std::int64_t stride = 1;
    for (auto k = kept.loops.rbegin(); k != kept.loops.rend(); ++k) {
      view.strides[*k] = stride;
      stride *= loops.extents_[*k];
    }
    reserve(pieces * stride * view.bytes);
  }

  // The second pass of a sum: a program that adds the pieces, over the loops (piece, kept loops ...).
  void add_pieces(const GpuLoops& loops, std::span<const LoopOutput> targets, const SomeLoops& kept, std::int64_t pieces) {
    const std::size_t rank = kept.loops.size() + 1;
    const std::string count = std::to_string(targets.size());
    std::string text = "fused v1 rank=" + std::to_string(rank) + " operands=" + count + " compute=f64\n";
    std::vector<std::int64_t> extents{pieces}, sources{kept.elements};
    for (int k : kept.loops) {
      extents.push_back(loops.extents_[k]);
      sources.push_back(loops.outputs_.front().strides[k]);
    }
    std::vector<OperandView> operands;
    std::vector<OutputView> outputs;
    std::vector<std::int64_t> strides;
    for (const LoopOutput& target : targets) {
      strides.push_back(0);
      for (int k : kept.loops) strides.push_back(target.strides[k]);
    }
    for (std::size_t i = 0; i < targets.size(); ++i) {
      text += "out a" + std::to_string(i) + " " + fused::name(targets[i].dtype) + " sum=0\n";
      operands.push_back({loops.outputs_[i].data, Dtype::f64, sources.data()});
      outputs.push_back({targets[i].data, targets[i].dtype, strides.data() + i * rank, targets[i].accumulate});
    }
    pass(*fused::intern(text), extents, operands, outputs, Workspace::read);
  }

  // Whether the operands' addresses and strides, one for each of `rank` loops, do not fit the parameters beside everything else.
  static bool goes_to_memory(const GpuLoops& loops, const KernelShape& shape, int rank, Workspace workspace) {
    constexpr std::size_t kOthers = 64;
    if (!shape.streamed || workspace == Workspace::read) return false;  // addresses in the workspace are known at launch
    const std::size_t views = loops.operands_.size() + loops.outputs_.size(), index = shape.wide_index ? 8 : 4;
    const std::size_t extents = rank * (sizeof(Divisor<std::int64_t>) + sizeof(std::int64_t));
    return views * (8 + rank * index) + extents + kOthers > kParameterBytes;
  }

  void put_pointers(Parameters& parameters, Launch& launch, const KernelShape& shape, const GpuLoops& loops,
                    Workspace workspace) {
    if (loops.operands_.empty()) parameters.pointer(nullptr);
    put_table(parameters, launch, shape, [&](Parameters& table) {
      for (const LoopView& view : loops.operands_) {
        std::uint64_t word = reinterpret_cast<std::uint64_t>(view.data);
        if (view.in_host_memory) {
          word = 0;
          std::memcpy(&word, view.data, static_cast<std::size_t>(view.bytes));
        }
        const std::size_t position = table.put(word);
        if (workspace == Workspace::read) launch.workspace_pointers.push_back(position);
      }
    });
    for (const LoopOutput& view : loops.outputs_) {
      const std::size_t position = parameters.pointer(view.data);
      if (workspace == Workspace::written && view.reduced != 0) launch.workspace_pointers.push_back(position);
    }
  }

  // Arrays of no elements do not exist, so a program without operands has one that nobody reads.
  void put_load_strides(Parameters& parameters, Launch& launch, const KernelShape& shape, const GpuLoops& loops,
                        const SomeLoops& some) {
    if (loops.operands_.empty()) put_strides(parameters, LoopView{}, some);
    put_table(parameters, launch, shape, [&](Parameters& table) {
      for (const LoopView& view : loops.operands_) put_strides(table, view, some);
    });
  }

  // An array of the parameters, or the address of one at the end of the workspace.
  template <class Put>
  void put_table(Parameters& parameters, Launch& launch, const KernelShape& shape, const Put& put) {
    if (!shape.in_memory) return put(parameters);
    Parameters array(shape.wide_index);
    put(array);
    const std::vector<char> bytes = array.take();
    launch.workspace_pointers.push_back(
        parameters.pointer(reinterpret_cast<const void*>(plan_.workspace_bytes + static_cast<std::int64_t>(tables_.size()))));
    tables_.insert(tables_.end(), bytes.begin(), bytes.end());
  }

  // Launches that write the arrays of put_table to the workspace.
  void write_tables() {
    using fused::TablePiece;
    constexpr std::size_t kPieceBytes = sizeof(TablePiece::data);
    for (std::size_t at = 0; at < tables_.size(); at += kPieceBytes) {
      const std::size_t count = std::min(kPieceBytes, tables_.size() - at);
      TablePiece piece{.target = reinterpret_cast<std::uint64_t*>(plan_.workspace_bytes + at), .words = count / 8, .data = {}};
      std::memcpy(piece.data, tables_.data() + at, count);
      Launch launch{.kernel = table_kernel()};
      launch.grid = {static_cast<unsigned>(divide_up(static_cast<std::int64_t>(piece.words), kBlockThreads)), 1, 1};
      launch.block = {static_cast<unsigned>(kBlockThreads), 1, 1};
      launch.parameters.resize(sizeof piece);
      std::memcpy(launch.parameters.data(), &piece, sizeof piece);
      launch.workspace_pointers = {offsetof(TablePiece, target)};
      launch.bytes_written = static_cast<std::int64_t>(count);
      plan_.launches.push_back(std::move(launch));
    }
    reserve(static_cast<std::int64_t>(tables_.size()));
    tables_.clear();
  }

  void reserve(std::int64_t bytes) { plan_.workspace_bytes += divide_up(bytes, kWorkspaceAlignment) * kWorkspaceAlignment; }

  void add(const fused::Program& program, const KernelShape& shape, Launch launch, std::int64_t blocks, std::int64_t pieces) {
    if (launch.parameters.size() > kParameterBytes) throw std::length_error("wengert: too many outputs for one CUDA kernel");
    if (blocks > std::numeric_limits<std::int32_t>::max())
      throw std::length_error("wengert: too many elements for one CUDA kernel");
    write_tables();
    launch.kernel = kernel_for(program, shape);
    launch.grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(pieces), 1};
    launch.block = {static_cast<unsigned>(kBlockThreads), 1, 1};
    plan_.launches.push_back(std::move(launch));
  }

  const Limits& limits_;
  Plan& plan_;
  std::vector<char> tables_;  // of the pass at hand
};

// Program `program` with some of its outputs.
std::shared_ptr<const fused::Program> subprogram(const fused::Program& program, std::span<const std::size_t> outputs) {
  fused::ProgramSpec spec = program.spec();
  spec.outputs.clear();
  for (std::size_t i : outputs) spec.outputs.push_back(program.outputs()[i]);
  return fused::intern(fused::to_text(program.pool(), spec));
}

// A program that stores 0 in outputs of these types.
std::shared_ptr<const fused::Program> zero_program(std::size_t rank, std::span<const OutputView> outputs) {
  std::string text = "fused v1 rank=" + std::to_string(rank) + " operands=0 compute=f32\n";
  for (const OutputView& output : outputs) text += std::string("out 0 ") + fused::name(output.dtype) + "\n";
  return fused::intern(text);
}

}  // namespace

std::size_t kernel_bytes() {
  std::lock_guard lock(kernels().mutex);
  return kernels().known.bytes();
}

void forget_kernels() {
  std::lock_guard lock(kernels().mutex);
  kernels().known.clear();
}

std::vector<char> Launch::parameters_at(const void* workspace) const {
  std::vector<char> bytes = parameters;
  for (std::size_t position : workspace_pointers) {
    std::uint64_t address;
    std::memcpy(&address, bytes.data() + position, sizeof address);
    address += reinterpret_cast<std::uintptr_t>(workspace);
    std::memcpy(bytes.data() + position, &address, sizeof address);
  }
  return bytes;
}

Plan plan(const fused::Program& program, std::span<const std::int64_t> extents, std::span<const OperandView> operands,
          std::span<const OutputView> outputs, const Limits& limits) {
  Plan plan;
  Planner planner(limits, plan);
  std::uint32_t longer = 0;  // axes of more than one iteration: a sum over a single one is that one
  bool empty = false;
  for (std::size_t k = 0; k < extents.size(); ++k) {
    if (extents[k] != 1) longer |= std::uint32_t{1} << k;
    empty = empty || extents[k] == 0;
  }
  std::vector<std::uint32_t> reduced;  // of each output
  for (const fused::OutputSpec& output : program.outputs()) reduced.push_back(output.reduced & longer);
  std::vector<std::uint32_t> sets;  // that some outputs are summed over
  for (std::uint32_t set : reduced) {
    if (set != 0 && std::find(sets.begin(), sets.end(), set) == sets.end()) sets.push_back(set);
  }
  if (sets.empty() && !empty) sets.push_back(0);
  for (std::uint32_t set : sets) {
    std::vector<std::size_t> members;
    std::vector<OutputView> views;
    auto take = [&](std::uint32_t wanted) {
      for (std::size_t i = 0; i < outputs.size(); ++i) {
        if (reduced[i] != wanted || (empty && outputs[i].accumulate)) continue;  // a sum over nothing adds nothing
        members.push_back(i);
        views.push_back(outputs[i]);
      }
    };
    take(set);
    // Outputs that are not summed are stored by the first of the passes, which computes their values anyway.
    if (set != 0 && set == sets.front() && !empty) take(0);
    if (empty) {
      std::vector<std::int64_t> kept(extents.begin(), extents.end());
      std::int64_t elements = 1;
      for (std::size_t k = 0; k < kept.size(); ++k) elements *= set >> k & 1 ? kept[k] = 1 : kept[k];
      if (elements > 0 && !views.empty()) planner.pass(*zero_program(kept.size(), views), kept, {}, views, Workspace::unused);
    } else if (members.size() == outputs.size() && std::is_sorted(members.begin(), members.end())) {
      planner.pass(program, extents, operands, views, Workspace::unused);
    } else {
      planner.pass(*subprogram(program, members), extents, operands, views, Workspace::unused);
    }
  }
  if (!empty) {
    GpuLoops loops;
    loops.collect(program, extents, operands, outputs);
    std::int64_t read = 0, written = 0;
    count_traffic(loops, &read, &written);
    plan.minimum_bytes = read + written;
  } else {
    plan.minimum_bytes = plan.bytes();
  }
  return plan;
}

}  // namespace wengert::kernels::cuda
