// Squared distances of all pairs of two sets of rows on CUDA, a tile in the registers of a block.
//
// They are sums of squared differences: 2 instructions for each, half the rate of a matrix product
// without tensor cores. The product would lose all digits for near points far from the origin.
#pragma once

#include "cuda.cuh"
#include "triplets.h"

namespace jitops::cuda {

constexpr int kTile = 64;   // anchors, and candidates, of a block at a time
constexpr int kChunk = 16;  // columns in shared memory at a time
constexpr int kSide = 16;   // threads along each side of a tile
static_assert(kSide * kSide == kMaxThreads);
constexpr int kEach = kTile / kSide;  // anchors, and candidates, of a thread

inline int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

template <typename A>
using PairChunk = A[kChunk][kTile + 1];  // in shared memory; the last column avoids bank conflicts

// The anchor, or the candidate, of a thread: number 0 to kEach - 1 of those in the tile.
__device__ inline int64_t anchor_of_thread(int r) { return threadIdx.y + kSide * r; }
__device__ inline int64_t candidate_of_thread(int c) { return threadIdx.x + kSide * c; }

// sums[r][c] = the squared distance of the thread's anchors [first_row, last_row) and candidates
// [first, last). Outside of these ranges it is of no use.
template <typename T, typename A>
__device__ void pair_tile(const Triplets& params, int64_t first_row, int64_t last_row,
                          int64_t first, int64_t last, PairChunk<A>& anchors,
                          PairChunk<A>& candidates, A (&sums)[kEach][kEach]) {
  const int thread = static_cast<int>(threadIdx.y) * kSide + static_cast<int>(threadIdx.x);
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) sums[r][c] = A(0);
  }
  for (int64_t column = 0; column < params.cols; column += kChunk) {
    __syncthreads();  // the chunk before has been read
#pragma unroll
    for (int k = thread; k < kTile * kChunk; k += kSide * kSide) {
      const int row = k / kChunk, at = k % kChunk;
      const bool inside = column + at < params.cols;
      const int64_t i = first_row + row, j = first + row;
      anchors[at][row] = inside && i < last_row ? load(anchor_row<T>(params, i)[column + at]) : A(0);
      candidates[at][row] = inside && j < last ? load(candidate_row<T>(params, j)[column + at]) : A(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      A a[kEach], b[kEach];
#pragma unroll
      for (int r = 0; r < kEach; ++r) a[r] = anchors[k][anchor_of_thread(r)];
#pragma unroll
      for (int c = 0; c < kEach; ++c) b[c] = candidates[k][candidate_of_thread(c)];
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
#pragma unroll
        for (int c = 0; c < kEach; ++c) {
          const A difference = a[r] - b[c];
          sums[r][c] += difference * difference;
        }
      }
    }
  }
}

}  // namespace jitops::cuda
