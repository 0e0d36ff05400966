// Soft-DTW on CUDA: kernels and launchers. No torch header.
//
// The floor is latency: the rows + cols steps of a pair depend on each other, at about 100 ns each,
// in each direction. A block takes a pair from the first step to the last, in one launch: a thread
// takes a row of a tile, and the threads of a step lie on an anti-diagonal. The backward pass
// computes a tile again from the row above, with its weights, and then runs its steps backwards.
// Other kernels sum the gradients of the sequences. No atomics, so results are bitwise
// deterministic.
#include "soft_dtw.h"

#include "common/warping.cuh"

namespace jitops::soft_dtw {
namespace {

using cuda::kMaxThreads;
using cuda::kWarp;
using cuda::load;
using cuda::store;
using cuda::Tile;

constexpr int64_t kMaxPairs = 512;  // at a time: each has a scratch memory

// ---- costs and their gradients -------------------------------------------------------------------

template <typename T>
struct Sequences : cuda::SequenceCosts<T> {
  using A = acc_t<T>;
  A* alignment;

  __device__ Sequences(const Params& params, const Pair& pair)
      : cuda::SequenceCosts<T>(params, pair),
        alignment(static_cast<A*>(params.alignment) + pair.number * params.rows * params.cols) {}

  // The kernels that sum the gradients scale them.
  __device__ void put(int64_t place, A flow, A) const { alignment[place] = flow; }
};

template <typename T>
struct Costs : cuda::GivenCosts<T> {
  using A = acc_t<T>;
  T* gradient;

  __device__ Costs(const Params& params, const Pair& pair)
      : cuda::GivenCosts<T>(params, pair),
        gradient(static_cast<T*>(params.grad_cost) + pair.number * params.rows * params.cols) {}

  __device__ void put(int64_t place, A flow, A seed) const { store(gradient[place], seed * flow); }
};

// ---- a tile of rows -----------------------------------------------------------------------------

template <typename A>
struct Shared {
  A mantissas[2][kMaxThreads];       // of the last two steps
  double exponents[2][kMaxThreads];
  A above_mantissas[kMaxThreads];    // of the row above the tile, or what flows from below
  double above_exponents[kMaxThreads];
};

// A kept row of a pair, as if it began at column 0.
template <typename A>
struct Kept {
  A* mantissas;
  double* exponents;

  __device__ Kept(const Params& params, const Pair& pair, int64_t row) {
    const int64_t strip = row / kStripRows;
    const int64_t at = (pair.number * params.strips + strip) * params.kept - pair.first(row);
    mantissas = static_cast<A*>(params.mantissas) + at;
    exponents = params.exponents + at;
  }
};

// Memory of a block in the backward pass: the weights of all steps of a tile, three for each
// thread, and the gradient that flows from a tile into the row above it.
template <typename A>
struct Scratch {
  A* weights;
  A* flow;

