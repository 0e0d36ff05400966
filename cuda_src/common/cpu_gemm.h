// Small matrix products in one thread, for up to a few million multiplications. There the overhead
// of a library is as large as the work.
//
// Each element of a result is summed in index order, for every size.
#pragma once

#include <memory>
#include <utility>

#include "cpu.h"

namespace jitops::cpu {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
constexpr int kTileRows = 4, kTileVectors = 4;  // sums in 16 of 32 registers
#else
#ifdef __AVX__
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;  // SSE2, NEON
#endif
constexpr int kTileRows = 4, kTileVectors = 2;  // sums in 8 of 16 registers
#endif

// The elements of one register, as g++'s vector type.
template <typename A>
struct Vector {
  typedef A Type __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias));
  static constexpr int64_t kCount = kVectorBytes / static_cast<int64_t>(sizeof(A));
};

// A matrix with strides `row` and `col`. It is dense if `col` is 1.
template <typename A>
struct Matrix {
  A* data;
  int64_t rows, cols, row, col;

  [[gnu::always_inline]] inline A& at(int64_t i, int64_t j) const {
    return data[i * row + j * col];
  }
  Matrix transposed() const { return {data, cols, rows, col, row}; }
};

template <int kRows, int kVectors, typename A>
[[gnu::always_inline]] inline void tile(const Matrix<const A>& a, const Matrix<const A>& b,
                                        const Matrix<A>& c, bool add, int64_t i, int64_t j) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount;
  V sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < a.cols; ++k) {
    const A* right = b.data + k * b.row + j;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const A left = a.at(i + r, k);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] += left * *reinterpret_cast<const V*>(right + v * kCount);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    A* out = c.data + (i + r) * c.row + j;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V& at = *reinterpret_cast<V*>(out + v * kCount);
      at = add ? at + sums[r][v] : sums[r][v];
    }
  }
}

template <int kRows, int kVectors, typename A>
[[gnu::always_inline]] inline void column_of_tiles(const Matrix<const A>& a,
                                                   const Matrix<const A>& b, const Matrix<A>& c,
                                                   bool add, int64_t j) {
  int64_t i = 0;
  for (; i + kRows <= c.rows; i += kRows) tile<kRows, kVectors>(a, b, c, add, i, j);
  for (; i < c.rows; ++i) tile<1, kVectors>(a, b, c, add, i, j);
}

// C = A B, or with `add` C += A B, with B and C dense.
template <typename A>
JITOPS_KERNEL void multiply_dense(const Matrix<const A>& a, const Matrix<const A>& b,
                                  const Matrix<A>& c, bool add) {
  constexpr int64_t kCount = Vector<A>::kCount;
  int64_t j = 0;
  for (; j + kTileVectors * kCount <= c.cols; j += kTileVectors * kCount) {
    column_of_tiles<kTileRows, kTileVectors>(a, b, c, add, j);
  }
  if constexpr (kTileVectors == 4) {
    for (; j + 2 * kCount <= c.cols; j += 2 * kCount) {
      column_of_tiles<2 * kTileRows, 2>(a, b, c, add, j);
    }
  }
  for (; j + kCount <= c.cols; j += kCount) {
    column_of_tiles<kTileRows * kTileVectors / 2, 1>(a, b, c, add, j);
  }
  for (; j < c.cols; ++j) {
    for (int64_t i = 0; i < c.rows; ++i) {
      A sum = 0;
      for (int64_t k = 0; k < a.cols; ++k) sum += a.at(i, k) * b.at(k, j);
      c.at(i, j) = add ? c.at(i, j) + sum : sum;
    }
  }
}

// Row by row, in a simple loop: for few rows.
template <typename A>
JITOPS_KERNEL void sum_columns(const Matrix<const A>& a, A* sums) {
  for (int64_t j = 0; j < a.cols; ++j) sums[j] = 0;
  for (int64_t i = 0; i < a.rows; ++i) {
    const A* row = a.data + i * a.row;
#pragma omp simd
    for (int64_t j = 0; j < a.cols; ++j) sums[j] += row[j];
  }
}

