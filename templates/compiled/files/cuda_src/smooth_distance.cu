// smooth_distance on CUDA: kernels and launchers. No torch header.
//
// Both passes are bound by memory. The floor, for (rows, cols) elements of s bytes:
//   forward   2 * rows * cols * s bytes read
//   backward  2 * rows * cols * s read and 2 * rows * cols * s written
// Part of a warp takes a narrow row, a block a wide one. Blocks stride over rows, so any number of
// rows fits the grid. Sums run in a fixed order without atomics, so results are bitwise
// deterministic. improved_triplet_loss.cu shows how to load 16 bytes at once, and how several
// blocks share a wide row.
#include "smooth_distance.h"

#include "common/cuda.cuh"

namespace jitops::smooth_distance {
namespace {

using cuda::load;
using cuda::store;

constexpr int kWarps = cuda::kMaxThreads / cuda::kWarp;

template <typename T>
__device__ const T* row_of(const void* data, int64_t stride, int64_t row) {
  return static_cast<const T*>(data) + row * stride;
}

// The loss of all rows, by one thread.
template <typename T>
__device__ void store_reduced(const Params& params, double sum) {
  store(*static_cast<T*>(params.loss), static_cast<acc_t<T>>(reduced(params, sum)));
}

// Budget: 64 registers, 192 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) forward_kernel(Params params) {
  __shared__ double of_row[2][kWarps];  // two, because a row may begin before all have read
  __shared__ double of_rows[kWarps];
  double total = 0;  // losses of the rows that these threads took
  int turn = 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = first; row < params.rows; row += step) {
    const T* x = row_of<T>(params.input, params.input_stride, row);
    const T* y = row_of<T>(params.target, params.target_stride, row);
    double sum = 0;
    for (int64_t j = threadIdx.x; j < params.cols; j += blockDim.x) {
      const double difference = load(x[j]) - load(y[j]);
      sum += difference * difference;
    }
    const double root = row_loss(params, cuda::row_sum(sum, of_row[turn]));
    turn = 1 - turn;
    if (threadIdx.x != 0) continue;
    params.roots[row] = root;
    total += root;
    if (params.reduction == Reduction::kNone) {
      store(static_cast<T*>(params.loss)[row], static_cast<acc_t<T>>(root));
    }
  }
  if (params.reduction == Reduction::kNone) return;
  total = cuda::block_sum(total, of_rows);
  if (threadIdx.x != 0 || threadIdx.y != 0) return;
  if (gridDim.x == 1) {
    store_reduced<T>(params, total);
  } else {
    params.partials[blockIdx.x] = total;
  }
}

// One block adds the partial sums of forward_kernel. Budget: 32 registers, 64 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) reduce_kernel(Params params, int count) {
  __shared__ double shared[kWarps];
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += params.partials[i];
  sum = cuda::block_sum(sum, shared);
  if (threadIdx.x == 0) store_reduced<T>(params, sum);
}

// Budget: 48 registers, 0 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) backward_kernel(Params params) {
  using A = acc_t<T>;
  const bool reduces = params.reduction != Reduction::kNone;
  const T* grad_loss = static_cast<const T*>(params.grad_loss);
  T* grad_input = static_cast<T*>(params.grad_input);
  T* grad_target = static_cast<T*>(params.grad_target);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = first; row < params.rows; row += step) {
    const A factor = row_factor(params, params.roots[row], load(grad_loss[reduces ? 0 : row]));
    const T* x = row_of<T>(params.input, params.input_stride, row);
    const T* y = row_of<T>(params.target, params.target_stride, row);
    for (int64_t j = threadIdx.x; j < params.cols; j += blockDim.x) {
      const A gradient = factor * (load(x[j]) - load(y[j]));
      const int64_t at = row * params.cols + j;
      if (grad_input) store(grad_input[at], gradient);
      if (grad_target) store(grad_target[at], -gradient);
    }
  }
}

// ---- launch shapes ------------------------------------------------------------------------------

// At least one block, because an empty batch has a loss too.
unsigned blocks_for(int64_t rows, dim3 block) {
  const int64_t wanted = (rows + block.y - 1) / block.y;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted > kMaxBlocks ? kMaxBlocks : wanted);
}

}  // namespace

const char* launch_forward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 block = cuda::row_block(params.cols);
    const unsigned blocks = blocks_for(params.rows, block);
    const char* error = launch(forward_kernel<T>, dim3(blocks), block, 0, stream, params);
    if (error || blocks == 1 || params.reduction == Reduction::kNone) return error;
    const dim3 all(cuda::kMaxThreads);
    return launch(reduce_kernel<T>, dim3(1), all, 0, stream, params, static_cast<int>(blocks));
  });
}

const char* launch_backward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    const dim3 block = cuda::row_block(params.cols);
    const dim3 grid(blocks_for(params.rows, block));
    return launch(backward_kernel<decltype(zero)>, grid, block, 0, stream, params);
  });
}

}  // namespace jitops::smooth_distance
