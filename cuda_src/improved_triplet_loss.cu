// The improved triplet loss on CUDA: kernels and launchers. No torch header.
//
// Both passes are bound by memory. The floor, for (rows, cols) elements of s bytes:
//   forward   3 * rows * cols * s bytes read
//   backward  3 * rows * cols * s read and 3 * rows * cols * s written; the row of the negative is
//             not read where the margin is inactive (d+ - d- < t1)
// Part of a warp takes a narrow row, a warp or a block a wide one. Several blocks share a row where
// there are too few rows to fill the device. Blocks stride over rows, so any number of rows fits
// the grid. Sums run in a fixed order without atomics, so results are bitwise deterministic.
#include "improved_triplet_loss.h"

#include "common/cuda.cuh"

namespace jitops::improved_triplet_loss {
namespace {

using cuda::load;
using cuda::Pack;
using cuda::store;

constexpr int kSumPacks = 64;  // a thread sums so many in acc_t<T>, and adds the sums in float64

// Loads of each tensor that a thread keeps in flight. Single elements are narrow, so one load of
// each tensor would not use the bandwidth of the memory.
template <typename T, int kWidth>
constexpr int kAhead = kWidth > 1 ? 1 : sizeof(T) == 8 ? 2 : 4;

template <typename T, int kWidth>
__device__ const Pack<T, kWidth>* row_of(const void* data, int64_t stride, int64_t row) {
  return reinterpret_cast<const Pack<T, kWidth>*>(static_cast<const T*>(data) + row * stride);
}

constexpr int kWarps = cuda::kMaxThreads / cuda::kWarp;

// One thread's share of the squared distances: every `step`-th pack of a row, from `first` on.
template <typename T, int kWidth>
__device__ void squared_distances(const Params& params, int64_t row, int64_t first, int64_t step,
                                  double* pos, double* neg) {
  using A = acc_t<T>;
  constexpr int kMany = kAhead<T, kWidth>;
  const A eps = static_cast<A>(params.eps);
  const int64_t packs = params.cols / kWidth;
  const auto* a = row_of<T, kWidth>(params.anchor, params.anchor_stride, row);
  const auto* p = row_of<T, kWidth>(params.positive, params.positive_stride, row);
  const auto* n = row_of<T, kWidth>(params.negative, params.negative_stride, row);
  *pos = *neg = 0;
  for (int64_t j = first; j < packs;) {
    A some_pos = 0, some_neg = 0;
    const auto add = [&](const Pack<T, kWidth>& x, const Pack<T, kWidth>& y,
                         const Pack<T, kWidth>& z) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const A u = load(x.values[k]) - load(y.values[k]) + eps;
        const A v = load(x.values[k]) - load(z.values[k]) + eps;
        some_pos += u * u;
        some_neg += v * v;
      }
    };
    int i = 0;
    if constexpr (kMany > 1) {
      for (; i < kSumPacks && j + (kMany - 1) * step < packs; i += kMany, j += kMany * step) {
        Pack<T, kWidth> x[kMany], y[kMany], z[kMany];
#pragma unroll
        for (int m = 0; m < kMany; ++m) {
          x[m] = a[j + m * step];
          y[m] = p[j + m * step];
          z[m] = n[j + m * step];
        }
#pragma unroll
        for (int m = 0; m < kMany; ++m) add(x[m], y[m], z[m]);
      }
    }
    for (; i < kSumPacks && j < packs; ++i, j += step) add(a[j], p[j], n[j]);
    *pos += static_cast<double>(some_pos);
    *neg += static_cast<double>(some_neg);
  }
}

// The loss of a row from its distances. Writes the state for the backward pass, and the loss if
// there is no reduction.
template <typename T, typename A = acc_t<T>>
__device__ double finish_row(const Params& params, int64_t row, A d_pos, A d_neg) {
  const auto [loss, state] = row_loss(params, d_pos, d_neg);
  params.state[row] = state;
  if (params.reduction == Reduction::kNone) store(static_cast<T*>(params.loss)[row], loss);
  return static_cast<double>(loss);
}

// The loss of all rows, by one thread.
template <typename T>
__device__ void store_reduced(const Params& params, double sum) {
  if (params.reduction == Reduction::kMean) sum /= static_cast<double>(params.rows);
  store(*static_cast<T*>(params.loss), static_cast<acc_t<T>>(sum));
}

