// exp, sigmoid, tanh and ELU without branches or calls, so loops over them vectorise. g++
// vectorises those of libm only under -ffast-math, which gives up NaN and infinity.
//
// exp(x) = 2^n exp(r) with |r| <= ln(2)/2. exp(r) - 1 is a Taylor series, and its first omitted
// term is below half a unit in the last place. NaN stays NaN.
//
// Each function returns its derivative too, from the same exponential. The usual formulas s (1 - s)
// and 1 - t^2 compute it from the rounded result. Where the function is flat, this loses all
// digits.
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
  static constexpr int kMantissa = 23, kTerms = 7;
  static constexpr float kLow = -104.0f;  // exp of it rounds to 0
  static constexpr float kScale = 0x1p32f;
  // Adding it drops the fraction and puts the biased exponent, times kScale, into the low bits.
  static constexpr float kRound = 0x1.8p23f + 127 + 32;
  static constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
};

template <>
struct ExpTraits<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kTerms = 13;
  static constexpr double kLow = -746.0;
  static constexpr double kScale = 0x1p64;
  static constexpr double kRound = 0x1.8p52 + 1023 + 64;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
};

template <typename A>
using bits_t = typename ExpTraits<A>::Bits;

template <typename A>
[[gnu::always_inline]] inline bits_t<A> bits_of(A x) {
  bits_t<A> bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <typename A>
[[gnu::always_inline]] inline A of_bits(bits_t<A> bits) {
  A x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename A>
constexpr bits_t<A> kSign = ~(~bits_t<A>(0) >> 1);

template <typename A>
[[gnu::always_inline]] inline A minus_magnitude(A x) {
  return of_bits<A>(bits_of(x) | kSign<A>);
}

template <typename A>
[[gnu::always_inline]] inline A with_sign_of(A x, A magnitude) {
  return of_bits<A>(bits_of(magnitude) | (bits_of(x) & kSign<A>));
}

// exp(x) and exp(x) - 1 for x <= 0, both times kScale. Without the scale, 2^n would be subnormal
// while exp(x) is not zero yet. In a quotient the scale cancels.
template <typename A>
struct Exponential {
  A power, rest;

  [[gnu::always_inline]] inline explicit Exponential(A x) {
    using Traits = ExpTraits<A>;
    x = x < Traits::kLow ? Traits::kLow : x;
    const A shifted = x * A(0x1.71547652b82fep0) + Traits::kRound;  // x / ln 2
    const A n = shifted - Traits::kRound;
    const A r = (x - n * Traits::kLn2High) - n * Traits::kLn2Low;
    const A square = r * r;
    A series = A(kInverseFactorials[Traits::kTerms]);  // 1 + r/2! + r^2/3! + ..., two terms a step
#pragma GCC unroll 8
    for (int k = Traits::kTerms - 1; k > 1; k -= 2) {
      series = (A(kInverseFactorials[k - 1]) + A(kInverseFactorials[k]) * r) + square * series;
    }
    rest = r * series;
    power = of_bits<A>(bits_of(shifted) << Traits::kMantissa);
  }

  [[gnu::always_inline]] inline A exp() const { return power + power * rest; }
  [[gnu::always_inline]] inline A expm1() const {
    return power * rest + (power - ExpTraits<A>::kScale);
  }
};

// The value of a function and its derivative.
template <typename A>
struct Function {
  A value, slope;
};

// The sigmoid and its derivative, sigmoid(x) sigmoid(-x). One number determines both to the last
// digit: the smaller of the two factors, with the sign of x.
template <typename A>
struct Sigmoid {
  A kept;

  [[gnu::always_inline]] inline static Sigmoid of(A x) {
    const A e = Exponential<A>(minus_magnitude(x)).exp();
    return {with_sign_of(x, e / (ExpTraits<A>::kScale + e))};
  }
  [[gnu::always_inline]] inline Function<A> function() const {
    const A smaller = of_bits<A>(bits_of(kept) & ~kSign<A>), larger = 1 - smaller;
    return {bits_of(kept) & kSign<A> ? smaller : larger, smaller * larger};
  }
};

// log(1 + exp(x)) and its derivative, the sigmoid. With e = exp(-|x|) and s = e / (2 + e) it is
// max(x, 0) + log(1 + e), and log(1 + e) = 2 atanh(s) is a series in s <= 1/3.
template <typename A>
[[gnu::always_inline]] inline Function<A> softplus_and_slope(A x) {
  constexpr int kTerms = sizeof(A) == 8 ? 17 : 8;
  constexpr A kScale = ExpTraits<A>::kScale;
  const A scaled = Exponential<A>(minus_magnitude(x)).exp();
  const A s = scaled / (2 * kScale + scaled), square = s * s;
  A series = 1 / A(2 * kTerms - 1);
#pragma GCC unroll 32
  for (int k = kTerms - 1; k > 0; --k) series = series * square + 1 / A(2 * k - 1);
  return {(x < 0 ? A(0) : x) + 2 * s * series,
          (x > 0 ? kScale : scaled) / (kScale + scaled)};
}

// With e = exp(-2 |x|): (1 - e) / (1 + e), and 4 e / (1 + e)^2.
template <typename A>
[[gnu::always_inline]] inline Function<A> tanh_and_slope(A x) {
  constexpr A kScale = ExpTraits<A>::kScale;
  const Exponential<A> e(2 * minus_magnitude(x));
  const A inverse = 1 / (kScale + e.exp());
  return {with_sign_of(x, (0 - e.expm1()) * inverse),
          4 * (e.exp() * inverse) * (kScale * inverse)};
}

// ELU with alpha = 1, torch's default.
template <typename A>
[[gnu::always_inline]] inline Function<A> elu_and_slope(A x) {
  constexpr A kInverseScale = 1 / ExpTraits<A>::kScale;
  const Exponential<A> e(x);  // not used where x > 0
  return {x > 0 ? x : e.expm1() * kInverseScale, x > 0 ? A(1) : e.exp() * kInverseScale};
}

}  // namespace jitops::cpu
