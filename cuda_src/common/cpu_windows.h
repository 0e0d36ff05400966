// Losses of local windows on the CPU, in both passes at once.
//
// A band of rows goes through these steps, a few rows and slices of windows at a time, so that all
// rows between the images and the gradients stay in a CPU's cache:
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
#include <memory>
#include <vector>

#include "cpu_window_rows.h"
#include "cpu_window_sums.h"
#include "windows.h"

namespace jitops::cpu {

constexpr int64_t kAtOnce = 8;   // rows, and slices, of windows at most
constexpr int64_t kFewTaps = 7;  // so few rows, or slices, are as fast one by one

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
        taps_(params.taps, params.taps + kMaxWindow),
        equal_(width_.taps > kFewTaps &&
               std::count(taps_.begin(), taps_.begin() + width_.taps, taps_[0]) == width_.taps),
        rows_at_once_(height_.taps == 1 ? 1 : equal_ ? kAtOnce : kAtOnce / 2),
        slices_at_once_(depth_.taps == 1 ? 1 : equal_ ? kAtOnce : kAtOnce / 2),
        slots_(height_.taps + rows_at_once_ - 1),
        memory_(rows_in_all() * stride_ + kCount),
        narrow_((width_.size + kCount - 1) / kCount * kCount),
        rings_((F::kMeans + (derives_ ? kAll : 0)) * slices_at_once_ * slots_ * narrow_ + kCount),
        planes_(new A[derives_ ? kAll * rows_of_slices() * narrow_ + kCount : 0]) {
    rows_ = aligned(memory_.data());
    const int64_t offset = plane * params.pixels();
    input_ = static_cast<const T*>(params.input) + offset;
    target_ = static_cast<const T*>(params.target) + offset;
    grad_input_ = params.grad_input ? static_cast<A*>(params.grad_input) + offset : nullptr;
    grad_target_ = params.grad_target ? static_cast<A*>(params.grad_target) + offset : nullptr;
    for (int m = 0; m < kAll; ++m) {
      needed_[m] = derives_ && (m < F::kShared ||
                                (m < F::kShared + F::kOwn ? grad_input_ : grad_target_));
    }
    x_ = take(loaded_slices()), y_ = take(loaded_slices());
    for (A** row : {&g_, &losses_, &padded_row_, &zeros_}) *row = take(1);
    for (int64_t i = 0; i < F::kMeans * slices_at_once_; ++i) products_[i] = take(1);
    for (int64_t r = 0; r < rows_at_once_; ++r) {
      for (A*& row : means_[r]) row = take(1);
    }
    sums_ = aligned(rings_.data());
    if (!derives_) return;
    for (A*& row : derivatives_) row = take(1);
    finished_ = take(kAll * slices_at_once_);
    summed_ = aligned(planes_.get());
    adjoint_sums_ = sums_ + F::kMeans * slices_at_once_ * slots_ * narrow_;
  }

  void run() {
    shift_x_ = shift_of(input_), shift_y_ = shift_of(target_);
    if (params_.l1_weight != 0) {
      for (int64_t d = 0; d < depth_.size; ++d) {
        for (int64_t row = first_; row < end_; ++row) distance += distance_of(at_row(d, row));
      }
    }
    int64_t finished = 0;
    for (int64_t d = 0; d < depth_.windows; d += slices_) {
      slices_ = std::min(slices_at_once_, depth_.windows - d);
      take_slices(d);
      if (!derives_ || depth_.taps == 1) continue;
      const int64_t ready = d + slices_ == depth_.windows ? depth_.size : d + slices_ - depth_.pad;
      while (finished < ready) {
        const int64_t count = std::min(slices_at_once_, ready - finished);
        finish_slices(finished, count);
        finished += count;
      }
    }
  }

 private:
  static constexpr int64_t kCount = Vector<A>::kCount;

  int64_t rows_in_all() const {
    const int64_t of_all = derives_ ? kAll * (1 + slices_at_once_) : 0;
    return 4 + 2 * loaded_slices() + F::kMeans * (rows_at_once_ + slices_at_once_) + of_all;
  }
  int64_t loaded_slices() const { return depth_.taps + slices_at_once_ - 1; }
  static A* aligned(A* memory) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    return memory + (kVectorBytes - address % kVectorBytes) / sizeof(A);
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

