// The path of dynamic time warping on CUDA: kernel and launcher. No torch header.
//
// The floor is latency: the rows + cols steps of a pair depend on each other, at about 100 ns each,
// and so do the moves of the path. A block takes a pair. A thread takes a row of a tile, and the
// threads of a step lie on an anti-diagonal. One thread follows the moves. No atomics, so results
// are bitwise deterministic.
#include "dtw_path.h"

#include "common/warping.cuh"

namespace jitops::dtw_path {
namespace {

using cuda::kMaxThreads;
using cuda::kWarp;
using cuda::Tile;

constexpr int64_t kMaxPairs = 512;  // at a time: each has a scratch memory

struct Shared {
  double sums[2][kMaxThreads];  // of the last two steps
  double above[kMaxThreads];    // of the row above the tile
};

// Computes the moves of a tile. `kept` holds the sums of the row above, then those of the last row.
template <typename Source>
__device__ void sweep(const Params& params, const Pair& pair, const Source& source,
                      const Tile& tile, double* kept, uint8_t* moves, Shared& shared) {
  const double infinity = static_cast<double>(INFINITY);
  const auto above = [&](int64_t j) {
    const int64_t row = tile.row - 1;
    return row >= 0 && j >= pair.first(row) && j < pair.end(row) ? kept[j] : infinity;
  };
  double sum = infinity, corner = infinity;
  if (tile.thread == 0) corner = tile.row == 0 ? 0.0 : above(tile.first - 1);
  shared.sums[1][tile.thread] = sum;
  for (int64_t k = tile.first; k < tile.end; ++k) {
    const int64_t step = k - tile.first;
    const int slot = static_cast<int>(step % 2), ahead = static_cast<int>(step % tile.threads);
    if (ahead == 0) {
      // Columns that the last row of this tile has not reached yet.
      shared.above[tile.thread] = above(k + tile.thread);
      __syncthreads();
    }
    const double up =
        tile.thread == 0 ? shared.above[ahead] : shared.sums[1 - slot][tile.thread - 1];
    const bool valid = tile.valid(pair, k);
    const int64_t j = k - tile.thread;
    const Least least(corner, up, sum);
    sum = valid ? source.cost(tile.i, j) + least.sum : infinity;
    corner = up;
    if (valid) {
      moves[tile.i * params.cols + j] = least.move;
      if (tile.thread == tile.threads - 1) kept[j] = sum;
    }
    shared.sums[slot][tile.thread] = sum;
    __syncthreads();
  }
}

// Budget: 64 registers, 6400 bytes shared.
template <typename T, typename Source>
__global__ void __launch_bounds__(cuda::kMaxThreads) forward_kernel(Params params) {
  __shared__ Shared shared;
  __shared__ int64_t counted;
  uint8_t* moves = static_cast<uint8_t*>(params.moves) + blockIdx.x * params.rows * params.cols;
  double* kept = params.above + blockIdx.x * params.cols;
  const int64_t places = params.rows + params.cols - 1;
  for (int64_t number = blockIdx.x; number < params.pairs; number += gridDim.x) {
    const Pair pair(params, number);
    const Source source(params, pair);
    int64_t* path = params.path + number * places * 2;
    for (int64_t row = 0; pair.valid && row < pair.rows; row += blockDim.x) {
      sweep(params, pair, source, Tile(pair, row), kept, moves, shared);
    }
    if (threadIdx.x == 0) {  // from the end of the memory
      counted = 0;
      if (pair.valid) {
        const auto move = [&](int64_t i, int64_t j) -> int { return moves[i * params.cols + j]; };
        counted = trace(pair, move, [&](int64_t n, int64_t i, int64_t j) {
          path[2 * (places - 1 - n)] = i;
          path[2 * (places - 1 - n) + 1] = j;
        });
      }
      params.path_lengths[number] = counted;
    }
    __syncthreads();
    const int64_t count = counted, shift = 2 * (places - count);
    for (int64_t first = 0; first < 2 * places; first += blockDim.x) {
      const int64_t n = first + threadIdx.x;
      const int64_t one = n < 2 * count ? path[n + shift] : -1;
      __syncthreads();
      if (n < 2 * places) path[n] = one;
    }
    __syncthreads();
  }
}

}  // namespace

int64_t pairs_at_once(const Params& params) {
  return params.pairs < kMaxPairs ? params.pairs : kMaxPairs;
}

const char* launch_forward(DType dtype, const Params& params, void* stream) {
  const int64_t whole = (params.rows + kWarp - 1) / kWarp * kWarp;
  const dim3 block(static_cast<unsigned>(whole < kMaxThreads ? whole : kMaxThreads));
  const dim3 grid(static_cast<unsigned>(pairs_at_once(params)));
  return cuda::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return params.cost
               ? launch(forward_kernel<T, cuda::GivenCosts<T>>, grid, block, 0, stream, params)
               : launch(forward_kernel<T, cuda::SequenceCosts<T>>, grid, block, 0, stream, params);
  });
}

}  // namespace jitops::dtw_path
