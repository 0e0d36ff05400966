// Losses of local windows on the CPU, in both passes at once.
//
// A band of rows goes through these steps, four rows of windows at a time, so that all rows between
// the images and the gradients stay in a CPU's cache:
//   the products of the two images, summed over the depth of a window
//   their sums along the row, then across rows: the means of each window
//   the loss of each window, and its derivatives with respect to the means
//   the sums of these along the row, then across rows: the gradients of the pixels
//
// A Formula has, for a number or a vector V of numbers:
//   Number                 the type of all numbers between the images and the results
//   kMeans, kSigned        how many means; the sign of the loss in the map
//   kShared, kOwn          how many derivatives for both images, and for each alone
//   products(x, y, out)    computes the products of pixels, whose means a window takes
//   window(means, shift_x, shift_y, g, out)   returns the loss; out: g times its derivatives
//   shown(loss)            the value in the map
//   gradient_of_input(shared, own, x, y), gradient_of_target(...)
// x and y are differences from shift_x and shift_y, which are close to the images' values. So their
// squares do not hide the variance of a bright and flat image.
#pragma once

#include <cmath>
#include <vector>

#include "cpu_gemm.h"
#include "windows.h"

namespace jitops::cpu {

constexpr int64_t kRowsAtOnce = 4;  // of windows

// ---- sums with the taps: rows end with space for whole vectors ----------------------------------

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

// out[j] = sum over k of taps[k] * source[j + k]
template <typename A>
JITOPS_KERNEL void along_row(const A* source, const A* taps, int64_t count, int64_t width,
                             A* out) {
  constexpr int64_t kCount = Vector<A>::kCount;
  int64_t j = 0;
  for (; j + 4 * kCount <= width; j += 4 * kCount) {
    along_row_at<4>(source + j, taps, count, out + j);
  }
  for (; j < width; j += kCount) along_row_at<1>(source + j, taps, count, out + j);
}

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

// out[r][j] = sum over k of taps[k] * rows[r + k][j]. Several rows need as many taps or more.
template <int kRows, typename A>
JITOPS_KERNEL void across_rows(const A* const* rows, const A* taps, int64_t count, int64_t width,
                               A* const* out) {
  constexpr int64_t kCount = Vector<A>::kCount;
  int64_t j = 0;
  for (; j + 2 * kCount <= width; j += 2 * kCount) {
    across_rows_at<kRows, 2>(rows, taps, count, j, out);
  }
  for (; j < width; j += kCount) across_rows_at<kRows, 1>(rows, taps, count, j, out);
}

// ---- the steps of a row ---------------------------------------------------------------------------

template <typename T, typename A>
JITOPS_KERNEL void load_shifted(const T* row, A shift, int64_t width, A* out) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) out[j] = static_cast<A>(load(row[j])) - shift;
}