// Budget: 64 registers, 192 bytes shared.
template <typename T, int kWidth>
__global__ void __launch_bounds__(cuda::kMaxThreads) forward_kernel(Params params) {
  using A = acc_t<T>;
  __shared__ A of_positive[kWarps];
  __shared__ A of_negative[kWarps];
  __shared__ double of_rows[kWarps];
  double sum = 0;  // losses of the rows that these threads took
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = first; row < params.rows; row += step) {
    double pos, neg;
    squared_distances<T, kWidth>(params, row, threadIdx.x, blockDim.x, &pos, &neg);
    const A d_pos = cuda::row_sum(static_cast<A>(pos), of_positive);
    const A d_neg = cuda::row_sum(static_cast<A>(neg), of_negative);
    if (threadIdx.x == 0) sum += finish_row<T>(params, row, d_pos, d_neg);
  }
  if (params.reduction == Reduction::kNone) return;
  const double total = cuda::block_sum(sum, of_rows);
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

// Few wide rows: gridDim.x blocks share a row. Budget: 64 registers, 128 bytes shared.
template <typename T, int kWidth>
__global__ void __launch_bounds__(cuda::kMaxThreads) split_kernel(Params params) {
  __shared__ double of_positive[kWarps];
  __shared__ double of_negative[kWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  double pos, neg;
  squared_distances<T, kWidth>(params, blockIdx.y, first, step, &pos, &neg);
  pos = cuda::block_sum(pos, of_positive);
  neg = cuda::block_sum(neg, of_negative);
  if (threadIdx.x != 0) return;
  double* out = params.partials + 2 * (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x);
  out[0] = pos;
  out[1] = neg;
}

// One block adds the partial sums of split_kernel. Budget: 64 registers, 64 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) finish_kernel(Params params, int splits) {
  using A = acc_t<T>;
  __shared__ double shared[kWarps];
  double sum = 0;
  for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) {
    double pos = 0, neg = 0;
    for (int i = 0; i < splits; ++i) {
      pos += params.partials[2 * (row * splits + i)];
      neg += params.partials[2 * (row * splits + i) + 1];
    }
    sum += finish_row<T>(params, row, static_cast<A>(pos), static_cast<A>(neg));
  }
  if (params.reduction == Reduction::kNone) return;
  sum = cuda::block_sum(sum, shared);
  if (threadIdx.x == 0) store_reduced<T>(params, sum);
}

// Budget: 80 registers, 0 bytes shared, 32 bytes spilt (float64).
template <typename T, int kWidth>
__global__ void __launch_bounds__(cuda::kMaxThreads) backward_kernel(Params params) {
  using A = acc_t<T>;
  constexpr int kMany = kAhead<T, kWidth>;
  const A beta = static_cast<A>(params.beta), eps = static_cast<A>(params.eps);
  const bool reduces = params.reduction != Reduction::kNone;
  const A weight = row_weight<A>(params);
  const T* grad_loss = static_cast<const T*>(params.grad_loss);
  T* grad_anchor = static_cast<T*>(params.grad_anchor);
  T* grad_positive = static_cast<T*>(params.grad_positive);
  T* grad_negative = static_cast<T*>(params.grad_negative);
  const int64_t packs = params.cols / kWidth;

  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = first; row < params.rows; row += step) {
    const A grad = load(grad_loss[reduces ? 0 : row]) * weight;
    const RowFactors<A> factors = row_factors(params.state[row], beta, grad);

    const auto* a = row_of<T, kWidth>(params.anchor, params.anchor_stride, row);
    const auto* p = row_of<T, kWidth>(params.positive, params.positive_stride, row);
    const auto* n = row_of<T, kWidth>(params.negative, params.negative_stride, row);
    const auto write = [&](int64_t j, const Pack<T, kWidth>& x, const Pack<T, kWidth>& y,
                           const Pack<T, kWidth>& z) {
      Pack<T, kWidth> of_anchor, of_positive, of_negative;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const A u = factors.pos * (load(x.values[k]) - load(y.values[k]) + eps);
        const A v = factors.reads_negative
                        ? factors.neg * (load(x.values[k]) - load(z.values[k]) + eps)
                        : A(0);
        store(of_anchor.values[k], u + v);
        store(of_positive.values[k], -u);
        store(of_negative.values[k], -v);
      }
      const int64_t at = row * params.cols + j * kWidth;
      if (grad_anchor) *reinterpret_cast<Pack<T, kWidth>*>(grad_anchor + at) = of_anchor;
      if (grad_positive) *reinterpret_cast<Pack<T, kWidth>*>(grad_positive + at) = of_positive;
      if (grad_negative) *reinterpret_cast<Pack<T, kWidth>*>(grad_negative + at) = of_negative;
    };
    const int64_t apart = static_cast<int64_t>(gridDim.y) * blockDim.x;
    int64_t j = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    if constexpr (kMany > 1) {
      for (; j + (kMany - 1) * apart < packs; j += kMany * apart) {
        Pack<T, kWidth> x[kMany], y[kMany], z[kMany];
#pragma unroll
        for (int m = 0; m < kMany; ++m) {
          x[m] = a[j + m * apart];
          y[m] = p[j + m * apart];
          z[m] = factors.reads_negative ? n[j + m * apart] : x[m];
        }
#pragma unroll
        for (int m = 0; m < kMany; ++m) write(j + m * apart, x[m], y[m], z[m]);
      }
    }
    for (; j < packs; j += apart) write(j, a[j], p[j], factors.reads_negative ? n[j] : a[j]);
  }
}

