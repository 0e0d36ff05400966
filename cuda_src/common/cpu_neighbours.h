// The nearest neighbours of points in one thread, by the distances of all pairs.
//
// Distances are sums of differences, a tile at a time in registers. A block of points keeps nothing
// but the least distance of each point. The block that holds a neighbour is searched once more for
// its index, because that takes less time than to track the index of every minimum.
#pragma once

#include <limits>
#include <vector>

#include "cpu_gemm.h"
#include "cpu_pairs.h"

namespace jitops::cpu {

constexpr int kSweepRows = kTileVectors == 4 ? 6 : 3;  // rows of a tile; its sums are in registers
constexpr int64_t kSweepBlock = 192;  // points of a block, a multiple of rows and lanes of a tile

template <typename A>
constexpr A kFar = std::numeric_limits<A>::infinity();

// The k nearest candidates of a point so far, the nearest first. Missing ones have the index -1.
template <typename A>
struct Nearest {
  A* distances;
  int64_t* at;
  int64_t k;

  A worst() const { return distances[k - 1]; }

  void clear() const {
    std::fill_n(distances, k, kFar<A>);
    std::fill_n(at, k, int64_t{-1});
  }

  // Takes a candidate that is near enough. Of equal distances the lower index comes first. NaN and
  // infinity are never near enough.
  void take(A d, int64_t j) const {
    const auto before = [&](int64_t n) {
      return d < distances[n] || (d == distances[n] && j < at[n]);
    };
    int64_t n = k - 1;
    if (!before(n)) return;
    for (; n > 0 && before(n - 1); --n) {
      distances[n] = distances[n - 1];
      at[n] = at[n - 1];
    }
    distances[n] = d;
    at[n] = j;
  }
};

template <typename T, typename A>
JITOPS_KERNEL void widen_row(const T* row, int64_t cols, A* out) {
#pragma omp simd
  for (int64_t k = 0; k < cols; ++k) out[k] = load(row[k]);
}

// Points in the type of computation: row by row, and as tiles of kPairLanes points, where element k
// of all points precedes element k + 1. Both end with points of NaN, which are nobody's neighbours.
template <typename A>
struct Cloud {
  static constexpr int64_t kLanes = kPairLanes<A>;
  int64_t count, cols;
  std::vector<A> rows, packed;

  template <typename T>
  Cloud(const T* data, int64_t stride, int64_t count_, int64_t cols_, bool packs)
      : count(count_),
        cols(cols_),
        rows((packs ? blocks() * kSweepBlock : count) * cols, std::numeric_limits<A>::quiet_NaN()) {
    for (int64_t i = 0; i < count; ++i) {
      widen_row(data + i * stride, cols, rows.data() + i * cols);
    }
    if (!packs) return;
    packed.resize(rows.size());
    for (int64_t first = 0; first < count; first += kLanes) {
      for (int64_t k = 0; k < cols; ++k) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          packed[first * cols + k * kLanes + lane] = rows[(first + lane) * cols + k];
        }
      }
    }
  }

  const A* row(int64_t i) const { return rows.data() + i * cols; }
  int64_t blocks() const { return (count + kSweepBlock - 1) / kSweepBlock; }
  int64_t size_of(int64_t block) const { return std::min(kSweepBlock, count - block * kSweepBlock); }
  const A* rows_of(int64_t block) const { return rows.data() + block * kSweepBlock * cols; }
  const A* packed_of(int64_t block) const { return packed.data() + block * kSweepBlock * cols; }
};

template <typename A>
using IntegerVector
    __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias)) = LabelOf<A>;

// sums = the distances of `kRows` rows to the points of a tile.
template <int kNorm, int kDims, int kRows, typename A>
[[gnu::always_inline]] inline void sweep_tile(
    const A* rows, int64_t cols, const A* packed,
    typename Vector<A>::Type (&sums)[kRows][kPairVectors]) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPairVectors; ++v) sums[r][v] = V{};
  }
  const int64_t dims = kDims ? kDims : cols;
#pragma GCC unroll 4
  for (int64_t k = 0; k < dims; ++k) {
    const A* right = packed + k * kPairLanes<A>;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kPairVectors; ++v) {
        const V difference = rows[r * dims + k] - *reinterpret_cast<const V*>(right + v * kCount);
        if constexpr (kNorm == 1) {
          constexpr LabelOf<A> kSign = std::numeric_limits<LabelOf<A>>::max();
          sums[r][v] += (V)((IntegerVector<A>)difference & kSign);
        } else {
          sums[r][v] += difference * difference;
        }
      }
    }
  }
}

