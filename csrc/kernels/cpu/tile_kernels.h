// The functions of a Backend (backend.h) for the instruction set of the including file, which defines WENGERT_SIMD_NAMESPACE,
// WENGERT_VECTOR_BYTES and, where Sleef has it, WENGERT_SLEEF_F32/F64 (Sleef's name for the vector types).
#include "fused/primitive_ops.h"
#include "fused/storage.h"
#include "kernels/cpu/backend.h"
#include "kernels/cpu/simd.h"

namespace wengert::kernels::WENGERT_SIMD_NAMESPACE {
namespace {

using fused::Bf16;
using fused::Bool;
using fused::Dtype;
using fused::F16;
using fused::Narrow;
using fused::Prim;
using fused::widen;

// ------------------------------------------------------------------------------------------------------------------ primitives
// An instruction or two a vector: there a loop's own bookkeeping costs as much, so it is unrolled, for each pattern of arguments.
template <class Op, Prim... P>
constexpr bool kOneOf = (std::is_same_v<Op, fused::prim::Op<P>> || ...);
template <class Op>
constexpr bool kCheap =
    kOneOf<Op, Prim::add, Prim::sub, Prim::mul, Prim::div, Prim::neg, Prim::abs, Prim::square, Prim::reciprocal, Prim::sqrt,
           Prim::relu, Prim::lt, Prim::le, Prim::gt, Prim::ge, Prim::eq, Prim::ne>;

template <class T, class Op, int... K>
struct TileKernel {
  template <unsigned Varying>
  static void sweep(T* out, const T* const* in, int n) {
    constexpr int kLanes = Vec<T>::kLanes;
    const Vec<T> fixed[] = {Vec<T>::load(in[K])...};
#pragma GCC unroll 4
    for (int i = 0; i < n; i += kLanes) Op::value((Varying >> K & 1 ? Vec<T>::load(in[K] + i) : fixed[K])...).store(out + i);
  }

  static void run(void* result, const void* const* args, unsigned varying, int n) {
    constexpr int kLanes = Vec<T>::kLanes;
    if constexpr (kCheap<Op>) {
      const T* in[] = {static_cast<const T*>(args[K])...};
      constexpr unsigned kAll = (1u << sizeof...(K)) - 1;
      if (varying == kAll) return sweep<kAll>(static_cast<T*>(result), in, n);
      if (varying == 1) return sweep<1>(static_cast<T*>(result), in, n);
      if (varying == 2) return sweep<(kAll & 2)>(static_cast<T*>(result), in, n);
    }
    T* out = static_cast<T*>(result);
    const T* in[] = {static_cast<const T*>(args[K])...};
    const std::ptrdiff_t step[] = {(varying >> K & 1 ? kLanes : 0)...};
    for (int i = 0; i < n; i += kLanes) {
      Op::value(Vec<T>::load(in[K])...).store(out + i);
      ((in[K] += step[K]), ...);
    }
  }
};
template <class T, class Op>
constexpr Kernel kernel_for() {
  if constexpr (Op::kArity == 1) return TileKernel<T, Op, 0>::run;
  if constexpr (Op::kArity == 2) return TileKernel<T, Op, 0, 1>::run;
  if constexpr (Op::kArity == 3) return TileKernel<T, Op, 0, 1, 2>::run;
  if constexpr (Op::kArity == 4) return TileKernel<T, Op, 0, 1, 2, 3>::run;
}

// ----------------------------------------------------------------------------------------------------------- element conversion
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
// -O2 does not vectorise these loops; memcpy would use longer vectors (see NOTE [Two vector lengths])
#pragma GCC optimize("O3", "no-tree-loop-distribute-patterns")
#endif
constexpr int kFewColumns = 8;  // shorter rows are walked column by column

template <class T, class S>
struct Convert {
  static void load(void* tile, const void* source, Rows at) {
    T* out = static_cast<T*>(tile);
    const S* in = static_cast<const S*>(source);
    if (at.rows > 1 && at.n < kFewColumns) {
      for (int k = 0; k < at.n; ++k, in += at.stride, ++out) load_strided(out, at.n, in, at.step, at.rows);
      return;
    }
    for (int r = 0; r < at.rows; ++r, in += at.step, out += at.n) {
      if (at.stride == 1) {
        for (int i = 0; i < at.n; ++i) out[i] = widen<T>(in[i]);
      } else if (at.stride == 0) {
        const T value = widen<T>(in[0]);
        for (int i = 0; i < at.n; ++i) out[i] = value;
      } else {
        load_strided(out, 1, in, at.stride, at.n);
      }
    }
  }
  static void store(void* target, const void* tile, Rows at, bool accumulate) {
    S* out = static_cast<S*>(target);
    const T* in = static_cast<const T*>(tile);
    if (at.rows > 1 && at.n < kFewColumns) {
      for (int k = 0; k < at.n; ++k, out += at.stride, ++in) store_strided(out, at.step, in, at.n, at.rows, accumulate);
      return;
    }
    for (int r = 0; r < at.rows; ++r, out += at.step, in += at.n) {
      if (at.stride != 1) {
        store_strided(out, at.stride, in, 1, at.n, accumulate);
      } else if (accumulate) {
        for (int i = 0; i < at.n; ++i) out[i] = Narrow<S>::from(widen<T>(out[i]) + in[i]);
      } else {
        for (int i = 0; i < at.n; ++i) out[i] = Narrow<S>::from(in[i]);
      }
    }
  }

