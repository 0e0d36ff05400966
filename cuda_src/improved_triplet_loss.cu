// The improved triplet loss on CUDA: kernels and launchers. No torch header.
//
// Both passes are bound by memory. The floor, for (rows, cols) elements of s bytes:
//   forward   3 * rows * cols * s bytes read
//   backward  3 * rows * cols * s read and 3 * rows * cols * s written; where the negative takes no
//             part (d+ - d- < t1), its row is not read
// A row is a warp's work, or a block's when it is wide; both passes stride over rows, so any number
// of rows fits the grid. Sums run in a fixed order: no atomics, the same bits every time.
#include "improved_triplet_loss.h"

#include "common/cuda.cuh"

namespace jitops::improved_triplet_loss {
namespace {

using cuda::load;
using cuda::Pack;
using cuda::store;

constexpr int kSumPacks = 64;  // of a thread, summed in the type of T; their sums in float64

template <typename T, int kWidth>
__device__ const Pack<T, kWidth>* row_of(const void* data, int64_t stride, int64_t row) {
  return reinterpret_cast<const Pack<T, kWidth>*>(static_cast<const T*>(data) + row * stride);
}

// torch.clamp(x, min=bound), which lets NaN through.
template <typename A>
__device__ A clamp_min(A x, A bound) {
  return x < bound ? bound : x;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(cuda::kMaxThreads) forward_kernel(Params params) {
  using A = acc_t<T>;
  __shared__ A of_positive[cuda::kMaxThreads / cuda::kWarp];
  __shared__ A of_negative[cuda::kMaxThreads / cuda::kWarp];
  __shared__ double of_rows[cuda::kMaxThreads / cuda::kWarp];
  const A t1 = static_cast<A>(params.t1), t2 = static_cast<A>(params.t2);
  const A beta = static_cast<A>(params.beta), eps = static_cast<A>(params.eps);
  const int64_t packs = params.cols / kWidth;

  double sum = 0;  // of this thread row's losses
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = first; row < params.rows; row += step) {
    const auto* a = row_of<T, kWidth>(params.anchor, params.anchor_stride, row);
    const auto* p = row_of<T, kWidth>(params.positive, params.positive_stride, row);
    const auto* n = row_of<T, kWidth>(params.negative, params.negative_stride, row);
    double pos = 0, neg = 0;
    for (int64_t j = threadIdx.x; j < packs;) {
      A some_pos = 0, some_neg = 0;
      for (int i = 0; i < kSumPacks && j < packs; ++i, j += blockDim.x) {
        const Pack<T, kWidth> x = a[j], y = p[j], z = n[j];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const A u = load(x.values[k]) - load(y.values[k]) + eps;
          const A v = load(x.values[k]) - load(z.values[k]) + eps;
          some_pos += u * u;
          some_neg += v * v;
        }
      }
      pos += static_cast<double>(some_pos);
      neg += static_cast<double>(some_neg);
    }
    const A d_pos = cuda::row_sum(static_cast<A>(pos), of_positive);
    const A d_neg = cuda::row_sum(static_cast<A>(neg), of_negative);

    if (threadIdx.x == 0) {
      const A margin = d_pos - d_neg;
      const A loss = clamp_min(margin, t1) + beta * clamp_min(d_pos, t2);
      int state = 0;
      if (margin >= t1) state |= kMarginActive;
      if (d_pos >= t2) state |= kPositiveActive;
      if (isfinite(d_pos) && isfinite(d_neg)) state |= kFinite;
      params.state[row] = static_cast<uint8_t>(state);
      if (params.reduction == Reduction::kNone) store(static_cast<T*>(params.loss)[row], loss);
      sum += static_cast<double>(loss);
    }
  }

  if (params.reduction == Reduction::kNone) return;
  if (threadIdx.x == 0) of_rows[threadIdx.y] = sum;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    double total = 0;
    for (unsigned y = 0; y < blockDim.y; ++y) total += of_rows[y];
    params.partials[blockIdx.x] = total;
  }
}

