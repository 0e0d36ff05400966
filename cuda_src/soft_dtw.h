// Soft-DTW: the contract between the host (.cpp) and the kernels (.cu), and the recursion of a cell.
// It includes no header of torch or CUDA, so both compilers read it fast.
//
// With p = exp(-r / gamma) the recursion r = d + min^gamma(r', r'', r''') is
// p = exp(-d / gamma) (p' + p'' + p'''). p has a range far beyond that of any type, so a cell holds
// a mantissa in [1, 2) and an exponent of its own, an integer in a double. A cell thus costs one
// exponential and no logarithm. Three shares of a sum are its weights, right to the last digits,
// however large r / gamma is. Differences of stored r would lose them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/warping.h"

namespace jitops::soft_dtw {

using warping::Pair;

// The forward pass keeps every row of the recursion at the end of so many, but for the last strip.
constexpr int64_t kStripRows = 32;

struct Params : warping::Inputs {
  double gamma;

  // Forward: written. Backward: read. The columns of a kept row begin where its band begins.
  double* value;      // (pairs,)
  void* mantissas;    // (pairs, strips, kept) of acc_t<T>
  double* exponents;  // (pairs, strips, kept)
  int64_t strips, kept;

  // Backward: dense gradients. Null if not needed.
  const double* grad_value;  // (pairs,)
  void* grad_x;
  void* grad_y;
  void* grad_cost;
  void* alignment;  // CUDA scratch: (pairs, rows, cols) of acc_t<T>
  void* weights;    // CUDA scratch: see `scratch_elements`
};

// Whether a pair may have less to keep than its memory holds. Then the memory is cleared first.
JITOPS_BOTH inline bool not_all_kept(const Params& params) {
  return params.lengths || params.bandwidth < params.rows + params.cols;
}

// ---- a cell: mantissa * 2^exponent ------------------------------------------------------------

constexpr double kInverseLn2 = 0x1.71547652b82fep0, kLn2 = 0x1.62e42fefa39efp-1;
// Exponents as large as this stand for infinite costs, and for cells outside of the matrix. Sums of
// them along a path stay finite.
constexpr double kFar = 1e290;

template <typename A>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer in the low bits
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
  static constexpr double kRound = 0x1.8p52;
};

template <typename A>
JITOPS_BOTH JITOPS_INLINE typename Format<A>::Bits bits_of(A x) {
  typename Format<A>::Bits bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <typename A>
JITOPS_BOTH JITOPS_INLINE A of_bits(typename Format<A>::Bits bits) {
  A x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Weights and gradients below these are 0, so that no product is subnormal. CPUs compute with
// subnormal numbers a hundred times as slowly, and most cells are far from any likely path.
constexpr int kSmallest = -60;
template <typename A>
constexpr A kLeast = sizeof(A) == 8 ? static_cast<A>(0x1p-960) : static_cast<A>(0x1p-60);

// 2^n for an integer n <= 0, and 0 below 2^kSmallest.
template <typename A>
JITOPS_BOTH JITOPS_INLINE A power_of_two(double n) {
  using F = Format<A>;
  A biased = static_cast<A>(n) + F::kBias;
  biased = biased < F::kBias + kSmallest ? A(0) : biased;
  return of_bits<A>(bits_of(biased + F::kRound) << F::kMantissa);
}

// The terms of the series of exp(r) from r^kTerm / kTerm! on, over r^kTerm. A template, because
// then a loop over calls vectorises.
template <typename A, int kTerm>
JITOPS_BOTH JITOPS_INLINE A exponential_series(A r) {
  constexpr double kFactorials[] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800,
                                    39916800, 479001600, 6227020800};
  constexpr A kFirst = static_cast<A>(1 / kFactorials[kTerm]);
  if constexpr (kTerm == Format<A>::kTerms) {
    return kFirst;
  } else {
    return exponential_series<A, kTerm + 1>(r) * r + kFirst;
  }
}

// 2^-f for |f| <= 1/2. The first omitted term is below half a unit in the last place.
template <typename A>
JITOPS_BOTH JITOPS_INLINE A power_of_fraction(A f) {
  return exponential_series<A, 0>(f * static_cast<A>(-kLn2));
}

template <typename A>
struct Cell {
  A mantissa;
  double exponent;
};

template <typename A>
JITOPS_BOTH JITOPS_INLINE Cell<A> outside() { return {A(1), -kFar}; }

// A cell, and the unnormalised shares of its three predecessors.
template <typename A>
struct Step {
  A up, left, diagonal, sum;
  Cell<A> cell;

  // `scaled` is d / (gamma ln 2).
  JITOPS_BOTH JITOPS_INLINE Step(double scaled, Cell<A> above, Cell<A> before, Cell<A> corner) {
    using F = Format<A>;
    const double higher = above.exponent > before.exponent ? above.exponent : before.exponent;
    const double highest = higher > corner.exponent ? higher : corner.exponent;
    up = above.mantissa * power_of_two<A>(above.exponent - highest);
    left = before.mantissa * power_of_two<A>(before.exponent - highest);
    diagonal = corner.mantissa * power_of_two<A>(corner.exponent - highest);
    sum = up + left + diagonal;
    double c = scaled < kFar ? scaled : scaled == scaled ? kFar : scaled;
    c = c < -kFar ? -kFar : c;
    // Beyond 2^51 a double has hardly any fraction.
    constexpr double kRound = Format<double>::kRound;
    const double magnitude = c < 0 ? -c : c;
    const double whole = magnitude < 0x1p51 ? (c + kRound) - kRound : c;
    const A value = sum * power_of_fraction(static_cast<A>(c - whole));
    const auto biased = bits_of(value) >> F::kMantissa;
    // NaN stays NaN, because anything times NaN is.
    cell.mantissa = value * of_bits<A>((2 * F::kBias - biased) << F::kMantissa);
    cell.exponent = highest - whole + (small_integer(biased) - F::kBias);
  }

 private:
  JITOPS_BOTH JITOPS_INLINE static double small_integer(uint32_t n) {
    return static_cast<double>(static_cast<int32_t>(n));
  }
  JITOPS_BOTH JITOPS_INLINE static double small_integer(uint64_t n) {
    return of_bits<double>(n | 0x4330000000000000u) - 0x1p52;
  }
};

// r = -gamma ln(p), in float64 where a mantissa in A has lost nothing.
template <typename A>
JITOPS_BOTH double value_of(const Params& params, Cell<A> last) {
  const double mantissa = static_cast<double>(last.mantissa);
  if (mantissa != mantissa) return mantissa;
  if (last.exponent < -kFar / 2) return static_cast<double>(INFINITY);
  if (last.exponent > kFar / 2) return -static_cast<double>(INFINITY);
  return -params.gamma * kLn2 * (last.exponent + log2(mantissa));
}

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);

// The elements of `weights`.
int64_t scratch_elements(const Params& params);

}  // namespace jitops::soft_dtw