  __device__ Scratch(const Params& params, int64_t block) {
    weights = static_cast<A*>(params.weights) + block * elements(params, blockDim.x);
    flow = weights + elements(params, blockDim.x) - params.cols;
  }
  __device__ A& weight(int64_t step, int which) const {
    return weights[(step * 3 + which) * blockDim.x + threadIdx.x];
  }
  JITOPS_BOTH static int64_t elements(const Params& params, int64_t threads) {
    const int64_t width = params.kept + threads;
    return 3 * threads * ((width < params.cols ? width : params.cols) + threads) + params.cols;
  }
};

// Computes a tile. The forward pass keeps rows and writes the value, the backward pass weighs.
template <bool kWeighs, typename A, typename Source>
__device__ void sweep(const Params& params, const Pair& pair, const Source& source,
                         const Tile& tile, const Scratch<A>& scratch, Shared<A>& shared) {
  const double scale = kInverseLn2 / params.gamma;
  const bool keeps = !kWeighs && (tile.i + 1) % kStripRows == 0 && tile.i + 1 < pair.rows;
  const auto above = [&](int64_t j) {
    const int64_t row = tile.row - 1;
    if (row < 0 || j < pair.first(row) || j >= pair.end(row)) return outside<A>();
    const Kept<A> kept(params, pair, row);
    return Cell<A>{kept.mantissas[j], kept.exponents[j]};
  };
  Cell<A> cell = outside<A>(), corner = outside<A>();
  if (tile.thread == 0) {
    corner = tile.row == 0 ? Cell<A>{A(1), 0.0} : above(tile.first - 1);
  }
  shared.mantissas[1][tile.thread] = cell.mantissa;
  shared.exponents[1][tile.thread] = cell.exponent;
  for (int64_t k = tile.first; k < tile.end; ++k) {
    const int64_t step = k - tile.first;
    const int slot = static_cast<int>(step % 2), ahead = static_cast<int>(step % tile.threads);
    if (ahead == 0) {
      const Cell<A> one = above(k + tile.thread);
      shared.above_mantissas[tile.thread] = one.mantissa;
      shared.above_exponents[tile.thread] = one.exponent;
      __syncthreads();
    }
    const Cell<A> up =
        tile.thread == 0
            ? Cell<A>{shared.above_mantissas[ahead], shared.above_exponents[ahead]}
            : Cell<A>{shared.mantissas[1 - slot][tile.thread - 1],
                      shared.exponents[1 - slot][tile.thread - 1]};
    const bool valid = tile.valid(pair, k);
    const int64_t j = k - tile.thread;
    const Step<A> next(valid ? source.cost(tile.i, j) * scale : 0.0, up, cell, corner);
    cell = valid ? next.cell : outside<A>();
    corner = up;
    if (kWeighs) {
      const A inverse = valid ? A(1) / next.sum : A(0);
      scratch.weight(step, 0) = valid ? next.up * inverse : A(0);
      scratch.weight(step, 1) = valid ? next.left * inverse : A(0);
      scratch.weight(step, 2) = valid ? next.diagonal * inverse : A(0);
    }
    if (valid && keeps) {
      const Kept<A> kept(params, pair, tile.i);
      kept.mantissas[j] = cell.mantissa;
      kept.exponents[j] = cell.exponent;
    }
    if (!kWeighs && tile.i == pair.rows - 1 && j == pair.cols - 1) {
      params.value[pair.number] = value_of(params, cell);
    }
    shared.mantissas[slot][tile.thread] = cell.mantissa;
    shared.exponents[slot][tile.thread] = cell.exponent;
    __syncthreads();
  }
}

// The gradient of a value. One that is not finite has none.
template <typename A>
__device__ A seed_of(const Params& params, int64_t number) {
  const double value = params.value[number];
  return static_cast<A>(value - value == 0 ? params.grad_value[number] : NAN);
}

// The gradient flows from each cell to its predecessors, by its weights.
template <typename A, typename Source>
__device__ void sweep_back(const Params& params, const Pair& pair, const Source& source,
                           const Tile& tile, const Scratch<A>& scratch, Shared<A>& shared, A seed) {
  A(&ups)[2][kMaxThreads] = shared.mantissas;
  __shared__ A diagonals[2][kMaxThreads];
  const int last = tile.threads - 1;
  const int64_t last_row = tile.row + last;
  const bool ends = last_row >= pair.rows - 1;
  A left = tile.i == pair.rows - 1 ? A(1) : A(0);  // of the last cell; scaled at the end
  A below_diagonal = 0, last_diagonal = 0;
  ups[1][tile.thread] = A(0);
  diagonals[1][tile.thread] = A(0);
  for (int64_t k = tile.end - 1; k >= tile.first; --k) {
    const int64_t step = tile.end - 1 - k;
    const int slot = static_cast<int>(step % 2), ahead = static_cast<int>(step % tile.threads);
    if (ahead == 0) {  // the last thread needs one a step, of lower columns each time
      const int64_t j = k - last - tile.thread;
      const bool there = !ends && j >= pair.first(last_row) && j < pair.end(last_row);
      shared.above_mantissas[tile.thread] = there ? scratch.flow[j] : A(0);
      __syncthreads();
    }
    A flow = left + below_diagonal;
    flow += tile.thread == last ? shared.above_mantissas[ahead] : ups[1 - slot][tile.thread + 1];
    flow = flow < kLeast<A> ? A(0) : flow;
    below_diagonal = tile.thread == last ? A(0) : diagonals[1 - slot][tile.thread + 1];
    const int64_t at = k - tile.first, j = k - tile.thread;
    const A up = flow * scratch.weight(at, 0), diagonal = flow * scratch.weight(at, 2);
    left = flow * scratch.weight(at, 1);
    if (tile.valid(pair, k)) source.put(tile.i * params.cols + j, flow, seed);
    if (tile.thread == 0) {
      if (k < params.cols) scratch.flow[k] = up + last_diagonal;
      if (k == tile.first && k > 0) scratch.flow[k - 1] = diagonal;
      last_diagonal = diagonal;
    }
    ups[slot][tile.thread] = up;
    diagonals[slot][tile.thread] = diagonal;
    __syncthreads();
  }
}

// Budget: 64 registers, 12288 bytes shared, 12 bytes spilt.
template <typename T, typename Source>
__global__ void __launch_bounds__(cuda::kMaxThreads) forward_kernel(Params params) {
  __shared__ Shared<acc_t<T>> shared;
  for (int64_t number = blockIdx.x; number < params.pairs; number += gridDim.x) {
    const Pair pair(params, number);
    const Source source(params, pair);
    const Scratch<acc_t<T>> none(params, 0);
    if (not_all_kept(params)) {
      const int64_t count = params.strips * params.kept, at = number * count;
      for (int64_t n = threadIdx.x; n < count; n += blockDim.x) {
        static_cast<acc_t<T>*>(params.mantissas)[at + n] = 0;
        params.exponents[at + n] = 0;
      }
      __syncthreads();
    }
    if (!pair.valid) {
      if (threadIdx.x == 0) params.value[number] = static_cast<double>(NAN);
      continue;
    }
    for (int64_t row = 0; row < pair.rows; row += blockDim.x) {
      sweep<false>(params, pair, source, Tile(pair, row), none, shared);
    }
  }
}

// Budget: 128 registers, 16384 bytes shared, 12 bytes spilt.
template <typename T, typename Source>
__global__ void __launch_bounds__(cuda::kMaxThreads) backward_kernel(Params params) {
  using A = acc_t<T>;
  __shared__ Shared<A> shared;
  const Scratch<A> scratch(params, blockIdx.x);
  for (int64_t number = blockIdx.x; number < params.pairs; number += gridDim.x) {
    const Pair pair(params, number);
    const Source source(params, pair);
    const int64_t cells = params.rows * params.cols;
    const A empty = pair.valid ? A(0) : static_cast<A>(NAN);
    for (int64_t n = threadIdx.x; n < cells; n += blockDim.x) source.put(n, empty, A(1));
    if (!pair.valid) continue;
    __syncthreads();
    const A seed = seed_of<A>(params, number);
    for (int64_t row = (pair.rows - 1) / blockDim.x * blockDim.x; row >= 0; row -= blockDim.x) {
      const Tile tile(pair, row);
      sweep<true>(params, pair, source, tile, scratch, shared);
      sweep_back(params, pair, source, tile, scratch, shared, seed);
    }
  }
}

// A warp sums over the columns, for a row of x. Budget: 64 registers, 0 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) rows_kernel(Params params) {
  using A = acc_t<T>;
  const int64_t all = params.pairs * params.rows;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; n < all;
       n += step) {
    const int64_t number = n / params.rows, i = n % params.rows;
    const Pair pair(params, number);
    const A factor = 2 * seed_of<A>(params, number);
    const A* flows = static_cast<const A*>(params.alignment) + n * params.cols;
    const T* x = static_cast<const T*>(params.x) + n * params.features;
    const T* y = static_cast<const T*>(params.y) + number * params.cols * params.features;
    T* gradient = static_cast<T*>(params.grad_x) + n * params.features;
    for (int64_t d = 0; d < params.features; ++d) {
      A sum = 0;
      if (i < pair.rows) {
        const A mine = load(x[d]);
        for (int64_t j = threadIdx.x; j < pair.cols; j += kWarp) {
          sum += flows[j] * (mine - load(y[j * params.features + d]));
        }
      }
      sum = cuda::lanes_sum(sum, kWarp);
      if (threadIdx.x == 0) store(gradient[d], i < pair.rows ? factor * sum : A(0));
    }
  }
}

