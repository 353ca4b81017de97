// The frame of generated kernels; included by generated source (cuda_source.h), so it is device code throughout.
//
// Generated source describes one nest:
//   struct Nest {
//     using Compute, Index;
//     kLoads, kOutputs (at least 1: arrays of no elements do not exist), kRank, kReducedRank (loops, at least 1)
//     kWidth   neighbours along the innermost loop that a thread takes together: one memory access of up to 16 bytes a view
//     kTail    the last of these groups may be incomplete
//     kUnroll  groups a thread takes at once, so that enough loads are on their way
//     kSums    outputs that are summed: the first ones.  The others are stored element by element
//     kStreamed  whether there is `stream` in place of `load` and `evaluate`
//     kInMemory  whether operands' addresses and strides lie in memory, for being too many for the kernel's parameters
//     load(lanes, bases, offsets, count), evaluate(operands, results): all operands first, so that the loads of all groups are
//              on their way together; a thread holds all of them
//     stream(operands, results): every operand right before its first use, so that a program may have many
//     store_elements(bases, offsets, lanes, count), store_sums(bases, offsets, strides, lanes)
//   };
// and defines its kernel as map<Nest> or sum<Nest, rows>.
#pragma once
#include "fused/kernel_abi.h"
#include "fused/primitive_ops.h"
#include "fused/special_functions.h"
#include "fused/storage.h"

#define WENGERT_DEVICE __device__ __forceinline__

namespace wengert::fused {

// The types that memory instructions move.
template <int Bytes>
struct Chunk;
template <>
struct Chunk<1> {
  using type = unsigned char;
};
template <>
struct Chunk<2> {
  using type = unsigned short;
};
template <>
struct Chunk<4> {
  using type = unsigned int;
};
template <>
struct Chunk<8> {
  using type = uint2;
};
template <>
struct Chunk<16> {
  using type = uint4;
};

template <class S, int N>
struct Group {
  using Bits = typename Chunk<static_cast<int>(sizeof(S)) * N>::type;
  S items[N];

  // Operands are not written to while a kernel runs, so they may come through the read-only path.
  WENGERT_DEVICE static Group read_operand(const S* source) {
    const Bits bits = __ldg(reinterpret_cast<const Bits*>(source));
    Group group;
    memcpy(&group, &bits, sizeof bits);
    return group;
  }
  WENGERT_DEVICE static Group read(const S* source) {
    const Bits bits = *reinterpret_cast<const Bits*>(source);
    Group group;
    memcpy(&group, &bits, sizeof bits);
    return group;
  }
  WENGERT_DEVICE void write(S* target) const {
    Bits bits;
    memcpy(&bits, this, sizeof bits);
    *reinterpret_cast<Bits*>(target) = bits;
  }
};

// Column k of lanes = the elements from `offset` on; one for all lanes where the view does not move along the innermost loop.
template <class S, bool Moves, class T, int Width, int Columns, class Index>
WENGERT_DEVICE void load_lanes(T (&lanes)[Width][Columns], int k, const void* base, Index offset, int count) {
  const S* source = static_cast<const S*>(base) + offset;
  if constexpr (!Moves) {  // its element may be wider than the group's memory access
    const T value = widen<T>(Group<S, 1>::read_operand(source).items[0]);
    for (int w = 0; w < Width; ++w) lanes[w][k] = value;
  } else if (count == Width) {
    const Group<S, Width> group = Group<S, Width>::read_operand(source);
    for (int w = 0; w < Width; ++w) lanes[w][k] = widen<T>(group.items[w]);
  } else {
    for (int w = 0; w < Width; ++w) lanes[w][k] = w < count ? widen<T>(Group<S, 1>::read_operand(source + w).items[0]) : T(0);
  }
}

// The element lies in the parameter, in the place of its address.
template <class S, class T, int Width, int Columns>
WENGERT_DEVICE void load_immediate(T (&lanes)[Width][Columns], int k, const void* const* base) {
  const T value = widen<T>(*reinterpret_cast<const S*>(base));
  for (int w = 0; w < Width; ++w) lanes[w][k] = value;
}

// What a program that is streamed reads from: operand k lies at bases[k], offset_of(k) elements on.
template <class OffsetOf>
struct Operands {
  const void* const* bases;
  OffsetOf offset_of;
  int count;  // of the group's elements
};

// The value of each of a group's elements.
template <class T, int Width>
struct Lanes {
  T at[Width][1];
};

template <class S, bool Moves, class From, class T, int Width>
WENGERT_DEVICE void read(const From& from, int k, Lanes<T, Width>& lanes) {
  load_lanes<S, Moves>(lanes.at, 0, from.bases[k], from.offset_of(k), from.count);
}
template <class S, class From, class T, int Width>
WENGERT_DEVICE void read_immediate(const From& from, int k, Lanes<T, Width>& lanes) {
  load_immediate<S>(lanes.at, 0, from.bases + k);
}

template <class S, bool Accumulate, class T>
WENGERT_DEVICE S stored(S before, T value) {
  return Narrow<S>::from(Accumulate ? widen<T>(before) + value : value);
}

// Stores column k of lanes; `Dense`: the elements are neighbours, and their address is aligned to the group's size.
template <class S, bool Accumulate, bool Dense, class T, int Width, int Columns, class Index, class Stride>
WENGERT_DEVICE void store_lanes(void* base, Index offset, Stride stride, const T (&lanes)[Width][Columns], int k, int count) {
  S* target = static_cast<S*>(base) + offset;
  if constexpr (Dense) {
    if (count == Width) {
      Group<S, Width> group{};
      if (Accumulate) group = Group<S, Width>::read(target);
      for (int w = 0; w < Width; ++w) group.items[w] = stored<S, Accumulate>(group.items[w], lanes[w][k]);
      group.write(target);
      return;
    }
  }
  for (int w = 0; w < Width; ++w) {
    if (w < count) target[w * stride] = stored<S, Accumulate>(Accumulate ? target[w * stride] : S{}, lanes[w][k]);
  }
}

// Where iteration `index` of a nest of loops is along each of them.
template <int Rank, class Index>
struct Positions {
  Index at[Rank];

