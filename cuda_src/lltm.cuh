// The LLTM on CUDA: the functions of the gates, and one kernel for a whole sequence.
#pragma once

#include "common/cuda.cuh"
#include "lltm.h"

namespace jitops::lltm {
namespace {

using cuda::load;
using cuda::store;

// ---- the gates' functions -----------------------------------------------------------------------

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float exp_minus_1(float x) { return expm1f(x); }
__device__ inline double exp_minus_1(double x) { return expm1(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

// Each function returns its derivative too. The usual formulas s (1 - s) and 1 - t^2 compute it
// from the rounded result. Where the function is flat, this loses all digits.
template <typename A>
struct Function {
  A value, slope;
};

template <typename A>
__device__ inline A minus_magnitude(A x) {
  return x < A(0) ? x : -x;
}

// The slope is sigmoid(x) sigmoid(-x); exp(-|x|) never overflows.
template <typename A>
__device__ inline Function<A> sigmoid(A x) {
  const A e = exponential(minus_magnitude(x)), larger = 1 / (1 + e), smaller = e * larger;
  return {x > A(0) ? larger : smaller, larger * smaller};
}

// The slope is 4 e / (1 + e)^2 with e = exp(-2 |x|).
template <typename A>
__device__ inline Function<A> tanh_of(A x) {
  const A e = exponential(2 * minus_magnitude(x)), inverse = 1 / (1 + e);
  return {hyperbolic_tangent(x), 4 * (e * inverse) * inverse};
}

template <typename A>
__device__ inline Function<A> elu(A x) {
  return {x > A(0) ? x : exp_minus_1(x), x > A(0) ? A(1) : exponential(x)};
}

// ---- all steps in one kernel --------------------------------------------------------------------

// A kernel for each step needs two launches a step, and a small state spends most of its time in
// them. The rows of a batch are independent. So a block takes up to kTileRows rows through all
// steps, and no block waits for another. A block has 3 kS threads, where kS is the size of the
// state, rounded up. Thread (part, at) has two roles:
//   - In the products it computes gate `part` of element `at`. It holds its row of the weights in
//     registers. The other factor lies in shared memory.
//   - Between the products it updates element `at` of row `part`. It holds the cell or its gradient
//     in a register.
// Two barriers a step separate the roles. Loads from global memory for the next step start before
// the product, so the product hides their latency.
//
// At size 128 a product takes 49,152 multiplications a row: 384 clocks of a multiprocessor. Its
// reads of shared memory overlap with it. Functions and barriers take 200 to 300 clocks. At 1.7 GHz
// this is 0.4 us a step for one row and 0.9 us for three. These figures are predictions, not
// measurements.

constexpr int kTileRows = 3;  // one for each gate, so that a thread has at most one element

// The dot product of kS numbers in registers and kS in shared memory, in a fixed order.
template <int kS>
__device__ inline float dot(const float (&weights)[kS], const float* shared) {
  float sums[4] = {};
#pragma unroll
  for (int k = 0; k < kS; k += 4) {
    const float4 four = *reinterpret_cast<const float4*>(shared + k);
    sums[0] += weights[k] * four.x;
    sums[1] += weights[k + 1] * four.y;
    sums[2] += weights[k + 2] * four.z;
    sums[3] += weights[k + 3] * four.w;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Stores x and returns the rounded value that a later read gives.
template <typename T>
__device__ inline float stored(void* data, int64_t at, float x) {
  T rounded;
  store(rounded, x);
  static_cast<T*>(data)[at] = rounded;
  return load(rounded);
}

template <typename T>
__device__ inline float read(const void* data, int64_t at) {
  return load(static_cast<const T*>(data)[at]);
}

// The place of a thread in the matrices of a step.
struct Place {
  int part, at;   // its gate, or its row in the other role; its element
  int rows;       // number of rows of the block
  bool real;      // whether the element exists
  bool has_row;   // whether the element and the row exist
  int64_t state;  // offset of the thread's element in a matrix of (rows, size)

  __device__ Place(const Sequence& all, int padded, int tile) {
    part = static_cast<int>(threadIdx.x) / padded;
    at = static_cast<int>(threadIdx.x) % padded;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * tile;
    rows = all.rows - first < tile ? static_cast<int>(all.rows - first) : tile;
    real = at < all.size;
    has_row = real && part < rows;
    state = (first + part) * all.size + at;
  }
};

// Budget: 168 registers, 33792 bytes shared.
template <typename T, int kS>
__global__ void __launch_bounds__(3 * kS) forward_sequence_kernel(Sequence all, int tile) {
  __shared__ __align__(16) float h[kTileRows][kS];
  __shared__ float gates[kTileRows][3 * kS];
  __shared__ float biases[3 * kS];  // one for each thread, because no register is left
  constexpr int kStaged = 16;
  __shared__ float staged[3 * kS][kStaged + 1];
  const Place my(all, kS, tile);
  const int size = static_cast<int>(all.size), unit = my.part * size + my.at;
  // Through shared memory: if each thread read its own row, each read would touch a cache line.
  float weights[kS];
#pragma unroll
  for (int k = 0; k < kS; k += kStaged) {
#pragma unroll 8  // eight reads in flight
    for (int n = 0; n < kStaged; ++n) {
      const int at = static_cast<int>(threadIdx.x) + n * 3 * kS, column = k + at % kStaged;
      const int part = at / kStaged / kS, element = at / kStaged % kS;
      const bool used = element < size && column < size;
      staged[at / kStaged][at % kStaged] =
          used ? read<T>(all.weights, (part * size + element) * all.weights_row + column) : 0;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kStaged; ++n) weights[k + n] = staged[threadIdx.x][n];
    __syncthreads();
  }
  biases[threadIdx.x] = my.real ? read<T>(all.bias, unit) : 0;
  float cell = my.has_row ? read<T>(all.old_cell, my.state) : 0;
  h[my.part][my.at] = my.has_row ? read<T>(all.old_h, my.state) : 0;
  // The offset of the thread's gate in the first row of the block.
  const auto gate_of = [&](int64_t state) { return 3 * state - 2 * unit; };
  int64_t state = my.state;
  float next[kTileRows];
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) {
    next[row] = my.real && row < my.rows ? read<T>(all.gates, gate_of(state) + row * 3 * size) : 0;
  }
  __syncthreads();
  for (int64_t left = all.steps; left > 0; --left) {
    const int64_t step = all.rows * size;
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) {
      if (row < my.rows) {
        const float sum = dot(weights, h[row]) + next[row] + biases[threadIdx.x];
        gates[row][threadIdx.x] = sum;
        if (my.real) {
          const int64_t gate = gate_of(state) + row * 3 * size;
          stored<T>(all.gates, gate, sum);
          if (left > 1) next[row] = read<T>(all.gates, gate + 3 * step);
        }
      }
    }
    __syncthreads();
    if (my.has_row) {
      const float* mine = gates[my.part] + my.at;
      cell += elu(mine[2 * kS]).value * sigmoid(mine[0]).value;
      static_cast<float*>(all.states)[state] = cell;
      h[my.part][my.at] =
          stored<T>(all.output, state, hyperbolic_tangent(cell) * sigmoid(mine[kS]).value);
    }
    state += step;
    __syncthreads();
  }
}

// The values that the backward pass reads for one element of one step.
struct Kept {
  float i, o, z, old, outside;

  template <typename T>
  __device__ void read_from(const Sequence& all, int64_t state, int at) {
    const int size = static_cast<int>(all.size);
    const int64_t before = state - all.rows * size, gate = 3 * state - 2 * at;
    i = read<T>(all.gates, gate);
    o = read<T>(all.gates, gate + size);
    z = read<T>(all.gates, gate + 2 * size);
    old = before < 0 ? read<T>(all.old_cell, state)
                     : static_cast<const float*>(all.states)[before];
    if (all.grad_output) outside = read<T>(all.grad_output, state);
  }
};

// Budget: 168 registers, 9216 bytes shared.
template <typename T, int kS>
__global__ void __launch_bounds__(3 * kS) backward_sequence_kernel(Sequence all, int tile) {
  __shared__ __align__(16) float grads[kTileRows][3 * kS];  // gradients of the gates
  __shared__ float parts[kTileRows][3 * kS];                // gradient of h from each gate
  const Place my(all, kS, tile);
  const int size = static_cast<int>(all.size);
  const T* column =
      static_cast<const T*>(all.weights) + my.part * size * all.weights_row + my.at;
  float weights[kS];
#pragma unroll
  for (int k = 0; k < kS; ++k) {
    weights[k] = my.real && k < size ? load(*column) : 0;
    column += all.weights_row;
  }
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) {
    grads[row][threadIdx.x] = 0;  // the padding beyond the size as well
    parts[row][threadIdx.x] = 0;  // no step follows the last one
  }
  int64_t state = (all.steps - 1) * all.rows * size + my.state;
  float grad_cell = my.has_row && all.grad_cell ? read<T>(all.grad_cell, my.state) : 0;
  Kept kept{};
  if (my.has_row) kept.read_from<T>(all, state, my.at);
  __syncthreads();
  for (int64_t left = all.steps;; --left) {
    if (my.has_row) {
      const auto i = sigmoid(kept.i), o = sigmoid(kept.o), z = elu(kept.z);
      const auto c = tanh_of(kept.old + z.value * i.value);
      const float* next = parts[my.part] + my.at;
      const float grad_h = kept.outside + (next[0] + next[kS] + next[2 * kS]);
      grad_cell += grad_h * o.value * c.slope;
      float* mine = grads[my.part] + my.at;
      const int64_t gate = 3 * state - 2 * my.at;
      mine[0] = stored<T>(all.grad_gates, gate, grad_cell * z.value * i.slope);
      mine[kS] = stored<T>(all.grad_gates, gate + size, grad_h * c.value * o.slope);
      mine[2 * kS] = stored<T>(all.grad_gates, gate + 2 * size, grad_cell * i.value * z.slope);
    }
    if (left == 1) break;
    state -= all.rows * size;
    if (my.has_row) kept.read_from<T>(all, state, my.at);
    __syncthreads();
#pragma unroll 1
    for (int row = 0; row < my.rows; ++row) {
      parts[row][threadIdx.x] = dot(weights, grads[row] + my.part * kS);
    }
    __syncthreads();
  }
  if (my.has_row && all.grad_old_cell) stored<T>(all.grad_old_cell, state, grad_cell);
}

// ---- launch -------------------------------------------------------------------------------------

template <int kS, typename Kernel>
const char* run_sequence(Kernel kernel, const Sequence& all, void* stream) {
  if (all.rows == 0) return nullptr;
  // One row a block until the blocks fill the multiprocessors of a large GPU.
  constexpr int64_t kBlocks = 128;
  const int64_t wanted = (all.rows + kBlocks - 1) / kBlocks;
  const int tile = static_cast<int>(wanted < kTileRows ? wanted : kTileRows);
  const auto blocks = static_cast<unsigned>((all.rows + tile - 1) / tile);
  return launch(kernel, dim3(blocks), dim3(3 * kS), 0, stream, all, tile);
}

template <int n>
struct Size {
  static constexpr int value = n;
};

// Calls f(T{}, Size<kS>{}) for the element type and the rounded-up size.
template <typename F>
const char* dispatch_sequence(DType dtype, const Sequence& all, const F& f) {
  const auto of_type = [&](auto zero) {
    if (all.size <= 32) return f(zero, Size<32>{});
    if (all.size <= 64) return f(zero, Size<64>{});
    return f(zero, Size<128>{});
  };
  switch (dtype) {
    case DType::kFloat32: return of_type(float{});
    case DType::kBFloat16: return of_type(__nv_bfloat16{});
    case DType::kFloat16: return of_type(__half{});
    default: return "no such kernel";
  }
}

}  // namespace
}  // namespace jitops::lltm