 private:
  static void load_strided(T* out, int step, const S* in, std::int64_t stride, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4, in += 4 * stride, out += 4 * step) {
      out[0] = widen<T>(in[0]);
      out[step] = widen<T>(in[stride]);
      out[2 * step] = widen<T>(in[2 * stride]);
      out[3 * step] = widen<T>(in[3 * stride]);
    }
    for (; i < n; ++i, in += stride, out += step) *out = widen<T>(*in);
  }
  static void store_strided(S* out, std::int64_t stride, const T* in, int step, int n, bool accumulate) {
    if (accumulate) {
      for (int i = 0; i < n; ++i, out += stride, in += step) *out = Narrow<S>::from(widen<T>(*out) + *in);
      return;
    }
    int i = 0;
    for (; i + 4 <= n; i += 4, out += 4 * stride, in += 4 * step) {
      out[0] = Narrow<S>::from(in[0]);
      out[stride] = Narrow<S>::from(in[step]);
      out[2 * stride] = Narrow<S>::from(in[2 * step]);
      out[3 * stride] = Narrow<S>::from(in[3 * step]);
    }
    for (; i < n; ++i, out += stride, in += step) *out = Narrow<S>::from(*in);
  }
};

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// ------------------------------------------------------------------------------------------------------------------- reductions
// Sums are carried in double: a tile into as many partial sums as a vector has lanes, then across.
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef double UnalignedDoubles __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
constexpr int kDoubles = kVectorBytes / 8;

WENGERT_HD Doubles wide_load(const double* p) { return *reinterpret_cast<const UnalignedDoubles*>(p); }
WENGERT_HD Doubles wide_load(const float* p) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Doubles);
}

WENGERT_HD double across(Doubles a) {
  for (int half = kDoubles / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) a[k] += a[k + half];
  }
  return a[0];
}

template <class T>
double sum_tile(const void* tile, int n) {
  const T* in = static_cast<const T*>(tile);
  Doubles a{}, b{}, c{}, d{};  // an addition takes three or four cycles
  int i = 0;
  for (; i + 4 * kDoubles <= n; i += 4 * kDoubles) {
    a += wide_load(in + i);
    b += wide_load(in + i + kDoubles);
    c += wide_load(in + i + 2 * kDoubles);
    d += wide_load(in + i + 3 * kDoubles);
  }
  for (; i + kDoubles <= n; i += kDoubles) a += wide_load(in + i);
  double total = 0;
  for (; i < n; ++i) total += in[i];
  return total + across((a + b) + (c + d));
}