// One block adds up what the blocks of forward_kernel left.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) reduce_kernel(Params params, int count) {
  __shared__ double shared[cuda::kMaxThreads / cuda::kWarp];
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += params.partials[i];
  sum = cuda::row_sum(sum, shared);
  if (threadIdx.x != 0) return;
  if (params.reduction == Reduction::kMean) sum /= static_cast<double>(params.rows);
  store(*static_cast<T*>(params.loss), static_cast<acc_t<T>>(sum));
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(cuda::kMaxThreads) backward_kernel(Params params) {
  using A = acc_t<T>;
  const A beta = static_cast<A>(params.beta), eps = static_cast<A>(params.eps);
  const bool reduces = params.reduction != Reduction::kNone;
  const A scale = params.reduction == Reduction::kMean ? A(1) / static_cast<A>(params.rows) : A(1);
  const T* grad_loss = static_cast<const T*>(params.grad_loss);
  T* grad_anchor = static_cast<T*>(params.grad_anchor);
  T* grad_positive = static_cast<T*>(params.grad_positive);
  T* grad_negative = static_cast<T*>(params.grad_negative);
  const int64_t packs = params.cols / kWidth;

  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = first; row < params.rows; row += step) {
    const int state = params.state[row];
    const A g = load(grad_loss[reduces ? 0 : row]) * scale;
    const A through_margin = state & kMarginActive ? g : A(0);
    const A c_pos = A(2) * (through_margin + (state & kPositiveActive ? beta * g : A(0)));
    const A c_neg = A(-2) * through_margin;
    const bool reads_negative = c_neg != A(0) || !(state & kFinite);

    const auto* a = row_of<T, kWidth>(params.anchor, params.anchor_stride, row);
    const auto* p = row_of<T, kWidth>(params.positive, params.positive_stride, row);
    const auto* n = row_of<T, kWidth>(params.negative, params.negative_stride, row);
    for (int64_t j = threadIdx.x; j < packs; j += blockDim.x) {
      const Pack<T, kWidth> x = a[j], y = p[j], z = reads_negative ? n[j] : a[j];
      Pack<T, kWidth> of_anchor, of_positive, of_negative;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const A u = c_pos * (load(x.values[k]) - load(y.values[k]) + eps);
        const A v =
            reads_negative ? c_neg * (load(x.values[k]) - load(z.values[k]) + eps) : A(0);
        store(of_anchor.values[k], u + v);
        store(of_positive.values[k], -u);
        store(of_negative.values[k], -v);
      }
      const int64_t at = row * params.cols + j * kWidth;
      if (grad_anchor) *reinterpret_cast<Pack<T, kWidth>*>(grad_anchor + at) = of_anchor;
      if (grad_positive) *reinterpret_cast<Pack<T, kWidth>*>(grad_positive + at) = of_positive;
      if (grad_negative) *reinterpret_cast<Pack<T, kWidth>*>(grad_negative + at) = of_negative;
    }
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

// At least one block, so that an empty batch is reduced too.
unsigned blocks_for(int64_t rows, dim3 block) {
  const int64_t wanted = (rows + block.y - 1) / block.y;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted > kMaxBlocks ? kMaxBlocks : wanted);
}

template <typename T, int kWidth>
const char* forward_as(const Params& params, void* stream) {
  const dim3 block = cuda::row_block(params.cols / kWidth);
  const unsigned blocks = blocks_for(params.rows, block);
  const char* error =
      launch(forward_kernel<T, kWidth>, dim3(blocks), block, 0, stream, params);
  if (error || params.reduction == Reduction::kNone) return error;
  return launch(reduce_kernel<T>, dim3(1), dim3(cuda::kMaxThreads), 0, stream, params,
                static_cast<int>(blocks));
}

template <typename T, int kWidth>
const char* backward_as(const Params& params, void* stream) {
  const dim3 block = cuda::row_block(params.cols / kWidth);
  return launch(backward_kernel<T, kWidth>, dim3(blocks_for(params.rows, block)), block, 0, stream,
                params);
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
