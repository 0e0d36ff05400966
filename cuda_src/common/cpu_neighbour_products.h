// The nearest neighbours of points in many dimensions, in one thread.
//
// A matrix product gives squared distances with an error that it can bound, in half the time of
// differences. All candidates within that bound are compared by their differences.
#pragma once

#include <cmath>

#include "cpu_neighbours.h"

namespace jitops::cpu {

// The squared Euclidean distance, or the sum of absolute differences.
template <typename A>
JITOPS_KERNEL A distance(int64_t norm, const A* a, const A* b, int64_t cols) {
  constexpr int64_t kSumElements = 1024;  // summed in A; these sums are added in float64
  double total = 0;
  for (int64_t first = 0; first < cols; first += kSumElements) {
    const int64_t end = std::min(cols, first + kSumElements);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = first; k < end; ++k) {
      const A difference = a[k] - b[k];
      sum += norm == 1 ? (difference < 0 ? -difference : difference) : difference * difference;
    }
    total += static_cast<double>(sum);
  }
  return static_cast<A>(total);
}

// The squared length of a - b, and this difference.
template <typename A>
JITOPS_KERNEL A shift_row(const A* a, const A* b, int64_t cols, A* out) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < cols; ++k) {
    const A difference = a[k] - b[k];
    out[k] = difference;
    sum += difference * difference;
  }
  return sum;
}

template <typename A>
JITOPS_KERNEL void add_row(const A* row, int64_t cols, double* sums) {
#pragma omp simd
  for (int64_t k = 0; k < cols; ++k) sums[k] += static_cast<double>(row[k]);
}

// approximate[lane] = length[lane] - 2 approximate[lane]
template <typename A>
JITOPS_KERNEL void add_lengths(const A* lengths, int64_t count, A* approximate) {
#pragma omp simd
  for (int64_t n = 0; n < count; ++n) approximate[n] = lengths[n] - A(2) * approximate[n];
}

template <typename A>
class Products {
 public:
  static constexpr int64_t kRows = 24;  // points that share a chunk of candidates

  // The clouds must outlive this.
  Products(const Cloud<A>& x, const Cloud<A>& y)
      : x_(x),
        y_(y),
        centre_(centre(y)),
        lengths_(y.count),
        near_(shifted()) {}

  // Fills the lists of points [begin, end) of x.
  template <typename F>
  void search(int64_t begin, int64_t end, const F& nearest) const {
    const int64_t cols = x_.cols;
    std::vector<A> rows(kRows * cols), approximate(kRows * kSweepBlock);
    std::vector<Approximate> best(kRows);
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t count = std::min(kRows, end - first);
      for (int64_t r = 0; r < count; ++r) {
        A* const row = rows.data() + r * cols;
        const A length = shift_row(x_.row(first + r), centre_.data(), cols, row);
        best[r].begin(nearest(first + r).k, slack(length));
      }
      for (int64_t block = 0; block < near_.blocks(); ++block) {
        const int64_t tiles = (near_.size_of(block) + kLanes - 1) / kLanes;
        for (int64_t t = 0; t < tiles; ++t) {
          const A* packed = near_.packed_of(block) + t * kLanes * cols;
          multiply_dense<A>({rows.data(), count, cols, cols, 1}, {packed, cols, kLanes, kLanes, 1},
                            {approximate.data() + t * kLanes, count, kLanes, kSweepBlock, 1},
                            false);
        }
        for (int64_t r = 0; r < count; ++r) {
          A* const of_row = approximate.data() + r * kSweepBlock;
          add_lengths(lengths_.data() + block * kSweepBlock, near_.size_of(block), of_row);
          best[r].take(of_row, near_.size_of(block), block * kSweepBlock);
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        const Nearest<A> list = nearest(first + r);
        best[r].for_each([&](int64_t j) {
          list.take(distance(2, x_.row(first + r), y_.row(j), cols), j);
        });
      }
    }
  }

 private:
  static constexpr int64_t kLanes = kPairLanes<A>;

  // The candidates of a point, by distances less its own squared length.
  class Approximate {
   public:
    void begin(int64_t k, A slack) {
      distances_.resize(k);
      at_.resize(k);
      nearest().clear();
      candidates_.clear();
      slack_ = slack;
    }

    void take(const A* d, int64_t count, int64_t first) {
      if (least_of(d, count) > limit()) return;
      for (int64_t n = 0; n < count; ++n) {
        if (d[n] > limit()) continue;  // NaN is compared as well
        candidates_.push_back({d[n], first + n});
        nearest().take(d[n], first + n);
      }
    }

    template <typename F>
    void for_each(const F& f) {
      for (const auto& [d, j] : candidates_) {
        if (!(d > limit())) f(j);
      }
    }

   private:
    struct Candidate {
      A d;
      int64_t at;
    };

    Nearest<A> nearest() {
      return {distances_.data(), at_.data(), static_cast<int64_t>(at_.size())};
    }
    A limit() { return nearest().worst() + slack_; }

    std::vector<A> distances_;
    std::vector<int64_t> at_;
    std::vector<Candidate> candidates_;
    A slack_ = 0;
  };

  // Twice the error: a product is off by at most D roundings of the product of the lengths, and a
  // few more come from the shift and the sums. If that overflows, all candidates are compared.
  A slack(A of_row) const {
    const A rounding = std::numeric_limits<A>::epsilon();
    const A slack = A(2) * static_cast<A>(x_.cols + 8) * rounding * (of_row + longest_);
    return slack < kFar<A> ? slack : kFar<A>;
  }

  // Distances do not depend on it, and products lose fewer digits.
  static std::vector<A> centre(const Cloud<A>& y) {
    std::vector<double> sums(y.cols);
    for (int64_t j = 0; j < y.count; ++j) add_row(y.row(j), y.cols, sums.data());
    std::vector<A> centre(y.cols);
    for (int64_t k = 0; k < y.cols; ++k) {
      centre[k] = static_cast<A>(sums[k] / static_cast<double>(y.count));
    }
    return centre;
  }

  // y less its centre. It notes the lengths too.
  Cloud<A> shifted() {
    const int64_t cols = y_.cols;
    std::vector<A> rows(y_.count * cols);
    for (int64_t j = 0; j < y_.count; ++j) {
      lengths_[j] = shift_row(y_.row(j), centre_.data(), cols, rows.data() + j * cols);
      longest_ = lengths_[j] > longest_ || !(lengths_[j] < kFar<A>) ? lengths_[j] : longest_;
    }
    return Cloud<A>(rows.data(), cols, y_.count, cols, true);
  }

  const Cloud<A>&x_, &y_;
  std::vector<A> centre_, lengths_;
  A longest_ = 0;
  Cloud<A> near_;  // the last one: `shifted` sets the others
};

}  // namespace jitops::cpu
