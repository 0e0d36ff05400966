// Alignments of two sequences on CUDA: the costs of a pair, and a tile of its rows.
#pragma once

#include "cuda.cuh"
#include "warping.h"

namespace jitops::cuda {

using warping::Pair;

// Squared distances of two sequences.
template <typename T>
struct SequenceCosts {
  const T* x;
  const T* y;
  int64_t features;

  __device__ SequenceCosts(const warping::Inputs& inputs, const Pair& pair)
      : x(static_cast<const T*>(inputs.x) + pair.number * inputs.rows * inputs.features),
        y(static_cast<const T*>(inputs.y) + pair.number * inputs.cols * inputs.features),
        features(inputs.features) {}

  __device__ double cost(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < features; ++d) {
      const double a = static_cast<double>(load(x[i * features + d])) -
                       static_cast<double>(load(y[j * features + d]));
      sum += a * a;
    }
    return sum;
  }
};

template <typename T>
struct GivenCosts {
  const T* costs;
  int64_t cols;

  __device__ GivenCosts(const warping::Inputs& inputs, const Pair& pair)
      : costs(static_cast<const T*>(inputs.cost) + pair.number * inputs.rows * inputs.cols),
        cols(inputs.cols) {}

  __device__ double cost(int64_t i, int64_t j) const {
    return static_cast<double>(load(costs[i * cols + j]));
  }
};

// The tile that begins with `row`, and the steps [first, end) in which it meets the band.
struct Tile {
  int64_t row, i, first, end;
  int thread, threads;

  __device__ Tile(const Pair& pair, int64_t row_) : row(row_) {
    thread = static_cast<int>(threadIdx.x);
    threads = static_cast<int>(blockDim.x);
    i = row + thread;
    first = pair.first(row);
    const int64_t last = pair.rows - row < threads ? pair.rows - 1 : row + threads - 1;
    end = pair.end(last) + (last - row);
  }
  __device__ bool valid(const Pair& pair, int64_t k) const {
    const int64_t j = k - thread;
    return i < pair.rows && j >= pair.first(i) && j < pair.end(i);
  }
};

}  // namespace jitops::cuda
