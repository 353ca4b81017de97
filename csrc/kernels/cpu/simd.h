// A SIMD vector of N elements with the operations the primitives are written in.  Included once per instruction set, inside a
// namespace of its own (no code may be shared between objects built for different machines).
// Arithmetic uses the compiler's vector extension; elementary functions come from Sleef where the instruction set has it
// (libtorch exports it), and from libm element by element otherwise.
#ifndef WENGERT_SIMD_NAMESPACE
#error "include from an instruction set's source file"
#endif

#include "common/macros.h"
#include "fused/scalar_math.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace wengert::kernels::WENGERT_SIMD_NAMESPACE {

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = std::int32_t;
};
template <>
struct IntegerOf<double> {
  using type = std::int64_t;
};

inline constexpr int kVectorBytes = WENGERT_VECTOR_BYTES;

template <class T>
struct Vec {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  typedef T Native __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  using Integer = typename IntegerOf<T>::type;
  typedef Integer Mask __attribute__((vector_size(kVectorBytes)));

  Native v;

  Vec() = default;
  WENGERT_HD Vec(Native native) : v(native) {}
  WENGERT_HD explicit Vec(double value) : v(static_cast<T>(value) - Native{}) {}
  WENGERT_HD explicit Vec(float value) : v(static_cast<T>(value) - Native{}) {}
  WENGERT_HD explicit Vec(int value) : v(static_cast<T>(value) - Native{}) {}
  WENGERT_HD static Vec load(const T* p) { return Vec(static_cast<Native>(*reinterpret_cast<const Unaligned*>(p))); }
  WENGERT_HD void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = v; }
};

template <class T>
struct MaskOf {
  typename Vec<T>::Mask m;
};

#define WENGERT_VEC  \
  template <class T> \
  WENGERT_HD
WENGERT_VEC Vec<T> operator+(Vec<T> a, Vec<T> b) { return a.v + b.v; }
WENGERT_VEC Vec<T> operator-(Vec<T> a, Vec<T> b) { return a.v - b.v; }
WENGERT_VEC Vec<T> operator*(Vec<T> a, Vec<T> b) { return a.v * b.v; }
WENGERT_VEC Vec<T> operator/(Vec<T> a, Vec<T> b) { return a.v / b.v; }
WENGERT_VEC Vec<T> operator-(Vec<T> a) { return -a.v; }
WENGERT_VEC MaskOf<T> operator<(Vec<T> a, Vec<T> b) { return {a.v < b.v}; }
WENGERT_VEC MaskOf<T> operator<=(Vec<T> a, Vec<T> b) { return {a.v <= b.v}; }
WENGERT_VEC MaskOf<T> operator>(Vec<T> a, Vec<T> b) { return {a.v > b.v}; }
WENGERT_VEC MaskOf<T> operator>=(Vec<T> a, Vec<T> b) { return {a.v >= b.v}; }
WENGERT_VEC MaskOf<T> operator==(Vec<T> a, Vec<T> b) { return {a.v == b.v}; }
WENGERT_VEC MaskOf<T> operator!=(Vec<T> a, Vec<T> b) { return {a.v != b.v}; }
WENGERT_VEC MaskOf<T> operator&(MaskOf<T> a, MaskOf<T> b) { return {a.m & b.m}; }
WENGERT_VEC MaskOf<T> operator|(MaskOf<T> a, MaskOf<T> b) { return {a.m | b.m}; }
WENGERT_VEC MaskOf<T> operator!=(MaskOf<T> a, MaskOf<T> b) { return {a.m ^ b.m}; }
WENGERT_VEC Vec<T> select(MaskOf<T> c, Vec<T> a, Vec<T> b) { return c.m ? a.v : b.v; }

