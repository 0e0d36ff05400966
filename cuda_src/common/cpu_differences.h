// Gradients of pairs of rows: the sums of weight * (a - b) over all pairs of two sets of rows.
//
// They are sums of differences. The product weights * b is faster, because it is a matrix product.
// But the difference to (sum of weights) * a loses the digits of near rows far from the origin.
#pragma once

#include <vector>

#include "cpu_gemm.h"
#include "triplets.h"

namespace jitops::cpu {

constexpr int kDifferenceVectors = 2;  // columns at a time, in registers
constexpr int kDifferenceRows = kTileVectors == 4 ? 6 : 2;  // rows at a time, with their sums too

template <typename A>
constexpr int64_t kDifferenceWidth = kDifferenceVectors * Vector<A>::kCount;

// to_a[r] += w (a_r - b_j) and to_b[j] -= w (a_r - b_j), with w = weights[r * step + j], for `kRows`
// rows a and `count` rows b of kDifferenceWidth columns. Of finite rows it skips weights of 0; other
// rows times 0 are NaN.
template <int kRows, typename A>
[[gnu::always_inline]] inline void difference_tile(const A* weights, int64_t step, const A* a,
                                                   const A* b, int64_t count, bool finite, A* to_a,
                                                 A* to_b) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount, kWidth = kDifferenceWidth<A>;
  V rows[kRows][kDifferenceVectors], sums[kRows][kDifferenceVectors] = {};
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kDifferenceVectors; ++v) {
      rows[r][v] = *reinterpret_cast<const V*>(a + r * kWidth + v * kCount);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    bool any = false;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) any |= weights[r * step + j] != A(0);
    if (finite && !any) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kDifferenceVectors; ++v) {
      const V other = *reinterpret_cast<const V*>(b + j * kWidth + v * kCount);
      V& out = *reinterpret_cast<V*>(to_b + j * kWidth + v * kCount);
      V sum = out;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V term = weights[r * step + j] * (rows[r][v] - other);
        sums[r][v] += term;
        sum -= term;
      }
      out = sum;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kDifferenceVectors; ++v) {
      *reinterpret_cast<V*>(to_a + r * kWidth + v * kCount) += sums[r][v];
    }
  }
}

template <typename A>
JITOPS_KERNEL void difference_tiles(const A* weights, int64_t step, const A* a, int64_t rows,
                                    const A* b, int64_t count, bool finite, A* to_a, A* to_b) {
  constexpr int64_t kWidth = kDifferenceWidth<A>;
  int64_t r = 0;
  for (; r + kDifferenceRows <= rows; r += kDifferenceRows) {
    difference_tile<kDifferenceRows>(weights + r * step, step, a + r * kWidth, b, count,
                                     finite, to_a + r * kWidth, to_b);
  }
  for (; r < rows; ++r) {
    difference_tile<1>(weights + r * step, step, a + r * kWidth, b, count, finite,
                       to_a + r * kWidth, to_b);
  }
}

// Adds the gradients to to_a and to_b, dense matrices with `cols` columns; null if not needed.
// Threads take some columns each, so every sum has a fixed order.
template <typename T, typename A = acc_t<T>>
void add_differences(const A* weights, RowsOf<T> a, RowsOf<T> b, int64_t cols, A* to_a, A* to_b) {
  constexpr int64_t kWidth = kDifferenceWidth<A>, kRows = 64;
  const RowBlocks blocks(cols, 1, kWidth);
  blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
    const int64_t width = end - begin;
    const auto widen = [&](const RowsOf<T>& rows, int64_t first, int64_t count, A* out) {
      for (int64_t r = 0; r < count; ++r) {
        const T* row = rows.data + (first + r) * rows.stride + begin;
        for (int64_t k = 0; k < width; ++k) out[r * kWidth + k] = load(row[k]);
      }
    };
    const auto add = [&](const A* sums, int64_t first, int64_t count, A* to) {
      for (int64_t r = 0; to && r < count; ++r) {
        A* row = to + (first + r) * cols + begin;
        for (int64_t k = 0; k < width; ++k) row[k] += sums[r * kWidth + k];
      }
    };
    std::vector<A> rows(a.count * kWidth), to_rows(a.count * kWidth);
    std::vector<A> others(kRows * kWidth), to_others(kRows * kWidth);
    widen(a, 0, a.count, rows.data());
    const bool finite = all_finite(rows.data(), a.count * kWidth);
    for (int64_t first = 0; first < b.count; first += kRows) {
      const int64_t count = std::min(kRows, b.count - first);
      widen(b, first, count, others.data());
      std::fill(to_others.begin(), to_others.end(), A(0));
      difference_tiles(weights + first, b.count, rows.data(), a.count, others.data(), count,
                       finite && all_finite(others.data(), count * kWidth), to_rows.data(),
                       to_others.data());
      add(to_others.data(), first, count, to_b);
    }
    add(to_rows.data(), 0, a.count, to_a);
  });
}

}  // namespace jitops::cpu
