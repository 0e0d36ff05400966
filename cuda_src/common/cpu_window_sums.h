// Sums with the weights of a window along one dimension, for several windows at a time.
//
// Neighbouring windows of equal weights share most of their sum, so a larger window costs little
// more. Nothing is subtracted, as it is from a running sum. So a large pixel, or NaN, leaves no
// trace in the windows beside it, and no error grows along a row.
//
// Rows end with space for whole vectors.
#pragma once

#include "cpu_gemm.h"
#include "windows.h"

namespace jitops::cpu {

// The weights of a window along one dimension. `equal` chooses the sums that windows share.
template <typename A>
struct Taps {
  const A* weights;
  int64_t count;
  bool equal;
};

constexpr int64_t kSumsAtOnce = 512;  // along a row, in the fastest cache

// ---- along a row --------------------------------------------------------------------------------

template <int kVectors, typename A>
[[gnu::always_inline]] inline void along_row_at(const A* source, const A* taps, int64_t count,
                                                A* out) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount;
  V sums[kVectors] = {};
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[v] += taps[k] * *reinterpret_cast<const V*>(source + k + v * kCount);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(out + v * kCount) = sums[v];
}

template <typename A>
JITOPS_KERNEL void along_row_with_taps(const A* source, const A* taps, int64_t count,
                                       int64_t width, A* out) {
  constexpr int64_t kCount = Vector<A>::kCount;
  int64_t j = 0;
  for (; j + 4 * kCount <= width; j += 4 * kCount) {
    along_row_at<4>(source + j, taps, count, out + j);
  }
  for (; j < width; j += kCount) along_row_at<1>(source + j, taps, count, out + j);
}

// out[j] = scale * (a[j] + b[j]), where `a` may be `out`, and `b` a later part of it
template <typename A>
JITOPS_KERNEL void add_rows(const A* a, const A* b, A scale, int64_t width, A* out) {
  using V = typename Vector<A>::Type;
  for (int64_t j = 0; j < width; j += Vector<A>::kCount) {
    *reinterpret_cast<V*>(out + j) =
        scale * (*reinterpret_cast<const V*>(a + j) + *reinterpret_cast<const V*>(b + j));
  }
}

// The same for an odd number of equal weights, from sums of 1, 2, 4, ... neighbours.
template <typename A>
void along_row_of_box(const A* source, A weight, int64_t count, int64_t width, A* out) {
  A sums[kSumsAtOnce + 2 * kMaxWindow];
  const A* so_far = source;
  for (int64_t length = 1, done = 1; done < count;) {
    const int64_t kept = width + count - 2 * length;
    const A* shorter = length == 1 ? source : sums;
    add_rows(shorter, shorter + length, A(1), kept, sums);
    length *= 2;
    if (!(count & length)) continue;
    add_rows(so_far, sums + done, done + length == count ? weight : A(1), width, out);
    so_far = out;
    done += length;
  }
}

// out[j] = sum over k of weights[k] * source[j + k]
template <typename A>
void along_row(const A* source, const Taps<A>& taps, int64_t width, A* out) {
  constexpr int64_t kFew = 11;  // so few are as fast one by one
  if (!taps.equal || taps.count <= kFew) {
    return along_row_with_taps(source, taps.weights, taps.count, width, out);
  }
  for (int64_t j = 0; j < width; j += kSumsAtOnce) {
    along_row_of_box(source + j, taps.weights[0], taps.count, std::min(kSumsAtOnce, width - j),
                     out + j);
  }
}

// ---- across rows --------------------------------------------------------------------------------

template <int kRows, int kVectors, typename A>
[[gnu::always_inline]] inline void across_rows_at(const A* const* rows, const A* taps,
                                                  int64_t count, int64_t j, A* const* out) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount;
  V sums[kRows][kVectors] = {};
  const auto add = [&](int64_t i, int first, int end) __attribute__((always_inline)) {
    V x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      x[v] = *reinterpret_cast<const V*>(rows[i] + j + v * kCount);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if (r < first || r >= end) continue;  // a weight of 0 would let NaN of other rows in
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += taps[i - r] * x[v];
    }
  };
  int64_t i = 0;
  for (; i < kRows - 1; ++i) add(i, 0, static_cast<int>(i) + 1);
  for (; i < count; ++i) add(i, 0, kRows);
  for (; i < count + kRows - 1; ++i) add(i, static_cast<int>(i - count) + 1, kRows);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<V*>(out[r] + j + v * kCount) = sums[r][v];
    }
  }
}

// Several rows need as many taps or more.
template <int kRows, typename A>
JITOPS_KERNEL void across_rows_with_taps(const A* const* rows, const A* taps, int64_t count,
                                         int64_t width, A* const* out) {
  constexpr int64_t kCount = Vector<A>::kCount;
  int64_t j = 0;
  for (; j + 2 * kCount <= width; j += 2 * kCount) {
    across_rows_at<kRows, 2>(rows, taps, count, j, out);
  }
  for (; j < width; j += kCount) across_rows_at<kRows, 1>(rows, taps, count, j, out);
}