  // Computes the windows of slices [d, d + slices_), and their share of the gradients of pixels.
  void take_slices(int64_t d) {
    slice_ = d;
    const int64_t reach = derives_ ? height_.taps - 1 - height_.pad : 0;
    const int64_t last = derives_ ? end_ + height_.pad : end_;
    loaded_ = std::max<int64_t>(0, first_ - reach) - height_.pad;
    for (int64_t p = first_ - reach; p < last; p += rows_at_once_) {
      const int64_t end = std::min(last, p + rows_at_once_);
      take_windows(std::max<int64_t>(0, p), std::min(end, height_.windows));
      if (derives_) {
        take_gradients(std::max(first_, p - height_.pad), std::min(end_, end - height_.pad));
      }
    }
  }

  A* slot(A* ring, int64_t m, int64_t row) const {
    return ring + (m * slots_ + (row + 4 * kMaxWindow) % slots_) * narrow_;
  }
  Taps<A> taps_along(const Extent& extent) const {
    if (extent.taps == 1) return {kOne, 1, false};
    return {taps_.data(), extent.taps, equal_};
  }

  // Rows [first, end) of windows, at most rows_at_once_.
  void take_windows(int64_t first, int64_t end) {
    if (first >= end) return;
    for (; loaded_ < end - height_.pad + height_.taps - 1; ++loaded_) load_row(loaded_);
    for (int64_t s = 0; s < slices_; ++s) {
      for (int m = 0; m < F::kMeans; ++m) {
        A* out[kAtOnce];
        for (int64_t r = 0; r < end - first; ++r) out[r] = means_[r][m];
        sum_across(
            height_, first - height_.pad, end - first, width_.windows,
            [&](int64_t row) { return slot(sums_, s * F::kMeans + m, row); }, out);
      }
      for (int64_t p = first; p < end; ++p) losses_of(s, p, means_[p - first]);
    }
  }

  // The sums of rows, or of slices, from `from` on, for so many of them.
  template <typename Slot>
  void sum_across(const Extent& extent, int64_t from, int64_t count, int64_t width,
                  const Slot& its_slot, A* const* out) const {
    const A* sources[kMaxWindow + kAtOnce];
    for (int64_t i = 0; i < extent.taps + count - 1; ++i) sources[i] = its_slot(from + i);
    across_rows(sources, taps_along(extent), count, width, out);
  }

