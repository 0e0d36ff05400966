// Shared by CPU kernels: element types that vectorise, dispatch, blocks of rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "dtype.h"

// Marks a kernel: a free function over plain pointers, because g++ vectorises no lambda. The flags
// say -O1, because host code gains nothing from more and would compile a quarter slower. Without
// no-trapping-math g++ turns comparisons into branches, because they may raise a floating-point
// flag. Without no-math-errno it calls sqrt for each element, because that may set errno.
#if defined(__GNUC__) && !defined(__clang__) && !defined(JITOPS_DEBUG)
#define JITOPS_KERNEL [[gnu::optimize("O3", "no-trapping-math", "no-math-errno")]]
#else
#define JITOPS_KERNEL
#endif

namespace jitops::cpu {

// ---- element types: load widens, store rounds to nearest even ---------------------------------
// Bit arithmetic without branches, because g++ does not vectorise torch's BFloat16 and Half.

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

[[gnu::always_inline]] inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

[[gnu::always_inline]] inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

[[gnu::always_inline]] inline double load(double x) { return x; }
[[gnu::always_inline]] inline float load(float x) { return x; }
[[gnu::always_inline]] inline float load(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
[[gnu::always_inline]] inline float load(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t finite = to_bits(from_bits(magnitude << 13) * 0x1p112f);  // rebias
  const uint32_t widened = magnitude >= 0x7c00u ? finite | 0x7f800000u : finite;
  return from_bits(widened | (x.bits & 0x8000u) << 16);
}

[[gnu::always_inline]] inline void store(double& out, double x) { out = x; }
[[gnu::always_inline]] inline void store(float& out, float x) { out = x; }
[[gnu::always_inline]] inline void store(BFloat16& out, float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
[[gnu::always_inline]] inline void store(Float16& out, float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // After adding 0.5 the last bit is 2^-24, the unit of subnormals. So the addition rounds.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and more round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

// ---- dispatch -----------------------------------------------------------------------------------

// Calls f(T{}) for the element type T of `dtype`.
template <typename F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kFloat32: return f(float{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
  }
}

// ---- parallelism ------------------------------------------------------------------------------

// Rows are processed in blocks. Their size depends on `cols` only, so the order of every sum, and
// thus every bit of a result, is the same for any number of threads.
struct RowBlocks {
  int64_t rows;
  int64_t size;
  int64_t count;

  RowBlocks(int64_t rows_, int64_t cols, int64_t elements_per_block)
      : rows(rows_),
        size(std::max<int64_t>(1, elements_per_block / std::max<int64_t>(1, cols))),
        count((rows_ + size - 1) / size) {}

  // f(block, first row, last row + 1), on torch's threads.
  template <typename F>
  void for_each(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b, b * size, std::min(rows, (b + 1) * size));
    });
  }
};

}  // namespace jitops::cpu
