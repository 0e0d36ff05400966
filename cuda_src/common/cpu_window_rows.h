// The steps of a row of windows, or of pixels: losses, derivatives, gradients. Rows end with space
// for whole vectors. cpu_windows.h lists the members of a formula F.
#pragma once

#include "cpu_gemm.h"

namespace jitops::cpu {

template <typename T, typename A>
JITOPS_KERNEL void load_shifted(const T* row, A shift, int64_t width, A* out) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) out[j] = static_cast<A>(load(row[j])) - shift;
}

// Returns the sum of the losses of a row of windows. `out` gets the derivatives, if it is there.
template <bool kDerivatives, typename F, typename A>
JITOPS_KERNEL double losses_of_row(const F& formula, const A* const* means, const A* g, A shift_x,
                                   A shift_y, int64_t width, A* losses, A* const* out) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount;
  constexpr int kAll = F::kShared + 2 * F::kOwn;
  V sums = {};
  for (int64_t j = 0; j < width; j += kCount) {
    V mean[F::kMeans], derivatives[kAll];
#pragma GCC unroll 8
    for (int m = 0; m < F::kMeans; ++m) mean[m] = *reinterpret_cast<const V*>(means[m] + j);
    const V loss = formula.template window<kDerivatives>(
        mean, V{} + shift_x, V{} + shift_y, *reinterpret_cast<const V*>(g + j), derivatives);
    *reinterpret_cast<V*>(losses + j) = loss;
    if (j + kCount <= width) sums += loss;
    if (!kDerivatives) continue;
#pragma GCC unroll 8
    for (int m = 0; m < kAll; ++m) {
      if (out[m]) *reinterpret_cast<V*>(out[m] + j) = derivatives[m];
    }
  }
  double sum = 0;
  for (int64_t lane = 0; lane < kCount; ++lane) sum += static_cast<double>(sums[lane]);
  for (int64_t j = width / kCount * kCount; j < width; ++j) sum += static_cast<double>(losses[j]);
  return sum;
}

// grad += the gradient of the pixels of a row
template <bool kOfInput, typename F, typename A>
JITOPS_KERNEL void add_gradients(const A* const* shared, const A* const* own, const A* x,
                                 const A* y, int64_t width, A* grad) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount;
  const auto at = [](const A* row, int64_t j) __attribute__((always_inline)) {
    return *reinterpret_cast<const V*>(row + j);
  };
  for (int64_t j = 0; j < width; j += kCount) {
    V of_both[F::kShared], of_one[F::kOwn];
#pragma GCC unroll 4
    for (int m = 0; m < F::kShared; ++m) of_both[m] = at(shared[m], j);
#pragma GCC unroll 4
    for (int m = 0; m < F::kOwn; ++m) of_one[m] = at(own[m], j);
    const V sum = kOfInput ? F::gradient_of_input(of_both, of_one, at(x, j), at(y, j))
                           : F::gradient_of_target(of_both, of_one, at(x, j), at(y, j));
    if (j + kCount <= width) {
      V& out = *reinterpret_cast<V*>(grad + j);
      out = out + sum;
    } else {
      for (int64_t lane = 0; j + lane < width; ++lane) grad[j + lane] += sum[lane];
    }
  }
}

// grad = factor * (the derivative of |x - y| with respect to x), or its negative
template <typename T, typename A>
JITOPS_KERNEL void set_signs(const T* x, const T* y, A factor, int64_t width, A* grad) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const auto difference = static_cast<A>(load(x[j]) - load(y[j]));
    const A sign = difference > A(0) ? factor : -factor;
    grad[j] = difference == A(0) ? A(0) : sign;
  }
}

template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL A distance_of_rows(const T* x, const T* y, int64_t width) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; ++j) {
    const A difference = load(x[j]) - load(y[j]);
    sum += difference < A(0) ? -difference : difference;
  }
  return sum;
}

template <typename T, typename A>
JITOPS_KERNEL void store_row(const A* row, int64_t width, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) store(out[j], static_cast<acc_t<T>>(row[j]));
}

}  // namespace jitops::cpu
