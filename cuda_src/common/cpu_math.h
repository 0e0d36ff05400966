// exp and its kin without branches or calls, so that loops over them vectorise: g++ does that to
// libm's only under -ffast-math, which gives up NaN and infinity.
//
// exp(x) = 2^n exp(r) with |r| <= ln(2)/2, and exp(r) - 1 by its Taylor series, whose first term
// left out is below half a unit in the last place. NaN stays NaN. Below kLow, about where the normal
// numbers end, exp stays what it is there; at kHigh 2^n is infinite, half a unit of n early.
#pragma once

#include <array>

#include "cpu.h"

namespace jitops::cpu {

constexpr auto kInverseFactorials = [] {
  std::array<double, 16> values{1};
  for (size_t n = 1; n < values.size(); ++n) values[n] = values[n - 1] / static_cast<double>(n);
  return values;
}();

template <typename A>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
  static constexpr float kLow = -87.0f, kHigh = 89.0f;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves no fraction
  static constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
};

template <>
struct ExpTraits<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
  static constexpr double kLow = -708.0, kHigh = 710.0;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
};

// exp(x) = power + power * rest, up to where `power` is infinite.
template <typename A>
struct Exponential {
  A power, rest;

  [[gnu::always_inline]] inline explicit Exponential(A x) {
    using Traits = ExpTraits<A>;
    x = x < Traits::kLow ? Traits::kLow : x;
    x = x > Traits::kHigh ? Traits::kHigh : x;
    const A shifted = x * A(0x1.71547652b82fep0) + Traits::kRound;  // x / ln 2
    const A n = shifted - Traits::kRound;
    const A r = (x - n * Traits::kLn2High) - n * Traits::kLn2Low;
    A series = A(kInverseFactorials[Traits::kTerms]);  // 1 + r/2! + r^2/3! + ...
#pragma GCC unroll 16
    for (int k = Traits::kTerms - 1; k >= 1; --k) series = A(kInverseFactorials[k]) + r * series;
    rest = r * series;
    typename Traits::Bits bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + Traits::kBias) << Traits::kMantissa;  // the low bits of `shifted` are n
    std::memcpy(&power, &bits, sizeof power);
  }
};

template <typename A>
[[gnu::always_inline]] inline A expm1(A x) {
  const Exponential<A> e(x);
  return e.power * e.rest + (e.power - 1);
}

template <typename A>
[[gnu::always_inline]] inline A magnitude(A x) {
  return x < 0 ? -x : x;
}

// exp(-x) + 1, the inverse of the sigmoid: infinite where `power` is.
template <typename A>
[[gnu::always_inline]] inline A inverse_sigmoid(A x) {
  const Exponential<A> e(-x);
  return 1 + e.power * (1 + e.rest);
}

template <typename A>
[[gnu::always_inline]] inline A sigmoid(A x) {
  return 1 / inverse_sigmoid(x);
}

template <typename A>
[[gnu::always_inline]] inline A tanh(A x) {
  const A e = expm1(-2 * magnitude(x));
  const A result = (0 - e) / (2 + e);
  return x < 0 ? -result : result;
}

// tanh(x) sigmoid(y), with one division; those take as long as all the rest.
template <typename A>
[[gnu::always_inline]] inline A tanh_sigmoid(A x, A y) {
  const A e = expm1(-2 * magnitude(x));
  const A result = (0 - e) / ((2 + e) * inverse_sigmoid(y));
  return x < 0 ? -result : result;
}

// With alpha = 1, as torch's default is.
template <typename A>
[[gnu::always_inline]] inline A elu(A x) {
  const A below = expm1(x);
  return x > 0 ? x : below;
}

}  // namespace jitops::cpu