  WENGERT_DEVICE Positions(Index index, const Divisor<Index> (&extents)[Rank]) {
#pragma unroll
    for (int k = Rank - 1; k > 0; --k) {
      const Index quotient = extents[k].quotient(index);
      at[k] = index - quotient * extents[k].divisor;
      index = quotient;
    }
    at[0] = index;
  }
  WENGERT_DEVICE Index offset(const Index (&strides)[Rank]) const {
    Index sum = 0;
#pragma unroll
    for (int k = 0; k < Rank; ++k) sum += at[k] * strides[k];
    return sum;
  }
};

// Adds where iteration `index` of a nest of loops lies to the offsets of some views.
template <int Views, int Rank, class Index>
WENGERT_DEVICE void advance(Index (&offsets)[Views], Index index, const Divisor<Index> (&extents)[Rank],
                            const Index (&strides)[Views][Rank]) {
  const Positions<Rank, Index> positions(index, extents);
#pragma unroll
  for (int v = 0; v < Views; ++v) offsets[v] += positions.offset(strides[v]);
}

template <class Nest, class Index>
WENGERT_DEVICE int elements_of_group(Index first, Index end) {
  if (!Nest::kTail || end - first >= Nest::kWidth) return Nest::kWidth;
  return static_cast<int>(end - first);
}

// ------------------------------------------------------------------------------------------------------- tables of operands
// An array of the parameters, or where one lies in memory.
template <class T, int Count, bool InMemory>
struct TableOf {
  using type = T[Count];
};
template <class T, int Count>
struct TableOf<T, Count, true> {
  using type = const T*;
};
template <class Nest, class T>
using Table = typename TableOf<T, Nest::kLoads, Nest::kInMemory>::type;

WENGERT_DEVICE void write_table(const TablePiece& p) {
  const unsigned word = blockIdx.x * kBlockThreads + threadIdx.x;
  if (word < p.words) p.target[word] = p.data[word];
}

// --------------------------------------------------------------------------------------------------------- outputs without sums
// Parameter structs are filled by kernels/cuda/launch_plan.cpp field by field, in this order and with natural alignment.
template <class Nest>
struct MapParameters {
  using Index = typename Nest::Index;
  Table<Nest, const void*> loads;
  void* outputs[Nest::kOutputs];
  Index elements;
  Divisor<Index> extents[Nest::kRank];  // outer to inner, as the strides
  Table<Nest, Index[Nest::kRank]> load_strides;
  Index output_strides[Nest::kOutputs][Nest::kRank];
};

template <class Nest>
WENGERT_DEVICE void map_streamed(const MapParameters<Nest>& p) {
  using Index = typename Nest::Index;
  const Index at = (static_cast<Index>(blockIdx.x) * kBlockThreads + static_cast<Index>(threadIdx.x)) * Nest::kWidth;
  if (at >= p.elements) return;
  const Positions<Nest::kRank, Index> positions(at, p.extents);
  const int count = elements_of_group<Nest>(at, p.elements);
  typename Nest::Compute out[Nest::kWidth][Nest::kOutputs];
  const Index(*strides)[Nest::kRank] = p.load_strides;
  const auto offset_of = [=](int k) { return positions.offset(strides[k]); };
  Nest::stream(Operands<decltype(offset_of)>{p.loads, offset_of, count}, out);
  Index targets[Nest::kOutputs];
#pragma unroll
  for (int o = 0; o < Nest::kOutputs; ++o) targets[o] = positions.offset(p.output_strides[o]);
  Nest::store_elements(p.outputs, targets, out, count);
}

template <class Nest>
WENGERT_DEVICE void map(const MapParameters<Nest>& p) {
  using Index = typename Nest::Index;
  using Compute = typename Nest::Compute;
  constexpr int kWidth = Nest::kWidth, kUnroll = Nest::kUnroll;
  const Index first = (static_cast<Index>(blockIdx.x) * (kBlockThreads * kUnroll) + static_cast<Index>(threadIdx.x)) * kWidth;
  Compute in[kUnroll][kWidth][Nest::kLoads];
  Index targets[kUnroll][Nest::kOutputs];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Index at = first + u * (kBlockThreads * kWidth);
    if (at < p.elements) {
      Index sources[Nest::kLoads] = {};
      advance(sources, at, p.extents, p.load_strides);
      for (int o = 0; o < Nest::kOutputs; ++o) targets[u][o] = 0;
      advance(targets[u], at, p.extents, p.output_strides);
      Nest::load(in[u], p.loads, sources, elements_of_group<Nest>(at, p.elements));
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Index at = first + u * (kBlockThreads * kWidth);
    if (at >= p.elements) return;
    Compute out[kWidth][Nest::kOutputs];
#pragma unroll
    for (int w = 0; w < kWidth; ++w) Nest::evaluate(in[u][w], out[w]);
    Nest::store_elements(p.outputs, targets[u], out, elements_of_group<Nest>(at, p.elements));
  }
}

// ------------------------------------------------------------------------------------------------------------------------ sums
// NOTE [Sums on the device]
// `lanes` threads of a block (a power of two) share a kept element, or kWidth of them, and kBlockThreads / lanes such groups make
// a block.  Rows: the innermost loop is summed over, so a group's lanes are neighbours in the block and read neighbours in
// memory. Columns: the innermost loop is kept, so neighbours in the block are neighbouring kept elements.  Where that gives too
// few threads, pieces of the summed range go to different blocks (blockIdx.y), which leave partial sums that a second launch
// adds. Every order is fixed by the launch, so results have the same bits each time.  Sums are carried in double, as on the CPU.
template <class Nest>
struct SumParameters {
  using Index = typename Nest::Index;
  Table<Nest, const void*> loads;
  void* outputs[Nest::kOutputs];
  Index kept_elements, reduced_elements;
  Index piece;         // of the summed range, a block's
  Index piece_stride;  // elements between the partial sums of two pieces
  std::int32_t lanes;
  Divisor<Index> kept_extents[Nest::kRank];
  Divisor<Index> reduced_extents[Nest::kReducedRank];
  Table<Nest, Index[Nest::kRank]> load_strides;
  Index output_strides[Nest::kOutputs][Nest::kRank];
  Table<Nest, Index[Nest::kReducedRank]> reduced_load_strides;
  Index reduced_element_strides[Nest::kOutputs - Nest::kSums + 1]
                               [Nest::kReducedRank];  // of outputs that are not summed; and none
};

// Adds up a number of each of a group's lanes; lane 0 holds the result.  All threads of the block come here.
template <bool Rows>
WENGERT_DEVICE double add_lanes(double sum, int lanes) {
  __shared__ double shared[kBlockThreads];
  if (lanes == 1) return sum;
  const int thread = static_cast<int>(threadIdx.x);
  if (Rows) {
    for (int step = lanes < 32 ? lanes / 2 : 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (lanes <= 32) return sum;
    if (thread % 32 == 0) shared[thread / 32] = sum;
    __syncthreads();
    if (thread % lanes == 0) {
      for (int warp = 1; warp < lanes / 32; ++warp) sum += shared[thread / 32 + warp];
    }
  } else {
    shared[thread] = sum;
    for (int half = kBlockThreads / 2; half * lanes >= kBlockThreads; half /= 2) {
      __syncthreads();
      if (thread < half) shared[thread] += shared[thread + half];
    }
    sum = shared[thread];
  }
  __syncthreads();  // before the next sum takes the shared memory
  return sum;
}

template <class Nest, bool Rows>
WENGERT_DEVICE void sum(const SumParameters<Nest>& p) {
  using Index = typename Nest::Index;
  using Compute = typename Nest::Compute;
  constexpr int kWidth = Nest::kWidth, kSums = Nest::kSums, kElements = Nest::kOutputs - kSums;
  constexpr int kKeptWidth = Rows ? 1 : kWidth, kReducedWidth = Rows ? kWidth : 1;
  const int thread = static_cast<int>(threadIdx.x), groups = kBlockThreads / p.lanes;
  const int lane = Rows ? thread % p.lanes : thread / groups;
  const int group = Rows ? thread / p.lanes : thread % groups;
  const Index kept = (static_cast<Index>(blockIdx.x) * groups + group) * kKeptWidth;
  double sums[kWidth][kSums] = {};
  Index targets[Nest::kOutputs] = {};
  if (kept < p.kept_elements) {
    const Positions<Nest::kRank, Index> place(kept, p.kept_extents);
    Index bases[Nest::kLoads];
    if constexpr (!Nest::kStreamed) {
#pragma unroll
      for (int i = 0; i < Nest::kLoads; ++i) bases[i] = place.offset(p.load_strides[i]);
    }
#pragma unroll
    for (int o = 0; o < Nest::kOutputs; ++o) targets[o] = place.offset(p.output_strides[o]);
    const Index begin = static_cast<Index>(blockIdx.y) * p.piece;
    const Index end = p.reduced_elements - begin < p.piece ? p.reduced_elements : begin + p.piece;
#pragma unroll Nest::kUnroll
    for (Index r = begin + lane * kReducedWidth; r < end; r += p.lanes * kReducedWidth) {
      const int count = Rows ? elements_of_group<Nest>(r, end) : kWidth;
      const Positions<Nest::kReducedRank, Index> step(r, p.reduced_extents);
      Compute out[kWidth][Nest::kOutputs];
      if constexpr (Nest::kStreamed) {
        const Index(*strides)[Nest::kRank] = p.load_strides;
        const Index(*reduced_strides)[Nest::kReducedRank] = p.reduced_load_strides;
        const auto offset_of = [=](int k) { return place.offset(strides[k]) + step.offset(reduced_strides[k]); };
        Nest::stream(Operands<decltype(offset_of)>{p.loads, offset_of, count}, out);
      } else {
        Index sources[Nest::kLoads];
#pragma unroll
        for (int i = 0; i < Nest::kLoads; ++i) sources[i] = bases[i] + step.offset(p.reduced_load_strides[i]);
        Compute in[kWidth][Nest::kLoads];
        Nest::load(in, p.loads, sources, count);
#pragma unroll
        for (int w = 0; w < kWidth; ++w) Nest::evaluate(in[w], out[w]);
      }
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        for (int o = 0; o < kSums; ++o) sums[w][o] += w < count ? static_cast<double>(out[w][o]) : 0.0;
      }
      if constexpr (kElements > 0) {
        Index elements[kElements];
#pragma unroll
        for (int o = 0; o < kElements; ++o) elements[o] = targets[kSums + o] + step.offset(p.reduced_element_strides[o]);
        Nest::store_elements(p.outputs, elements, out, count);
      }
    }
  }
  double totals[kKeptWidth][kSums];
#pragma unroll
  for (int o = 0; o < kSums; ++o) {
    if (Rows) {
      for (int w = 1; w < kWidth; ++w) sums[0][o] += sums[w][o];
    }
#pragma unroll
    for (int w = 0; w < kKeptWidth; ++w) totals[w][o] = add_lanes<Rows>(sums[w][o], p.lanes);
  }
  if (lane != 0 || kept >= p.kept_elements) return;
  Index strides[kSums];
  for (int o = 0; o < kSums; ++o) {
    targets[o] += static_cast<Index>(blockIdx.y) * p.piece_stride;
    strides[o] = p.output_strides[o][Nest::kRank - 1];
  }
  Nest::store_sums(p.outputs, targets, strides, totals);
}

}  // namespace wengert::fused