// A thread sums over the rows, for a column: a feature of a step of y.
// Budget: 64 registers, 0 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) columns_kernel(Params params) {
  using A = acc_t<T>;
  const int64_t all = params.pairs * params.features * params.cols;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < all;
       n += step) {
    const int64_t j = n % params.cols, d = n / params.cols % params.features;
    const int64_t number = n / params.cols / params.features;
    const Pair pair(params, number);
    const int64_t at = (number * params.cols + j) * params.features + d;
    A sum = 0;
    if (j < pair.cols) {
      const A mine = load(static_cast<const T*>(params.y)[at]);
      const T* x = static_cast<const T*>(params.x) + number * params.rows * params.features + d;
      const A* flows = static_cast<const A*>(params.alignment) + number * params.rows * params.cols;
      for (int64_t i = 0; i < pair.rows; ++i) {
        sum += flows[i * params.cols + j] * (mine - load(x[i * params.features]));
      }
      sum *= 2 * seed_of<A>(params, number);
    }
    store(static_cast<T*>(params.grad_y)[at], sum);
  }
}

// ---- launch shapes ------------------------------------------------------------------------------

constexpr int64_t kMaxBlocks = 65535;

int64_t threads_for(int64_t rows) {
  const int64_t whole = (rows + kWarp - 1) / kWarp * kWarp;
  return whole < kMaxThreads ? whole : kMaxThreads;
}

