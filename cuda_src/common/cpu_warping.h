// Alignments of two sequences on a CPU: strips of rows, and the costs of their anti-diagonals.
//
// A lane takes a row of a strip, and at step k it is at column k - lane. So the lanes of a step lie
// on an anti-diagonal, and depend on the two steps before alone.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "cpu.h"
#include "warping.h"

namespace jitops::cpu {

using warping::Pair;

constexpr int64_t kLanes = 32;

// The steps of a strip in which a lane is within the band.
struct Steps {
  double first[kLanes], last[kLanes];
};

// The strip of a pair that begins with `row`, and its steps: those in which some lane is in the band.
struct Strip {
  Steps steps;
  int64_t rows = 0, first = 0, end = 0;

  Strip() = default;
  Strip(const Pair& pair, int64_t row)
      : rows(std::min(kLanes, pair.rows - row)), first(pair.first(row)), full_first_(first) {
    constexpr double kFar = 1e290;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (lane < rows) {
        const int64_t its = pair.first(row + lane) + lane, after = pair.end(row + lane) + lane;
        steps.first[lane] = static_cast<double>(its);
        steps.last[lane] = static_cast<double>(after - 1);
        full_first_ = std::max(full_first_, its);
        full_last_ = lane == 0 ? after - 1 : std::min(full_last_, after - 1);
        end = std::max(end, after);
      } else {
        steps.first[lane] = kFar;
        steps.last[lane] = -kFar;
        full_last_ = -1;
      }
    }
  }

  // Whether all lanes are in the band at step k.
  bool full(int64_t k) const { return k >= full_first_ && k <= full_last_; }

 private:
  int64_t full_first_ = 0, full_last_ = -1;
};

// ---- costs: squared distances of two sequences, or given ----------------------------------------

JITOPS_KERNEL void add_squares(const double* __restrict x, const double* __restrict y,
                               int64_t x_stride, int64_t y_stride, int64_t features,
                               double* __restrict out) {
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) out[lane] = 0;
  int64_t d = 0;
  for (; d + 4 <= features; d += 4, x += 4 * x_stride, y += 4 * y_stride) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double a = x[lane] - y[lane];
      const double b = x[x_stride + lane] - y[y_stride + lane];
      const double c = x[2 * x_stride + lane] - y[2 * y_stride + lane];
      const double e = x[3 * x_stride + lane] - y[3 * y_stride + lane];
      out[lane] += (a * a + b * b) + (c * c + e * e);
    }
  }
  for (; d < features; ++d, x += x_stride, y += y_stride) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double a = x[lane] - y[lane];
      out[lane] += a * a;
    }
  }
}

// Two sequences, feature by feature. The second one is reversed, so that the lanes of a step read
// neighbours. Lanes outside of it read padding.
template <typename T>
class SequenceCosts {
 public:
  explicit SequenceCosts(const warping::Inputs& inputs)
      : features_(inputs.features),
        x_stride_(inputs.rows + kLanes),
        y_stride_(inputs.cols + 2 * kLanes),
        x_(features_ * x_stride_),
        y_(features_ * y_stride_) {}

  void start(const warping::Inputs& inputs, const Pair& pair) {
    pair_ = &pair;
    const T* x = static_cast<const T*>(inputs.x) + pair.number * inputs.rows * features_;
    const T* y = static_cast<const T*>(inputs.y) + pair.number * inputs.cols * features_;
    std::fill(x_.begin(), x_.end(), 0.0);
    std::fill(y_.begin(), y_.end(), 0.0);
    for (int64_t i = 0; i < pair.rows; ++i) {
      for (int64_t d = 0; d < features_; ++d) {
        x_[d * x_stride_ + i] = cpu::load(x[i * features_ + d]);
      }
    }
    for (int64_t j = 0; j < pair.cols; ++j) {
      for (int64_t d = 0; d < features_; ++d) {
        y_[d * y_stride_ + place(j)] = cpu::load(y[j * features_ + d]);
      }
    }
  }

  void costs(int64_t first_row, int64_t k, double* out) const {
    add_squares(x_.data() + first_row, y_.data() + place(k), x_stride_, y_stride_, features_, out);
  }

 protected:
  // Where column j lies.
  int64_t place(int64_t j) const { return kLanes + pair_->cols - 1 - j; }

  const Pair* pair_ = nullptr;
  int64_t features_, x_stride_, y_stride_;
  std::vector<double> x_, y_;
};

// A given matrix of costs.
template <typename T>
class GivenCosts {
 public:
  explicit GivenCosts(const warping::Inputs& inputs) : stride_(inputs.cols) {}

  void start(const warping::Inputs& inputs, const Pair& pair) {
    pair_ = &pair;
    cost_ = static_cast<const T*>(inputs.cost) + pair.number * inputs.rows * inputs.cols;
  }

  void costs(int64_t first_row, int64_t k, double* out) const {
    std::fill_n(out, kLanes, 0.0);
    each(first_row, k, [&](int64_t lane, int64_t at) { out[lane] = cpu::load(cost_[at]); });
  }

 protected:
  // f(lane, place) for the lanes that are within the matrix and its band.
  template <typename F>
  void each(int64_t first_row, int64_t k, const F& f) const {
    const int64_t end = std::min({kLanes, pair_->rows - first_row, k + 1});
    for (int64_t lane = std::max<int64_t>(0, k + 1 - pair_->cols); lane < end; ++lane) {
      const int64_t i = first_row + lane, j = k - lane;
      if (std::abs(i - j) <= pair_->bandwidth) f(lane, i * stride_ + j);
    }
  }

  const Pair* pair_ = nullptr;
  int64_t stride_;
  const T* cost_ = nullptr;
};

}  // namespace jitops::cpu