// out[m][j] = sum over k of taps[k] * product m of x[k][j] and y[k][j]
template <typename F, typename A>
JITOPS_KERNEL void sum_products(const A* const* x, const A* const* y, const A* taps, int64_t count,
                                int64_t width, A* const* out) {
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

// ---- a band: rows [first, end) of a plane ---------------------------------------------------------

template <typename T, typename F>
class WindowBand {
 public:
  using A = typename F::Number;
  static constexpr int kAll = F::kShared + 2 * F::kOwn;
  double loss = 0, distance = 0;  // of the windows and of the pixels that belong to the band

  WindowBand(const WindowParams& params, const F& formula, int64_t plane, int64_t first,
             int64_t end)
      : params_(params),
        formula_(formula),
        depth_(params.depth),
        height_(params.height),
        width_(params.width),
        plane_(plane),
        first_(first),
        end_(end),
        derives_(params.grad_input || params.grad_target),
        padded_(width_.size + 2 * width_.pad),
        stride_((padded_ + 2 * width_.taps) / kCount * kCount + 4 * kCount),
        slots_(height_.taps + kRowsAtOnce - 1),
        memory_(rows_in_all() * stride_ + kCount),
        taps_(params.taps, params.taps + kMaxWindow) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    rows_ = memory_.data() + (kVectorBytes - address % kVectorBytes) / sizeof(A);
    const int64_t offset = plane * params.pixels();
    input_ = static_cast<const T*>(params.input) + offset;
    target_ = static_cast<const T*>(params.target) + offset;
    grad_input_ = params.grad_input ? static_cast<A*>(params.grad_input) + offset : nullptr;
    grad_target_ = params.grad_target ? static_cast<A*>(params.grad_target) + offset : nullptr;
    for (int m = 0; m < kAll; ++m) {
      needed_[m] = derives_ && (m < F::kShared ||
                                (m < F::kShared + F::kOwn ? grad_input_ : grad_target_));
    }
    x_ = take(depth_.taps), y_ = take(depth_.taps);
    for (A** row : {&g_, &losses_, &padded_row_}) *row = take(1);
    for (A*& row : products_) row = take(1);
    for (auto& rows : means_) {
      for (A*& row : rows) row = take(1);
    }
    sums_ = take(F::kMeans * slots_);
    if (!derives_) return;
    for (A*& row : derivatives_) row = take(1);
    summed_ = take(kAll * rows_of_slices());
    adjoint_sums_ = take(kAll * slots_);
  }

  void run() {
    shift_x_ = shift_of(input_), shift_y_ = shift_of(target_);
    if (params_.l1_weight != 0) {
      for (int64_t d = 0; d < depth_.size; ++d) {
        for (int64_t row = first_; row < end_; ++row) distance += distance_of(at_row(d, row));
      }
    }
    for (int64_t d = 0; d < depth_.size + depth_.pad; ++d) {
      if (d < depth_.windows) take_slice(d);
      if (derives_ && depth_.taps > 1 && d >= depth_.pad) finish_slice(d - depth_.pad);
    }
  }

 private:
  static constexpr int64_t kCount = Vector<A>::kCount;

  int64_t rows_in_all() const {
    const int64_t of_all = derives_ ? kAll * (1 + rows_of_slices() + slots_) : 0;
    return 3 + 2 * depth_.taps + F::kMeans * (1 + kRowsAtOnce + slots_) + of_all;
  }
  A* take(int64_t count) {
    A* rows = rows_ + stride_ * taken_;
    taken_ += count;
    return rows;
  }

  int64_t at_row(int64_t d, int64_t row) const {
    return (d * height_.size + row) * width_.size;
  }

  // The mean of the finite pixels of a row in the middle.
  A shift_of(const T* image) const {
    const T* row = image + at_row(depth_.size / 2, (first_ + end_) / 2);
    double sum = 0;
    int64_t count = 0;
    for (int64_t j = 0; j < width_.size; ++j) {
      const double value = load(row[j]);
      if (!std::isfinite(value)) continue;
      sum += value;
      ++count;
    }
    const A mean = count ? static_cast<A>(sum / static_cast<double>(count)) : A(0);
    return std::isfinite(mean) ? mean : A(0);
  }

  double distance_of(int64_t at) const {
    return static_cast<double>(distance_of_rows(input_ + at, target_ + at, width_.size));
  }

  // The gradient that arrives at the loss of this plane.
  A grad_of_plane() const {
    return params_.grad_losses ? static_cast<const A*>(params_.grad_losses)[plane_] : A(1);
  }

  void start_gradients(int64_t at) {
    const A factor = grad_of_plane() * static_cast<A>(params_.l1_weight /
                                                      static_cast<double>(params_.pixels()));
    for (const bool of_input : {true, false}) {
      A* grad = of_input ? grad_input_ : grad_target_;
      if (!grad) continue;
      if (params_.l1_weight == 0) {
        std::fill_n(grad + at, width_.size, A(0));
      } else {
        set_signs(input_ + at, target_ + at, of_input ? factor : -factor, width_.size, grad + at);
      }
    }
  }

  void take_slice(int64_t d) {
    slice_ = d;
    const int64_t reach = derives_ ? height_.taps - 1 - height_.pad : 0;
    const int64_t last = derives_ ? end_ + height_.pad : end_;
    loaded_ = std::max<int64_t>(0, first_ - reach) - height_.pad;
    for (int64_t p = first_ - reach; p < last; p += kRowsAtOnce) {
      const int64_t end = std::min(last, p + kRowsAtOnce);
      take_windows(std::max<int64_t>(0, p), std::min(end, height_.windows));
      if (derives_) {
        for (int64_t row = p; row < end; ++row) {
          if (row >= 0 && row < height_.windows) continue;
          for (int m = 0; m < kAll; ++m) {
            if (needed_[m]) std::fill_n(adjoint_slot(m, row), width_.size, A(0));
          }
        }
        take_gradients(std::max(first_, p - height_.pad), std::min(end_, end - height_.pad));
      }
    }
  }

  A* slot(A* ring, int m, int64_t row) const {
    return ring + (m * slots_ + (row + 4 * kMaxWindow) % slots_) * stride_;
  }
  A* adjoint_slot(int m, int64_t row) const { return slot(adjoint_sums_, m, row); }
  const A* taps_along(const Extent& extent) const {
    return extent.taps == 1 ? kOne : taps_.data();
  }

  // Rows [first, end) of windows, at most kRowsAtOnce.
  void take_windows(int64_t first, int64_t end) {
    if (first >= end) return;
    for (; loaded_ < end - height_.pad + height_.taps - 1; ++loaded_) load_row(loaded_);
    const auto rows = static_cast<int>(end - first);
    for (int m = 0; m < F::kMeans; ++m) {
      A* out[kRowsAtOnce];
      for (int r = 0; r < rows; ++r) out[r] = means_[r][m];
      sum_across([&](int64_t row) { return slot(sums_, m, row); }, first - height_.pad, rows,
                 width_.windows, out);
    }
    for (int r = 0; r < rows; ++r) losses_of(first + r, means_[r]);
  }

  // Sums of rows from `first` on, for so many rows.
  template <typename Slot>
  void sum_across(const Slot& its_slot, int64_t first, int rows, int64_t width, A* const* out) {
    const A* sources[kMaxWindow + kRowsAtOnce];
    for (int64_t i = 0; i < height_.taps + rows - 1; ++i) sources[i] = its_slot(first + i);
    const A* taps = taps_along(height_);
    if (rows == kRowsAtOnce && height_.taps >= kRowsAtOnce) {
      across_rows<kRowsAtOnce>(sources, taps, height_.taps, width, out);
      return;
    }
    for (int r = 0; r < rows; ++r) {
      across_rows<1>(sources + r, taps, height_.taps, width, out + r);
    }
  }

  // Row i of the padded images: products, summed over the depth and along the row.
  void load_row(int64_t i) {
    const int64_t row = pixel_at(i, height_.size, params_.padding), pad = width_.pad;
    const A *x[kMaxWindow], *y[kMaxWindow];
    for (int64_t k = 0; k < depth_.taps; ++k) {
      const int64_t d = pixel_at(slice_ - depth_.pad + k, depth_.size, params_.padding);
      const int64_t at = row < 0 || d < 0 ? -1 : at_row(d, row);
      x[k] = load_row_of(input_, at, shift_x_, x_ + k * stride_);
      y[k] = load_row_of(target_, at, shift_y_, y_ + k * stride_);
    }
    A* inner[F::kMeans];
    for (int m = 0; m < F::kMeans; ++m) inner[m] = products_[m] + pad;
    sum_products<F>(x, y, taps_along(depth_), depth_.taps, width_.size, inner);
    A outside[F::kMeans];  // all taps add up to 1
    F::products(-shift_x_, -shift_y_, outside);
    for (int m = 0; m < F::kMeans; ++m) {
      for (int64_t j = 1; j <= pad; ++j) {
        const bool reflects = params_.padding == Padding::kReflect;
        inner[m][-j] = reflects ? inner[m][j] : outside[m];
        inner[m][width_.size - 1 + j] = reflects ? inner[m][width_.size - 1 - j] : outside[m];
      }
      along_row(products_[m], taps_along(width_), width_.taps, width_.windows, slot(sums_, m, i));
    }
  }

  // A row of pixels at this place, less the shift; the zeros outside of the image at -1.
  const A* load_row_of(const T* image, int64_t at, A shift, A* out) const {
    if (at < 0) {
      std::fill_n(out, width_.size, -shift);
    } else {
      load_shifted(image + at, shift, width_.size, out);
    }
    return out;
  }

  // The losses of row p of windows, and their derivatives, summed along the row.
  void losses_of(int64_t p, A* const* means) {
    const int64_t at = ((plane_ * depth_.windows + slice_) * height_.windows + p) * width_.windows;
    const A* shares = g_;
    if (params_.grad_map) {
      load_shifted(static_cast<const T*>(params_.grad_map) + at, A(0), width_.windows, g_);
      for (int64_t j = 0; j < width_.windows; ++j) g_[j] *= A(F::kSigned);
    } else {
      std::fill_n(g_, width_.windows,
                  grad_of_plane() * static_cast<A>(params_.window_weight /
                                                   static_cast<double>(params_.windows())));
    }
    A* rows[kAll];
    for (int m = 0; m < kAll; ++m) {
      rows[m] = needed_[m] ? derivatives_[m] + width_.taps - 1 : nullptr;
    }
    const double sum =
        derives_ ? losses_of_row<true>(formula_, means, shares, shift_x_, shift_y_,
                                       width_.windows, losses_, rows)
                 : losses_of_row<false>(formula_, means, shares, shift_x_, shift_y_,
                                        width_.windows, losses_, rows);
    if (p >= first_ && p < end_) {
      loss += sum;
      if (params_.map) {
        for (int64_t j = 0; j < width_.windows; ++j) losses_[j] = F::shown(losses_[j]);
        store_row(losses_, width_.windows, static_cast<T*>(params_.map) + at);
      }
    }
    if (!derives_) return;
    for (int m = 0; m < kAll; ++m) {
      if (!needed_[m]) continue;
      // The loop over whole vectors writes beyond the end of the row.
      std::fill_n(rows[m] + width_.windows, width_.taps - 1, A(0));
      along_row(derivatives_[m], taps_along(width_), width_.taps, padded_, padded_row_);
      fold(padded_row_);
      std::copy_n(padded_row_ + width_.pad, width_.size, adjoint_slot(m, p));
    }
  }

  // Adds what reflected pixels have to the pixels that they are.
  void fold(A* row) const {
    if (params_.padding != Padding::kReflect) return;
    const int64_t pad = width_.pad, last = width_.size - 1;
    for (int64_t j = 1; j <= pad; ++j) {
      row[pad + j] += row[pad - j];
      row[pad + last - j] += row[pad + last + j];
    }
  }

  bool is_reflected(int64_t q) const {
    return params_.padding == Padding::kReflect &&
           (q <= height_.pad || q >= height_.size - 1 - height_.pad);
  }

  // What rows [first, end) of pixels have from this slice of windows.
  void take_gradients(int64_t first, int64_t end) {
    if (first >= end) return;
    const auto rows = static_cast<int>(end - first);
    bool reflected = false;
    for (int64_t q = first; q < end; ++q) reflected |= is_reflected(q);
    const int64_t from = first + height_.pad - height_.taps + 1;
    for (int m = 0; m < kAll; ++m) {
      if (!needed_[m]) continue;
      A* out[kRowsAtOnce];
      for (int r = 0; r < rows; ++r) out[r] = of_slice(m, slice_, first + r);
      const auto its_slot = [&](int64_t p) { return adjoint_slot(m, p); };
      if (!reflected) {
        sum_across(its_slot, from, rows, width_.size, out);
        continue;
      }
      for (int r = 0; r < rows; ++r) {
        sum_adjoint(height_, first + r, from + r, its_slot, out[r]);
      }
    }
    if (depth_.taps > 1) return;
    for (int64_t q = first; q < end; ++q) {
      const A* sums[kAll];
      for (int m = 0; m < kAll; ++m) sums[m] = needed_[m] ? of_slice(m, slice_, q) : nullptr;
      set_gradients(slice_, q, sums);
    }
  }

  // Rows of the sums over a slice of windows, for as many slices as a window has. Without a depth
  // they are for four rows, which are used at once.
  A* of_slice(int m, int64_t d, int64_t q) const {
    if (depth_.taps == 1) return summed_ + (m * kRowsAtOnce + q % kRowsAtOnce) * stride_;
    return summed_ + ((m * depth_.taps + d % depth_.taps) * (end_ - first_) + q - first_) * stride_;
  }
  int64_t rows_of_slices() const {
    return depth_.taps == 1 ? kRowsAtOnce : depth_.taps * (end_ - first_);
  }

  // out = the sum over the windows from `from` on that hold pixel q, along one dimension.
  template <typename Slot>
  void sum_adjoint(const Extent& extent, int64_t q, int64_t from, const Slot& its_slot, A* out) {
    A taps[kMaxWindow];
    const A* sources[kMaxWindow];
    int64_t count = 0;
    for (int64_t p = std::max<int64_t>(0, from); p < from + extent.taps && p < extent.windows;
         ++p) {
      taps[count] = adjoint_tap(taps_.data(), extent, params_.padding, q, p);
      sources[count++] = its_slot(p);
    }
    across_rows<1>(sources, taps, count, width_.size, &out);
  }

  // The gradients of slice d of pixels, once all windows that hold them are done.
  void finish_slice(int64_t d) {
    for (int64_t q = first_; q < end_; ++q) {
      const A* sums[kAll];
      for (int m = 0; m < kAll; ++m) {
        sums[m] = nullptr;
        if (!needed_[m]) continue;
        const auto its_row = [&](int64_t p) { return of_slice(m, p, q); };
        sum_adjoint(depth_, d, d + depth_.pad - depth_.taps + 1, its_row, derivatives_[m]);
        sums[m] = derivatives_[m];
      }
      set_gradients(d, q, sums);
    }
    // The first elements of these rows are the zeros before a row of derivatives.
    for (int m = 0; m < kAll; ++m) {
      if (needed_[m]) std::fill_n(derivatives_[m], width_.taps - 1, A(0));
    }
  }

  void set_gradients(int64_t d, int64_t q, const A* const* sums) {
    const int64_t at = at_row(d, q);
    start_gradients(at);
    load_shifted(input_ + at, shift_x_, width_.size, x_);
    load_shifted(target_ + at, shift_y_, width_.size, y_);
    if (grad_input_) {
      add_gradients<true, F>(sums, sums + F::kShared, x_, y_, width_.size, grad_input_ + at);
    }
    if (grad_target_) {
      add_gradients<false, F>(sums, sums + F::kShared + F::kOwn, x_, y_, width_.size,
                              grad_target_ + at);
    }
  }

  static constexpr A kOne[1] = {A(1)};
  const WindowParams& params_;
  const F& formula_;
  const Extent &depth_, &height_, &width_;
  const int64_t plane_, first_, end_;
  const bool derives_;
  const int64_t padded_, stride_, slots_;
  std::vector<A> memory_, taps_;
  A* rows_ = nullptr;
  int64_t taken_ = 0, slice_ = 0, loaded_ = 0;
  const T *input_, *target_;
  A *grad_input_, *grad_target_, shift_x_ = 0, shift_y_ = 0;
  bool needed_[kAll];
  A *x_, *y_, *g_, *losses_, *padded_row_;
  A *products_[F::kMeans], *means_[kRowsAtOnce][F::kMeans];
  A *derivatives_[kAll] = {}, *summed_ = nullptr;
  A *sums_ = nullptr, *adjoint_sums_ = nullptr;  // rings of `slots_` rows for each
};