  // Row i of the padded images: products, summed over the depth and along the row.
  void load_row(int64_t i) {
    const int64_t row = pixel_at(i, height_.size, params_.padding), pad = width_.pad;
    A outside[F::kMeans];  // all taps add up to 1
    F::products(-shift_x_, -shift_y_, outside);
    if (row < 0) {
      for (int64_t m = 0; m < slices_ * F::kMeans; ++m) {
        std::fill_n(slot(sums_, m, i), width_.windows, outside[m % F::kMeans]);
      }
      return;
    }
    const A *x[kMaxWindow + kAtOnce], *y[kMaxWindow + kAtOnce];
    for (int64_t k = 0; k < depth_.taps + slices_ - 1; ++k) {
      const int64_t d = pixel_at(slice_ - depth_.pad + k, depth_.size, params_.padding);
      const int64_t at = d < 0 ? -1 : at_row(d, row);
      x[k] = load_row_of(input_, at, shift_x_, x_ + k * stride_);
      y[k] = load_row_of(target_, at, shift_y_, y_ + k * stride_);
    }
    A* inner[kAtOnce * F::kMeans];
    for (int64_t m = 0; m < slices_ * F::kMeans; ++m) inner[m] = products_[m] + pad;
    sum_products<F>(x, y, taps_along(depth_), slices_, width_.size, inner);
    for (int64_t m = 0; m < slices_ * F::kMeans; ++m) {
      for (int64_t j = 1; j <= pad; ++j) {
        const bool reflects = params_.padding == Padding::kReflect;
        inner[m][-j] = reflects ? inner[m][j] : outside[m % F::kMeans];
        inner[m][width_.size - 1 + j] =
            reflects ? inner[m][width_.size - 1 - j] : outside[m % F::kMeans];
      }
      along_row(products_[m], taps_along(width_), width_.windows, slot(sums_, m, i));
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

  // The losses of row p of windows of slice s of those at once, and their derivatives, summed along
  // the row.
  void losses_of(int64_t s, int64_t p, A* const* means) {
    const int64_t at =
        ((plane_ * depth_.windows + slice_ + s) * height_.windows + p) * width_.windows;
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
      along_row(derivatives_[m], taps_along(width_), padded_, padded_row_);
      fold(padded_row_);
      std::copy_n(padded_row_ + width_.pad, width_.size, slot(adjoint_sums_, s * kAll + m, p));
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

  // What rows [first, end) of pixels have from these slices of windows.
  void take_gradients(int64_t first, int64_t end) {
    if (first >= end) return;
    for (int64_t i = 0; i < slices_ * kAll; ++i) {
      const int m = static_cast<int>(i % kAll);
      if (!needed_[m]) continue;
      A* out[kAtOnce];
      for (int64_t q = first; q < end; ++q) out[q - first] = of_slice(m, slice_ + i / kAll, q);
      sum_windows_of(
          height_, first, end - first, [&](int64_t p) { return slot(adjoint_sums_, i, p); }, out);
    }
    if (depth_.taps > 1) return;
    for (int64_t q = first; q < end; ++q) {
      const A* sums[kAll];
      for (int m = 0; m < kAll; ++m) sums[m] = needed_[m] ? of_slice(m, slice_, q) : nullptr;
      set_gradients(slice_, q, sums);
    }
  }

  // Rows of the sums over a slice of windows, for all slices that some pixels at once are in.
  // Without a depth they are for some rows, which are used at once.
  A* of_slice(int m, int64_t d, int64_t q) const {
    if (depth_.taps == 1) return summed_ + (m * rows_at_once_ + q % rows_at_once_) * narrow_;
    const int64_t at = (m * loaded_slices() + d % loaded_slices()) * (end_ - first_) + q - first_;
    return summed_ + at * narrow_;
  }
  int64_t rows_of_slices() const {
    return depth_.taps == 1 ? rows_at_once_ : loaded_slices() * (end_ - first_);
  }

  // The sums over the windows that hold pixel q, and those after it, along one dimension.
  template <typename Slot>
  void sum_windows_of(const Extent& extent, int64_t q, int64_t count, const Slot& its_slot,
                      A* const* out) const {
    const int64_t before = extent.pad - extent.taps + 1;
    const int64_t last = extent.size - 1 - extent.pad;  // that no reflection reaches
    if (params_.padding != Padding::kReflect || (q > extent.pad && q + count - 1 < last)) {
      const auto slot_or_zeros = [&](int64_t p) {
        return p < 0 || p >= extent.windows ? zeros_ : its_slot(p);
      };
      sum_across(extent, q + before, count, width_.size, slot_or_zeros, out);
      return;
    }
    for (int64_t r = 0; r < count; ++r) {
      A weights[kMaxWindow];
      const A* sources[kMaxWindow];
      int64_t windows = 0;
      for (int64_t k = 0; k < extent.taps; ++k) {
        const int64_t p = q + r + before + k;
        if (p < 0 || p >= extent.windows) continue;
        weights[windows] = adjoint_tap(taps_.data(), extent, params_.padding, q + r, p);
        sources[windows++] = its_slot(p);
      }
      across_rows(sources, Taps<A>{weights, windows, false}, 1, width_.size, out + r);
    }
  }

  // The gradients of some slices of pixels from d on, once all windows that hold them are done.
  void finish_slices(int64_t d, int64_t count) {
    for (int64_t q = first_; q < end_; ++q) {
      const A* sums[kAtOnce][kAll] = {};
      for (int m = 0; m < kAll; ++m) {
        if (!needed_[m]) continue;
        A* out[kAtOnce];
        for (int64_t s = 0; s < count; ++s) {
          sums[s][m] = out[s] = finished_ + (s * kAll + m) * stride_;
        }
        sum_windows_of(
            depth_, d, count, [&](int64_t p) { return of_slice(m, p, q); }, out);
      }
      for (int64_t s = 0; s < count; ++s) set_gradients(d + s, q, sums[s]);
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
  const int64_t padded_, stride_;  // elements of a row with its border, and from row to row
  const std::vector<A> taps_;
  const bool equal_;  // taps, and not few
  const int64_t rows_at_once_, slices_at_once_, slots_;
  std::vector<A> memory_;
  const int64_t narrow_;  // from row to row without a border
  std::vector<A> rings_;
  const std::unique_ptr<A[]> planes_;
  A* rows_ = nullptr;
  int64_t taken_ = 0, slice_ = 0, slices_ = 0, loaded_ = 0;
  const T *input_, *target_;
  A *grad_input_, *grad_target_, shift_x_ = 0, shift_y_ = 0;
  bool needed_[kAll];
  A *x_, *y_, *g_, *losses_, *padded_row_, *zeros_;
  A *products_[kAtOnce * F::kMeans], *means_[kAtOnce][F::kMeans];
  A *derivatives_[kAll] = {}, *finished_ = nullptr, *summed_ = nullptr;
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