template <typename A>
JITOPS_KERNEL bool all_finite(const A* values, int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t n = 0; n < count; ++n) sum += values[n] * A(0);
  return sum == A(0);
}

// ---- transposition in registers, of squares with one vector a row -------------------------------

// Row r of two rows that lie kStep apart, after they exchange blocks.
template <int64_t kStep, bool kLower, typename V, size_t... n>
[[gnu::always_inline]] inline V half_of(const V& above, const V& below,
                                        std::index_sequence<n...>) {
  constexpr int64_t kCount = sizeof...(n);
#define JITOPS_FROM (n & kStep ? kCount + n - (kLower ? 0 : kStep) : n + (kLower ? kStep : 0))...
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(above, below, JITOPS_FROM);
#else
  constexpr int64_t from[] = {JITOPS_FROM};
  return V{(from[n] < kCount ? above[from[n] % kCount] : below[from[n] % kCount])...};
#endif
#undef JITOPS_FROM
}

// Exchanges the off-diagonal blocks of each square of 2 kStep rows, then of larger squares.
template <int64_t kStep, typename V, int64_t kCount>
[[gnu::always_inline]] inline void exchange(V (&rows)[kCount]) {
  constexpr std::make_index_sequence<kCount> all;
#pragma GCC unroll 16
  for (int64_t r = 0; r < kCount; ++r) {
    if (r & kStep) continue;
    const V above = rows[r], below = rows[r + kStep];
    rows[r] = half_of<kStep, false>(above, below, all);
    rows[r + kStep] = half_of<kStep, true>(above, below, all);
  }
  if constexpr (2 * kStep < kCount) exchange<2 * kStep>(rows);
}

// to = from', or with `add` to += from', both dense.
template <typename A>
JITOPS_KERNEL void transpose(const Matrix<const A>& from, const Matrix<A>& to, bool add) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount;
  const int64_t rows = from.rows / kCount * kCount, cols = from.cols / kCount * kCount;
  for (int64_t i = 0; i < rows; i += kCount) {
    for (int64_t j = 0; j < cols; j += kCount) {
      V square[kCount];
#pragma GCC unroll 16
      for (int64_t n = 0; n < kCount; ++n) {
        square[n] = *reinterpret_cast<const V*>(from.data + (i + n) * from.row + j);
      }
      exchange<1>(square);
#pragma GCC unroll 16
      for (int64_t n = 0; n < kCount; ++n) {
        V& at = *reinterpret_cast<V*>(to.data + (j + n) * to.row + i);
        at = add ? at + square[n] : square[n];
      }
    }
  }
  for (int64_t i = 0; i < from.rows; ++i) {
    for (int64_t j = i < rows ? cols : 0; j < from.cols; ++j) {
      to.at(j, i) = add ? to.at(j, i) + from.at(i, j) : from.at(i, j);
    }
  }
}

// C = A B, or with `add` C += A B, with C dense. If B is the transpose of a dense matrix, as
// weights are, it computes C' = B' A'.
template <typename A>
void multiply(const Matrix<const A>& a, const Matrix<const A>& b, const Matrix<A>& c, bool add) {
  if (b.col == 1) return multiply_dense(a, b, c, add);
  constexpr int64_t kCount = Vector<A>::kCount;
  const int64_t width = (a.rows + kCount - 1) / kCount * kCount;  // no columns left over
  const std::unique_ptr<A[]> scratch(new A[(a.cols + c.cols) * width]);
  const Matrix<A> right{scratch.get(), a.cols, width, width, 1};
  const Matrix<A> out{scratch.get() + a.cols * width, c.cols, width, width, 1};
  for (int64_t k = 0; k < a.cols; ++k) {
    for (int64_t i = a.rows; i < width; ++i) right.at(k, i) = 0;
  }
  transpose<A>(a, right, false);
  multiply_dense<A>(b.transposed(), {right.data, right.rows, width, width, 1}, out, false);
  transpose<A>({out.data, c.cols, a.rows, width, 1}, c, add);
}

}  // namespace jitops::cpu
