// Special functions by series, in double: they are rare, and the recurrences lose digits.  The host compiles this file once, in
// special_functions.cpp; generated kernels include it.
#pragma once
#include "fused/scalar_math.h"

namespace wengert::fused::prim {

// zeta(s, q) = sum_k (q + k)^-s for s > 1: direct terms up to q + k >= 12, then Euler-Maclaurin.
WENGERT_OUTLINED double hurwitz_zeta(double s, double q) {
  // B_2k / (2k)! for the Euler-Maclaurin tail of the Hurwitz zeta function
  constexpr double kBernoulliOverFactorial[] = {
      1.0 / 12,          -1.0 / 720,
      1.0 / 30240,       -1.0 / 1209600,
      1.0 / 47900160,    -691.0 / 1307674368000,
      1.0 / 74724249600, -3617.0 / 10670622842880000,
  };
  if (q == kInfinity) return 0;
  double sum = 0;
  while (q < 12) {
    sum += pow(q, -s);
    q += 1;
  }
  double power = pow(q, -s);
  sum += pow(q, 1 - s) / (s - 1) + 0.5 * power;
  double factor = s;
  power /= q;
  int k = 0;
  for (double bernoulli : kBernoulliOverFactorial) {
    double term = bernoulli * factor * power;
    sum += term;
    factor *= (s + 2 * k + 1) * (s + 2 * k + 2);
    power /= q * q;
    ++k;
  }
  return sum;
}

WENGERT_OUTLINED double digamma_series(double x) {
  if (x == 0) return copysign(kInfinity, -x);
  double result = 0;
  if (x < 0) {
    if (x == floor(x)) return kNan;
    double fraction = x - trunc(x);  // the reflection needs pi * x reduced to one period
    result = -kPi / tan(kPi * fraction);
    x = 1 - x;
  }
  while (x < 10) {
    result -= 1 / x;
    x += 1;
  }
  if (x == kInfinity) return x;
  // log x - 1/2x - sum_k B_2k / (2k x^2k)
  double z = 1 / (x * x);
  double tail =
      z *
      (1.0 / 12 - z * (1.0 / 120 - z * (1.0 / 252 - z * (1.0 / 240 - z * (1.0 / 132 - z * (691.0 / 32760 - z * (1.0 / 12)))))));
  return result + log(x) - 0.5 / x - tail;
}

// Below 0 the direct terms of the sum cross the poles: order 1 by reflection, higher ones (of integer order) term by term.
WENGERT_OUTLINED double polygamma_series(double n, double x) {
  if (n == 0) return digamma_series(x);
  if (n == 1) {
    if (x >= 0.5) return hurwitz_zeta(2, x);
    double s = sin(kPi * x);
    return (kPi * kPi) / (s * s) - hurwitz_zeta(2, 1 - x);
  }
  double sign = fmod(n, 2.0) == 0 ? -1 : 1;
  if (x <= 0 && x == floor(x)) return sign * kInfinity;
  if (x == kInfinity) return kNan;  // as PyTorch's sum gives
  return sign * exp(lgamma(n + 1)) * hurwitz_zeta(n + 1, x);
}

// An approximation good to 2e-3, then Halley steps, which cube the error; erfc keeps the digits near 1.
WENGERT_OUTLINED double erfinv_series(double x) {
  double magnitude = abs(x);
  if (!(magnitude <= 1)) return kNan;
  if (magnitude == 1) return copysign(kInfinity, x);
  if (magnitude == 0) return x;
  double rest = 1 - magnitude;
  double l = log(rest * (1 + magnitude));
  double t = 2 / (kPi * 0.147) + l / 2;
  double y = sqrt(sqrt(t * t - l / 0.147) - t);
  if (magnitude < 1e-8) return x * 0.88622692545275801365;
  for (int step = 0; step < 3; ++step) {
    double error = magnitude < 0.5 ? erf(y) - magnitude : rest - erfc(y);
    double slope = 1.12837916709551257390 * exp(-y * y);
    double newton = error / slope;
    y -= newton / (1 + newton * y);
  }
  return copysign(y, x);
}

}  // namespace wengert::fused::prim