constexpr int kFarRow = 1024;

template <class T>
void add_tile(double* sums, const void* tile, int n) {
  const T* in = static_cast<const T*>(tile);
  int i = 0;
  if (n >= kFarRow) {  // read in place, and other rows come before the continuation of this one: the hardware loses track of it
    for (; i + 64 <= n; i += 64) {
      for (int k = 0; k < 64; k += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(in + n + i + k, 0, 2);
      for (int k = i; k < i + 64; k += kDoubles) {
        *reinterpret_cast<UnalignedDoubles*>(sums + k) = wide_load(sums + k) + wide_load(in + k);
      }
    }
  }
  for (; i + kDoubles <= n; i += kDoubles) {
    *reinterpret_cast<UnalignedDoubles*>(sums + i) = wide_load(sums + i) + wide_load(in + i);
  }
  for (; i < n; ++i) sums[i] += in[i];
}

template <class T>
void sum_rows(double* sums, const void* tile, int rows, int length) {
  const T* in = static_cast<const T*>(tile);
  if (length < kDoubles) {
    for (int r = 0; r < rows; ++r) {
      double total = 0;
      for (int i = 0; i < length; ++i) total += *in++;
      sums[r] += total;
    }
    return;
  }
  for (int r = 0; r < rows; ++r, in += length) sums[r] += sum_tile<T>(in, length);
}

template <class T>
void sum_columns(double* sums, const void* tile, int rows, int length) {
  const T* in = static_cast<const T*>(tile);
  Doubles parts[kMaxColumns] = {};  // lane j of parts[k] belongs to column (k * kDoubles + j) % length
  int r = 0;
  for (; r + kDoubles <= rows; r += kDoubles, in += length * kDoubles) {
    for (int k = 0; k < length; ++k) parts[k] += wide_load(in + k * kDoubles);
  }
  for (int i = 0; i < length * kDoubles; ++i) sums[i % length] += parts[i / kDoubles][i % kDoubles];
  for (; r < rows; ++r) {
    for (int k = 0; k < length; ++k) sums[k] += *in++;
  }
}

}  // namespace

#define WENGERT_ROW(name) kernel_for<T, fused::prim::Op<Prim::name>>(),
#define WENGERT_STORAGE(what)                                                                         \
  {                                                                                                   \
      Convert<T, float>::what,        Convert<T, double>::what,       Convert<T, Bf16>::what,         \
      Convert<T, F16>::what,          Convert<T, std::int64_t>::what, Convert<T, std::int32_t>::what, \
      Convert<T, std::int16_t>::what, Convert<T, std::int8_t>::what,  Convert<T, std::uint8_t>::what, \
      Convert<T, Bool>::what}
namespace {
template <class T>
struct Tables {
  static constexpr Kernel kernels[] = {WENGERT_FOR_EACH_PRIM(WENGERT_ROW)};
  static constexpr Load loads[] = WENGERT_STORAGE(load);
  static constexpr Store stores[] = WENGERT_STORAGE(store);
};

template <class T>
constexpr void fill(Backend& backend, int which) {
  for (int i = 0; i < fused::kPrimCount; ++i) backend.kernels[which][i] = Tables<T>::kernels[i];
  for (int i = 0; i < fused::kDtypeCount; ++i) {
    backend.loads[which][i] = Tables<T>::loads[i];
    backend.stores[which][i] = Tables<T>::stores[i];
  }
  backend.sum[which] = sum_tile<T>;
  backend.add_into[which] = add_tile<T>;
  backend.sum_rows[which] = sum_rows<T>;
  backend.sum_columns[which] = sum_columns<T>;
}

constexpr Backend make_backend(const char* name) {
  Backend backend{};
  backend.name = name;
  backend.vector_bytes = kVectorBytes;
  fill<float>(backend, 0);
  fill<double>(backend, 1);
  return backend;
}
}  // namespace
#undef WENGERT_ROW
#undef WENGERT_STORAGE

}  // namespace wengert::kernels::WENGERT_SIMD_NAMESPACE