WENGERT_VEC typename Vec<T>::Mask sign_bits() {
  using Integer = typename Vec<T>::Integer;
  return (Integer{1} << (8 * sizeof(T) - 1)) - typename Vec<T>::Mask{};
}
WENGERT_VEC Vec<T> abs(Vec<T> x) {
  using V = Vec<T>;
  return typename V::Native((typename V::Mask)x.v & ~sign_bits<T>());
}
WENGERT_VEC Vec<T> copysign(Vec<T> x, Vec<T> s) {
  using V = Vec<T>;
  using M = typename V::Mask;
  return typename V::Native(((M)x.v & ~sign_bits<T>()) | ((M)s.v & sign_bits<T>()));
}

template <class T, class F>
WENGERT_HD Vec<T> by_lane(F f, Vec<T> a) {
  for (int i = 0; i < Vec<T>::kLanes; ++i) a.v[i] = f(a.v[i]);
  return a;
}
template <class T, class F>
WENGERT_HD Vec<T> by_lane(F f, Vec<T> a, Vec<T> b) {
  for (int i = 0; i < Vec<T>::kLanes; ++i) a.v[i] = f(a.v[i], b.v[i]);
  return a;
}

#define WENGERT_BY_LANE_1(name)                                  \
  WENGERT_VEC Vec<T> name(Vec<T> x) {                            \
    return by_lane([](T a) { return fused::prim::name(a); }, x); \
  }
#define WENGERT_BY_LANE_2(name)                                             \
  WENGERT_VEC Vec<T> name(Vec<T> x, Vec<T> y) {                             \
    return by_lane([](T a, T b) { return fused::prim::name(a, b); }, x, y); \
  }

// --------------------------------------------------------------------------------------- roots and rounding: one instruction
#if defined(__AVX512F__)
#define WENGERT_ROUNDING(name, mode)                                                                       \
  WENGERT_HD Vec<float> name(Vec<float> x) { return _mm512_roundscale_ps(x.v, mode | _MM_FROUND_NO_EXC); } \
  WENGERT_HD Vec<double> name(Vec<double> x) { return _mm512_roundscale_pd(x.v, mode | _MM_FROUND_NO_EXC); }
WENGERT_HD Vec<float> sqrt(Vec<float> x) { return _mm512_sqrt_ps(x.v); }
WENGERT_HD Vec<double> sqrt(Vec<double> x) { return _mm512_sqrt_pd(x.v); }
#elif defined(__AVX2__)
#define WENGERT_ROUNDING(name, mode)                                                                  \
  WENGERT_HD Vec<float> name(Vec<float> x) { return _mm256_round_ps(x.v, mode | _MM_FROUND_NO_EXC); } \
  WENGERT_HD Vec<double> name(Vec<double> x) { return _mm256_round_pd(x.v, mode | _MM_FROUND_NO_EXC); }
WENGERT_HD Vec<float> sqrt(Vec<float> x) { return _mm256_sqrt_ps(x.v); }
WENGERT_HD Vec<double> sqrt(Vec<double> x) { return _mm256_sqrt_pd(x.v); }
#endif
#if defined(WENGERT_ROUNDING)
WENGERT_ROUNDING(floor, _MM_FROUND_TO_NEG_INF)
WENGERT_ROUNDING(ceil, _MM_FROUND_TO_POS_INF)
WENGERT_ROUNDING(trunc, _MM_FROUND_TO_ZERO)
WENGERT_ROUNDING(rint, _MM_FROUND_TO_NEAREST_INT)
#undef WENGERT_ROUNDING
#else
WENGERT_BY_LANE_1(sqrt)
WENGERT_BY_LANE_1(floor)
WENGERT_BY_LANE_1(ceil)
WENGERT_BY_LANE_1(trunc)
WENGERT_BY_LANE_1(rint)
#endif

