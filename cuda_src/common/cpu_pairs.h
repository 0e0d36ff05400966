// Squared distances of all pairs of two sets of rows, a tile at a time, in one thread.
//
// They are sums of squared differences. The expansion |a|^2 + |b|^2 - 2 a.b is faster, because it
// is a matrix product. But it loses all digits for near points that are far from the origin.
#pragma once

#include <type_traits>
#include <vector>

#include "cpu_gemm.h"
#include "triplets.h"

namespace jitops::cpu {

constexpr int kPairVectors = 2;  // candidates of a tile, in registers

template <typename A>
constexpr int64_t kPairLanes = kPairVectors * Vector<A>::kCount;

// `kPairLanes` rows, transposed: element k of all of them, then element k + 1. Missing rows repeat
// the last one.
template <typename T, typename A>
void pack_rows(const T* rows, int64_t stride, int64_t count, int64_t cols, A* packed) {
  for (int64_t lane = 0; lane < kPairLanes<A>; ++lane) {
    const T* row = rows + std::min(lane, count - 1) * stride;
    for (int64_t k = 0; k < cols; ++k) packed[k * kPairLanes<A> + lane] = load(row[k]);
  }
}

// out[r][lane] += |a_r - b_lane|^2 for `kRows` dense rows a and the packed rows b.
template <int kRows, typename A>
[[gnu::always_inline]] inline void pair_tile(const A* a, int64_t cols, const A* packed, A* out) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount;
  V sums[kRows][kPairVectors] = {};
  for (int64_t k = 0; k < cols; ++k) {
    const A* right = packed + k * kPairLanes<A>;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kPairVectors; ++v) {
        const V difference = a[r * cols + k] - *reinterpret_cast<const V*>(right + v * kCount);
        sums[r][v] += difference * difference;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPairVectors; ++v) {
      *reinterpret_cast<V*>(out + r * kPairLanes<A> + v * kCount) += sums[r][v];
    }
  }
}

// out += for any number of rows.
template <typename A>
JITOPS_KERNEL void pair_tiles(const A* a, int64_t rows, int64_t cols, const A* packed, A* out) {
  constexpr int kRows = 6;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    pair_tile<kRows>(a + r * cols, cols, packed, out + r * kPairLanes<A>);
  }
  for (; r < rows; ++r) pair_tile<1>(a + r * cols, cols, packed, out + r * kPairLanes<A>);
}

// A tile of squared distances from some rows to `kPairLanes` candidates. Columns are taken in
// chunks that fit the cache.
template <typename T>
class PairTiles {
 public:
  using A = acc_t<T>;
  static constexpr int64_t kLanes = kPairLanes<A>;

  PairTiles(const T* rows, int64_t stride, int64_t count, int64_t cols)
      : rows_(rows),
        stride_(stride),
        count_(count),
        cols_(cols),
        chunk_(std::min(cols, kColumns)),
        widened_(count * chunk_),
        packed_(kLanes * chunk_),
        tile_(count * kLanes) {
    if (cols <= kColumns) widen(0, cols);
  }

  // Computes the tile of `count` candidates, at most kLanes.
  void compute(const T* candidates, int64_t stride, int64_t count) {
    std::fill(tile_.begin(), tile_.end(), A(0));
    for (int64_t first = 0; first < cols_; first += chunk_) {
      const int64_t size = std::min(chunk_, cols_ - first);
      if (cols_ > kColumns) widen(first, size);
      pack_rows(candidates + first, stride, count, size, packed_.data());
      pair_tiles(widened_.data(), count_, size, packed_.data(), tile_.data());
    }
  }

  // The distances of a row to the candidates.
  const A* row(int64_t i) const { return tile_.data() + i * kLanes; }

 private:
  static constexpr int64_t kColumns = 2048;

  void widen(int64_t first, int64_t size) {
    for (int64_t i = 0; i < count_; ++i) {
      const T* row = rows_ + i * stride_ + first;
      for (int64_t k = 0; k < size; ++k) widened_[i * size + k] = load(row[k]);
    }
  }

  const T* rows_;
  int64_t stride_, count_, cols_, chunk_;
  std::vector<A> widened_, packed_, tile_;
};

// ---- labels -------------------------------------------------------------------------------------

// An integer as wide as A, so that labels and distances fill registers alike.
template <typename A>
using LabelOf = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// Labels as small numbers, the same for equal labels of anchors and candidates.
template <typename L>
void number_labels(const Triplets& params, std::vector<L>* anchors, std::vector<L>* candidates) {
  std::vector<int64_t> known(params.candidate_labels, params.candidate_labels + params.others);
  std::sort(known.begin(), known.end());
  const auto number = [&](int64_t label) {
    const auto at = std::lower_bound(known.begin(), known.end(), label);
    return at != known.end() && *at == label ? static_cast<L>(at - known.begin()) : L(-1);
  };
  anchors->resize(params.rows);
  candidates->resize(params.others);
  for (int64_t i = 0; i < params.rows; ++i) (*anchors)[i] = number(params.anchor_labels[i]);
  for (int64_t j = 0; j < params.others; ++j) {
    (*candidates)[j] = number(params.candidate_labels[j]);
  }
}

}  // namespace jitops::cpu