// ---- launch shapes ------------------------------------------------------------------------------

template <typename T>
bool in_packs(const Params& params) {
  return cuda::packs_fit<T>(params.anchor, params.anchor_stride) &&
         cuda::packs_fit<T>(params.positive, params.positive_stride) &&
         cuda::packs_fit<T>(params.negative, params.negative_stride) &&
         cuda::packs_fit<T>(params.grad_anchor, params.cols) &&
         cuda::packs_fit<T>(params.grad_positive, params.cols) &&
         cuda::packs_fit<T>(params.grad_negative, params.cols);
}

// At least one block, because an empty batch has a loss too.
unsigned blocks_for(int64_t rows, dim3 block) {
  const int64_t wanted = (rows + block.y - 1) / block.y;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted > kMaxBlocks ? kMaxBlocks : wanted);
}

// The number of blocks that share a row: more than 1 only for few and wide rows, where each thread
// of each block still gets some packs. The partial sums fit into params.partials.
int64_t splits_for(int64_t rows, int64_t packs) {
  constexpr int64_t kFewRows = 128, kSplitPacks = 4 * cuda::kMaxThreads;
  if (rows < 1 || rows > kFewRows) return 1;
  const int64_t wanted = packs / kSplitPacks, most = kMaxBlocks / 2 / rows;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

template <typename T, int kWidth>
const char* forward_as(const Params& params, void* stream) {
  const int64_t packs = params.cols / kWidth;
  const dim3 all(cuda::kMaxThreads), block = cuda::row_block(packs);
  if (const int64_t splits = splits_for(params.rows, packs); splits > 1) {
    const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(params.rows));
    const char* error = launch(split_kernel<T, kWidth>, grid, all, 0, stream, params);
    if (error) return error;
    return launch(finish_kernel<T>, dim3(1), all, 0, stream, params, static_cast<int>(splits));
  }
  const unsigned blocks = blocks_for(params.rows, block);
  const char* error = launch(forward_kernel<T, kWidth>, dim3(blocks), block, 0, stream, params);
  if (error || blocks == 1 || params.reduction == Reduction::kNone) return error;
  return launch(reduce_kernel<T>, dim3(1), all, 0, stream, params, static_cast<int>(blocks));
}

template <typename T, int kWidth>
const char* backward_as(const Params& params, void* stream) {
  const int64_t packs = params.cols / kWidth;
  const dim3 block = cuda::row_block(packs);
  const dim3 grid(blocks_for(params.rows, block),
                  static_cast<unsigned>(splits_for(params.rows, packs)));
  return launch(backward_kernel<T, kWidth>, grid, block, 0, stream, params);
}

}  // namespace

const char* launch_forward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWidth = cuda::kPackBytes / sizeof(T);
    return in_packs<T>(params) ? forward_as<T, kWidth>(params, stream)
                               : forward_as<T, 1>(params, stream);
  });
}

const char* launch_backward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWidth = cuda::kPackBytes / sizeof(T);
    return in_packs<T>(params) ? backward_as<T, kWidth>(params, stream)
                               : backward_as<T, 1>(params, stream);
  });
}

}  // namespace jitops::improved_triplet_loss