int64_t pairs_at_once(int64_t pairs) { return pairs < kMaxPairs ? pairs : kMaxPairs; }

unsigned blocks_for(int64_t items, int64_t each) {
  const int64_t wanted = (items + each - 1) / each;
  return static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
}

template <typename Kernel>
const char* run_pairs(Kernel kernel, const Params& params, void* stream) {
  return launch(kernel, dim3(static_cast<unsigned>(pairs_at_once(params.pairs))),
                dim3(static_cast<unsigned>(threads_for(params.rows))), 0, stream, params);
}

}  // namespace

int64_t scratch_elements(const Params& params) {
  return pairs_at_once(params.pairs) *
         Scratch<float>::elements(params, threads_for(params.rows));
}

const char* launch_forward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return params.cost ? run_pairs(forward_kernel<T, Costs<T>>, params, stream)
                       : run_pairs(forward_kernel<T, Sequences<T>>, params, stream);
  });
}

const char* launch_backward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    if (params.cost) return run_pairs(backward_kernel<T, Costs<T>>, params, stream);
    const char* error = run_pairs(backward_kernel<T, Sequences<T>>, params, stream);
    const int64_t rows = params.pairs * params.rows;
    if (!error && params.grad_x && params.features > 0) {
      constexpr int kWarps = kMaxThreads / kWarp;
      error = launch(rows_kernel<T>, dim3(blocks_for(rows, kWarps)), dim3(kWarp, kWarps), 0, stream,
                     params);
    }
    const int64_t elements = params.pairs * params.cols * params.features;
    if (!error && params.grad_y && elements > 0) {
      error = launch(columns_kernel<T>, dim3(blocks_for(elements, kMaxThreads)), dim3(kMaxThreads),
                     0, stream, params);
    }
    return error;
  });
}

}  // namespace jitops::soft_dtw