template <int kVectors, typename A>
[[gnu::always_inline]] inline void across_rows_of_box_at(const A* const* rows, A weight,
                                                         int64_t count, int64_t windows,
                                                         int64_t j, A* const* out) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount;
  const auto add = [&](int64_t i, V* sums) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[v] += *reinterpret_cast<const V*>(rows[i] + j + v * kCount);
    }
  };
  // `first` sums up the rows that all windows have, then those before them; `last` those after.
  V first[kVectors] = {}, last[kVectors] = {};
  for (int64_t i = windows - 1; i < count; ++i) add(i, first);
  for (int64_t r = windows - 1; r >= 0; --r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<V*>(out[r] + j + v * kCount) = first[v];
    }
    if (r > 0) add(r - 1, first);
  }
  for (int64_t r = 0; r < windows; ++r) {
    if (r > 0) add(count + r - 1, last);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V& sum = *reinterpret_cast<V*>(out[r] + j + v * kCount);
      sum = weight * (sum + last[v]);
    }
  }
}

// For at most `count` windows, which share some rows.
template <typename A>
JITOPS_KERNEL void across_rows_of_box(const A* const* rows, A weight, int64_t count,
                                      int64_t windows, int64_t width, A* const* out) {
  constexpr int64_t kCount = Vector<A>::kCount;
  int64_t j = 0;
  for (; j + 4 * kCount <= width; j += 4 * kCount) {
    across_rows_of_box_at<4>(rows, weight, count, windows, j, out);
  }
  for (; j < width; j += kCount) {
    across_rows_of_box_at<1>(rows, weight, count, windows, j, out);
  }
}

// out[r][j] = sum over k of weights[k] * rows[r + k][j], for r < windows
template <typename A>
void across_rows(const A* const* rows, const Taps<A>& taps, int64_t windows, int64_t width,
                 A* const* out) {
  int64_t r = 0;
  if (taps.equal) {
    for (; r < windows; r += taps.count) {
      across_rows_of_box(rows + r, taps.weights[0], taps.count, std::min(taps.count, windows - r),
                         width, out + r);
    }
    return;
  }
  for (; r + 4 <= windows && taps.count >= 4; r += 4) {
    across_rows_with_taps<4>(rows + r, taps.weights, taps.count, width, out + r);
  }
  for (; r < windows; ++r) {
    across_rows_with_taps<1>(rows + r, taps.weights, taps.count, width, out + r);
  }
}

// ---- products of two images, across slices ------------------------------------------------------

template <typename F, typename A>
JITOPS_KERNEL void sum_products_with_taps(const A* const* x, const A* const* y, const A* taps,
                                          int64_t count, int64_t width, A* const* out) {
  using V = typename Vector<A>::Type;
  for (int64_t j = 0; j < width; j += Vector<A>::kCount) {
    V sums[F::kMeans] = {};
    for (int64_t k = 0; k < count; ++k) {
      V products[F::kMeans];
      F::products(*reinterpret_cast<const V*>(x[k] + j), *reinterpret_cast<const V*>(y[k] + j),
                  products);
#pragma GCC unroll 8
      for (int m = 0; m < F::kMeans; ++m) sums[m] += taps[k] * products[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < F::kMeans; ++m) *reinterpret_cast<V*>(out[m] + j) = sums[m];
  }
}

// For at most `count` windows, as across_rows_of_box.
template <typename F, typename A>
JITOPS_KERNEL void sum_products_of_box(const A* const* x, const A* const* y, A weight,
                                       int64_t count, int64_t windows, int64_t width,
                                       A* const* out) {
  using V = typename Vector<A>::Type;
  for (int64_t j = 0; j < width; j += Vector<A>::kCount) {
    const auto add = [&](int64_t k, V* sums) __attribute__((always_inline)) {
      V products[F::kMeans];
      F::products(*reinterpret_cast<const V*>(x[k] + j), *reinterpret_cast<const V*>(y[k] + j),
                  products);
#pragma GCC unroll 8
      for (int m = 0; m < F::kMeans; ++m) sums[m] += products[m];
    };
    V first[F::kMeans] = {}, last[F::kMeans] = {};
    for (int64_t k = windows - 1; k < count; ++k) add(k, first);
    for (int64_t r = windows - 1; r >= 0; --r) {
#pragma GCC unroll 8
      for (int m = 0; m < F::kMeans; ++m) {
        *reinterpret_cast<V*>(out[r * F::kMeans + m] + j) = first[m];
      }
      if (r > 0) add(r - 1, first);
    }
    for (int64_t r = 0; r < windows; ++r) {
      if (r > 0) add(count + r - 1, last);
#pragma GCC unroll 8
      for (int m = 0; m < F::kMeans; ++m) {
        V& sum = *reinterpret_cast<V*>(out[r * F::kMeans + m] + j);
        sum = weight * (sum + last[m]);
      }
    }
  }
}

// out[r * kMeans + m][j] = sum over k of weights[k] * product m of x[r + k][j] and y[r + k][j]
template <typename F, typename A>
void sum_products(const A* const* x, const A* const* y, const Taps<A>& taps, int64_t windows,
                  int64_t width, A* const* out) {
  if (taps.equal) {
    for (int64_t r = 0; r < windows; r += taps.count) {
      sum_products_of_box<F>(x + r, y + r, taps.weights[0], taps.count,
                             std::min(taps.count, windows - r), width, out + r * F::kMeans);
    }
    return;
  }
  for (int64_t r = 0; r < windows; ++r) {
    sum_products_with_taps<F>(x + r, y + r, taps.weights, taps.count, width, out + r * F::kMeans);
  }
}

}  // namespace jitops::cpu