// -------------------------------------------------------------------------------------------------------- elementary functions
#if defined(WENGERT_SLEEF_F32)
#define WENGERT_PASTE3(a, b, c) a##b##c
#define WENGERT_SLEEF_NAME(name, lanes, ulp) WENGERT_PASTE3(Sleef_##name, lanes, ulp)
#define WENGERT_SLEEF_1(name, ulp)                                                                           \
  extern "C" Vec<float>::Native WENGERT_SLEEF_NAME(name, WENGERT_SLEEF_F32, ulp)(Vec<float>::Native);        \
  extern "C" Vec<double>::Native WENGERT_SLEEF_NAME(name, WENGERT_SLEEF_F64, ulp)(Vec<double>::Native);      \
  WENGERT_HD Vec<float> name(Vec<float> x) { return WENGERT_SLEEF_NAME(name, WENGERT_SLEEF_F32, ulp)(x.v); } \
  WENGERT_HD Vec<double> name(Vec<double> x) { return WENGERT_SLEEF_NAME(name, WENGERT_SLEEF_F64, ulp)(x.v); }
#define WENGERT_SLEEF_2(name, ulp)                                                                                              \
  extern "C" Vec<float>::Native WENGERT_SLEEF_NAME(name, WENGERT_SLEEF_F32, ulp)(Vec<float>::Native, Vec<float>::Native);       \
  extern "C" Vec<double>::Native WENGERT_SLEEF_NAME(name, WENGERT_SLEEF_F64, ulp)(Vec<double>::Native, Vec<double>::Native);    \
  WENGERT_HD Vec<float> name(Vec<float> x, Vec<float> y) { return WENGERT_SLEEF_NAME(name, WENGERT_SLEEF_F32, ulp)(x.v, y.v); } \
  WENGERT_HD Vec<double> name(Vec<double> x, Vec<double> y) { return WENGERT_SLEEF_NAME(name, WENGERT_SLEEF_F64, ulp)(x.v, y.v); }
#else
#define WENGERT_SLEEF_1(name, ulp) WENGERT_BY_LANE_1(name)
#define WENGERT_SLEEF_2(name, ulp) WENGERT_BY_LANE_2(name)
#endif
WENGERT_SLEEF_1(exp, _u10)
WENGERT_SLEEF_1(exp2, _u10)
WENGERT_SLEEF_1(expm1, _u10)
WENGERT_SLEEF_1(log, _u10)
WENGERT_SLEEF_1(log2, _u10)
WENGERT_SLEEF_1(log10, _u10)
WENGERT_SLEEF_1(log1p, _u10)
WENGERT_SLEEF_1(cbrt, _u10)
WENGERT_SLEEF_1(sin, _u10)
WENGERT_SLEEF_1(cos, _u10)
WENGERT_SLEEF_1(tan, _u10)
WENGERT_SLEEF_1(asin, _u10)
WENGERT_SLEEF_1(acos, _u10)
WENGERT_SLEEF_1(atan, _u10)
WENGERT_SLEEF_1(tanh, _u10)
WENGERT_SLEEF_1(erf, _u10)
WENGERT_SLEEF_1(erfc, _u15)
WENGERT_SLEEF_1(lgamma, _u10)
WENGERT_SLEEF_2(pow, _u10)
WENGERT_SLEEF_2(atan2, _u10)
WENGERT_SLEEF_2(hypot, _u05)
// Sleef's versions of these overflow to inf or nan before the true result does.
WENGERT_BY_LANE_1(sinh)
WENGERT_BY_LANE_1(cosh)
WENGERT_BY_LANE_1(asinh)
WENGERT_BY_LANE_1(acosh)
WENGERT_BY_LANE_1(atanh)
WENGERT_BY_LANE_1(erfinv)
WENGERT_BY_LANE_1(digamma)
WENGERT_BY_LANE_1(trigamma)
WENGERT_BY_LANE_2(polygamma)
WENGERT_BY_LANE_2(fmod)
#undef WENGERT_SLEEF_1
#undef WENGERT_SLEEF_2
#undef WENGERT_BY_LANE_1
#undef WENGERT_BY_LANE_2
#undef WENGERT_VEC

}  // namespace wengert::kernels::WENGERT_SIMD_NAMESPACE