// Of some rows and the tiles of a block: the least distance of each row, in a vector of lanes, and
// that of each point of the tiles.
template <int kNorm, int kDims, typename A>
JITOPS_KERNEL void block_minima(const A* rows, int64_t count, int64_t cols, const A* packed,
                                int64_t tiles, A* of_rows, A* of_points) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kCount = Vector<A>::kCount, kLanes = kPairLanes<A>;
  std::fill_n(of_points, tiles * kLanes, kFar<A>);
  for (int64_t r = 0; r < count; r += kSweepRows) {
    V least[kSweepRows];
#pragma GCC unroll 8
    for (V& one : least) one = V{} + kFar<A>;
    for (int64_t t = 0; t < tiles; ++t) {
      V sums[kSweepRows][kPairVectors];
      sweep_tile<kNorm, kDims>(rows + r * cols, cols, packed + t * kLanes * cols, sums);
#pragma GCC unroll 4
      for (int v = 0; v < kPairVectors; ++v) {
        V& at = *reinterpret_cast<V*>(of_points + t * kLanes + v * kCount);
        V of_point = at;
#pragma GCC unroll 8
        for (int n = 0; n < kSweepRows; ++n) {  // if a sum is NaN, the minimum stays
          least[n] = sums[n][v] < least[n] ? sums[n][v] : least[n];
          of_point = sums[n][v] < of_point ? sums[n][v] : of_point;
        }
        at = of_point;
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kSweepRows; ++n) {
      *reinterpret_cast<V*>(of_rows + (r + n) * kCount) = least[n];
    }
  }
}

template <int kNorm, typename A>
[[gnu::always_inline]] inline void row_tile(const A* row, int64_t cols, const A* packed, A* out) {
  using V = typename Vector<A>::Type;
  V sums[1][kPairVectors];
  sweep_tile<kNorm, 0>(row, cols, packed, sums);
#pragma GCC unroll 4
  for (int v = 0; v < kPairVectors; ++v) {
    *reinterpret_cast<V*>(out + v * Vector<A>::kCount) = sums[0][v];
  }
}

// The distances of a row to the points of some tiles.
template <typename A>
JITOPS_KERNEL void row_distances(int64_t norm, const A* row, int64_t cols, const A* packed,
                                 int64_t tiles, A* out) {
  for (int64_t t = 0; t < tiles; ++t, packed += kPairLanes<A> * cols, out += kPairLanes<A>) {
    if (norm == 1) {
      row_tile<1>(row, cols, packed, out);
    } else {
      row_tile<2>(row, cols, packed, out);
    }
  }
}

template <typename A>
JITOPS_KERNEL A least_of(const A* values, int64_t count) {
  A least = kFar<A>;
#pragma omp simd reduction(min : least)
  for (int64_t n = 0; n < count; ++n) least = values[n] < least ? values[n] : least;
  return least;
}

template <typename A>
void minima(int64_t norm, const Cloud<A>& x, int64_t block, const Cloud<A>& y, int64_t other,
            A* of_rows, A* of_points) {
  const int64_t tiles = (y.size_of(other) + kPairLanes<A> - 1) / kPairLanes<A>;
  auto* const kernel = norm == 1     ? &block_minima<1, 0, A>
                       : x.cols == 3 ? &block_minima<2, 3, A>
                                     : &block_minima<2, 0, A>;
  kernel(x.rows_of(block), x.size_of(block), x.cols, y.packed_of(other), tiles, of_rows, of_points);
}

// Takes the points of a block that are near enough to a row.
template <typename A>
void take_from_block(int64_t norm, const A* row, const Cloud<A>& y, int64_t block,
                     const Nearest<A>& nearest) {
  A d[kSweepBlock];
  const int64_t tiles = (y.size_of(block) + kPairLanes<A> - 1) / kPairLanes<A>;
  row_distances(norm, row, y.cols, y.packed_of(block), tiles, d);
  for (int64_t n = 0; n < y.size_of(block); ++n) {
    if (d[n] <= nearest.worst()) nearest.take(d[n], block * kSweepBlock + n);
  }
}

// The least distance of each point to the rows of some blocks, and the first block that has it.
template <typename A>
struct BlockOf {
  std::vector<A> least;
  std::vector<int64_t> block;

  explicit BlockOf(int64_t count) : least(count, kFar<A>), block(count, -1) {}

  void take(int64_t i, A d, int64_t from) {
    if (!(d < least[i])) return;
    least[i] = d;
    block[i] = from;
  }
};

// The neighbours in y of the points of blocks [begin, end) of x: `nearest(i)` is the list of point
// i. `of_y` takes the nearest block of x for each point of y, if it is not null.
template <typename A, typename F>
void sweep(int64_t norm, const Cloud<A>& x, int64_t begin, int64_t end, const Cloud<A>& y,
           const F& nearest, BlockOf<A>* of_y) {
  constexpr int64_t kCount = Vector<A>::kCount;
  std::vector<A> of_rows((kSweepBlock + kSweepRows) * kCount), of_points(kSweepBlock);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kSweepBlock, rows = x.size_of(block);
    BlockOf<A> of_x(rows);
    for (int64_t other = 0; other < y.blocks(); ++other) {
      minima(norm, x, block, y, other, of_rows.data(), of_points.data());
      for (int64_t r = 0; r < rows; ++r) {
        const A least = least_of(of_rows.data() + r * kCount, kCount);
        const Nearest<A> list = nearest(first + r);
        if (list.k == 1) {
          of_x.take(r, least, other);
        } else if (least < list.worst()) {
          take_from_block(norm, x.row(first + r), y, other, list);
        }
      }
      for (int64_t n = 0; of_y && n < y.size_of(other); ++n) {
        of_y->take(other * kSweepBlock + n, of_points[n], block);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (of_x.block[r] < 0) continue;
      take_from_block(norm, x.row(first + r), y, of_x.block[r], nearest(first + r));
    }
  }
}

}  // namespace jitops::cpu