// ---- all planes -----------------------------------------------------------------------------------

// The losses of all planes, or the map, and the gradients that are needed. Bands depend on nothing
// but the shapes, so results do not depend on the number of threads.
template <typename T, typename F>
void run_windows(const WindowParams& params, const F& formula) {
  using A = typename F::Number;
  constexpr int64_t kManyPlanes = 8, kLongBand = 128, kShortBand = 64;
  const int64_t rows = params.planes < kManyPlanes ? kShortBand : kLongBand;
  const int64_t bands = (params.height.size + rows - 1) / rows;
  std::vector<double> losses(params.planes * bands), distances(params.planes * bands);
  const RowBlocks blocks(params.planes * bands, 1, 1);
  blocks.for_each([&](int64_t unit, int64_t, int64_t) {
    const int64_t first = unit % bands * rows;
    WindowBand<T, F> band(params, formula, unit / bands, first,
                          std::min(params.height.size, first + rows));
    band.run();
    losses[unit] = band.loss;
    distances[unit] = band.distance;
  });
  if (!params.losses) return;
  for (int64_t plane = 0; plane < params.planes; ++plane) {
    double loss = 0, distance = 0;
    for (int64_t unit = plane * bands; unit < (plane + 1) * bands; ++unit) {
      loss += losses[unit];
      distance += distances[unit];
    }
    static_cast<A*>(params.losses)[plane] = static_cast<A>(loss_of_plane(params, loss, distance));
  }
}

}  // namespace jitops::cpu
