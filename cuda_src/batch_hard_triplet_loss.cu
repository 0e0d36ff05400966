// The batch-hard triplet loss on CUDA: kernels and launchers. No torch header.
//
// The forward pass is bound by arithmetic: rows * others * cols differences, squared and summed.
// The floor is 2 instructions each. The backward pass moves about 6 * rows * cols elements.
//
// Blocks write the hardest candidates of their share, and a second kernel compares the shares. No
// atomics, so results are bitwise deterministic.
#include "batch_hard_triplet_loss.h"

#include "common/pairs.cuh"

namespace jitops::batch_hard_triplet_loss {
namespace {

using cuda::kEach;
using cuda::kSide;
using cuda::kTile;
using cuda::load;
using cuda::store;
using cuda::tiles_of;

constexpr int64_t kMaxBlocks = 1024;  // of finish_kernel: each writes two partial sums
constexpr int64_t kWantedBlocks = 1024;  // of mine_kernel, to fill a large GPU
constexpr int kWarps = cuda::kMaxThreads / cuda::kWarp;

// The hardest candidate of one kind so far. `key` is larger for a harder one.
template <typename A>
struct Hardest {
  A key;
  int64_t at;  // -1 if there is none

  // Of equally hard ones the first is taken.
  __device__ void take(A other, int64_t other_at) {
    if (other_at < 0) return;
    if (at < 0 || other > key || (other == key && other_at < at)) {
      key = other;
      at = other_at;
    }
  }
};

// The scratch memory: the hardest candidates of each share, then the partial sums.
template <typename A>
struct Scratch {
  A* keys;      // (2, splits, rows): of positives, of negatives
  int64_t* at;  // (2, splits, rows)
  double* sums;  // (2, kMaxBlocks): losses, counts

  JITOPS_BOTH Scratch(void* data, int64_t rows, int64_t splits) {
    sums = static_cast<double*>(data);
    at = reinterpret_cast<int64_t*>(sums + 2 * kMaxBlocks);
    keys = reinterpret_cast<A*>(at + 2 * splits * rows);
  }
};

// Budget: 128 registers, 16640 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) mine_kernel(Params params, int64_t per_split) {
  using A = acc_t<T>;
  __shared__ cuda::PairChunk<A> anchors, candidates;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * per_split;
  const int64_t end = begin + per_split < params.others ? begin + per_split : params.others;
  Hardest<A> positive[kEach], negative[kEach];
#pragma unroll
  for (int r = 0; r < kEach; ++r) positive[r] = negative[r] = {A(0), -1};

  for (int64_t first = begin; first < end; first += kTile) {
    A sums[kEach][kEach];
    cuda::pair_tile<T>(params, first_row, params.rows, first, end, anchors, candidates, sums);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const int64_t i = first_row + cuda::anchor_of_thread(r);
      if (i >= params.rows) continue;
      const int64_t label = params.anchor_labels[i];
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        const int64_t j = first + cuda::candidate_of_thread(c);
        if (j >= end || (params.same && i == j)) continue;
        // NaN is as hard as can be: infinitely far, or nearer than 0.
        const A squared = sums[r][c];
        const bool valid = squared == squared;
        if (params.candidate_labels[j] == label) {
          positive[r].take(valid ? squared : static_cast<A>(INFINITY), j);
        } else {
          negative[r].take(valid ? -squared : A(1), j);
        }
      }
    }
  }
  const int64_t shares = static_cast<int64_t>(gridDim.y) * params.rows;
  const Scratch<A> scratch(params.partials, params.rows, gridDim.y);
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    Hardest<A> kinds[] = {positive[r], negative[r]};
    const int64_t i = first_row + cuda::anchor_of_thread(r);
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
#pragma unroll
      for (int offset = kSide / 2; offset > 0; offset /= 2) {
        const A key = __shfl_xor_sync(0xffffffffu, kinds[kind].key, offset);
        const long long at = __shfl_xor_sync(
            0xffffffffu, static_cast<long long>(kinds[kind].at), offset);
        kinds[kind].take(key, at);
      }
      if (threadIdx.x == 0 && i < params.rows) {
        const int64_t place = kind * shares + blockIdx.y * params.rows + i;
        scratch.keys[place] = kinds[kind].key;
        scratch.at[place] = kinds[kind].at;
      }
    }
  }
}

// The distance of two rows, by a warp; every lane gets it.
template <typename T>
__device__ acc_t<T> warp_distance(const Params& params, int64_t i, int64_t j) {
  using A = acc_t<T>;
  constexpr int kSum = 64;  // a lane sums so many in acc_t<T>, and adds the sums in float64
  const T* a = anchor_row<T>(params, i);
  const T* b = candidate_row<T>(params, j);
  double total = 0;
  for (int64_t k = threadIdx.x; k < params.cols;) {
    A some = 0;
    for (int n = 0; n < kSum && k < params.cols; ++n, k += cuda::kWarp) {
      const A difference = load(a[k]) - load(b[k]);
      some += difference * difference;
    }
    total += static_cast<double>(some);
  }
  return distance<A>(params, cuda::lanes_sum(total, cuda::kWarp));
}

// One warp an anchor. Budget: 64 registers, 128 bytes shared, 8 bytes spilt.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) finish_kernel(Params params, int64_t splits) {
  using A = acc_t<T>;
  __shared__ double of_losses[kWarps];
  __shared__ double of_counts[kWarps];
  const Scratch<A> scratch(params.partials, params.rows, splits);
  A* distances = static_cast<A*>(params.distances);
  double sum = 0, count = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < params.rows;
       i += step) {
    int64_t at[2];
    A d[2] = {A(0), A(0)};
    for (int kind = 0; kind < 2; ++kind) {
      Hardest<A> best = {A(0), -1};
      for (int64_t split = 0; split < splits; ++split) {
        const int64_t place = (kind * splits + split) * params.rows + i;
        best.take(scratch.keys[place], scratch.at[place]);
      }
      at[kind] = best.at;
      if (best.at >= 0) d[kind] = warp_distance<T>(params, i, best.at);
    }
    if (threadIdx.x != 0) continue;
    const bool both = at[0] >= 0 && at[1] >= 0;
    const A loss = both ? hinge(params, d[0] - d[1]) : A(0);
    params.positive[i] = at[0];
    params.negative[i] = at[1];
    distances[i] = d[0];
    distances[params.rows + i] = d[1];
    if (params.reduction == Reduction::kNone) store(static_cast<T*>(params.loss)[i], loss);
    sum += static_cast<double>(loss);
    count += both ? 1 : 0;
  }
  sum = cuda::block_sum(sum, of_losses);
  count = cuda::block_sum(count, of_counts);
  if (threadIdx.x != 0 || threadIdx.y != 0) return;
  scratch.sums[blockIdx.x] = sum;
  scratch.sums[kMaxBlocks + blockIdx.x] = count;
}

// One block adds the partial sums of finish_kernel. Budget: 52 registers, 128 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) reduce_kernel(Params params, int64_t splits,
                                                                   int blocks) {
  using A = acc_t<T>;
  __shared__ double of_losses[kWarps];
  __shared__ double of_counts[kWarps];
  const Scratch<A> scratch(params.partials, params.rows, splits);
  double sum = 0, count = 0;
  for (int i = static_cast<int>(threadIdx.x); i < blocks; i += cuda::kMaxThreads) {
    sum += scratch.sums[i];
    count += scratch.sums[kMaxBlocks + i];
  }
  sum = cuda::block_sum(sum, of_losses);
  count = cuda::block_sum(count, of_counts);
  if (threadIdx.x != 0) return;
  *params.count = static_cast<int64_t>(count);
  if (params.reduction == Reduction::kNone) return;
  if (params.reduction == Reduction::kMean) sum /= divisor(params, *params.count);
  store(*static_cast<T*>(params.loss), static_cast<A>(sum));
}

// gradient += sign * (the gradient of anchor i's loss with respect to the anchor itself), for its
// positive, its negative or both. With respect to that candidate it is the opposite.
template <typename T, typename A>
__device__ void add_terms(const Params& params, int64_t i, bool of_positive, bool of_negative,
                          A sign, A* gradient) {
  const int64_t p = params.positive[i], n = params.negative[i];
  if (p < 0 || n < 0) return;
  const A* distances = static_cast<const A*>(params.distances);
  const A d_pos = distances[i], d_neg = distances[params.rows + i];
  const bool reduces = params.reduction != Reduction::kNone;
  const A scale = params.reduction == Reduction::kMean
                      ? A(1) / static_cast<A>(divisor(params, *params.count))
                      : A(1);
  const A g = sign * load(static_cast<const T*>(params.grad_loss)[reduces ? 0 : i]) * scale *
              hinge_slope(params, d_pos - d_neg);
  if (g == A(0)) return;
  const T* anchor = anchor_row<T>(params, i);
  const T* positive = candidate_row<T>(params, p);
  const T* negative = candidate_row<T>(params, n);
  const A by_positive = g * distance_factor(params, d_pos);
  const A by_negative = -g * distance_factor(params, d_neg);
  for (int64_t k = threadIdx.x; k < params.cols; k += blockDim.x) {
    const A x = load(anchor[k]);
    A sum = gradient[k];
    if (of_positive) sum += by_positive * (x - load(positive[k]));
    if (of_negative) sum += by_negative * (x - load(negative[k]));
    gradient[k] = sum;
  }
}

// One block a row of the gradient. It searches the anchors that have mined this row, in their order.
// Budget: 56 registers, 256 bytes shared, 36 bytes spilt.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) gradient_kernel(Params params,
                                                                     acc_t<T>* gradient,
                                                                     int64_t rows, bool of_anchors,
                                                                     bool of_candidates) {
  using A = acc_t<T>;
  __shared__ unsigned char mined[cuda::kMaxThreads];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    A* out = gradient + row * params.cols;
    for (int64_t k = threadIdx.x; k < params.cols; k += blockDim.x) out[k] = A(0);
    if (of_anchors) add_terms<T>(params, row, true, true, A(1), out);
    if (!of_candidates) continue;
    for (int64_t first = 0; first < params.rows; first += cuda::kMaxThreads) {
      const int64_t i = first + threadIdx.x;
      const bool inside = i < params.rows;
      const int found = (inside && params.positive[i] == row ? 1 : 0) |
                        (inside && params.negative[i] == row ? 2 : 0);
      if (!__syncthreads_or(found)) continue;
      mined[threadIdx.x] = static_cast<unsigned char>(found);
      __syncthreads();
      for (int k = 0; k < cuda::kMaxThreads; ++k) {
        if (mined[k]) add_terms<T>(params, first + k, mined[k] & 1, mined[k] & 2, A(-1), out);
      }
    }
  }
}

// ---- launch shapes ------------------------------------------------------------------------------

// The number of blocks that share the candidates of an anchor.
int64_t splits_for(int64_t rows, int64_t others) {
  const int64_t tiles = tiles_of(others) < 1 ? 1 : tiles_of(others);
  const int64_t wanted = rows < 1 ? 1 : (kWantedBlocks + tiles_of(rows) - 1) / tiles_of(rows);
  return wanted < tiles ? wanted : tiles;
}

template <typename T>
const char* gradient_of(const Params& params, void* gradient, int64_t rows, bool of_anchors,
                        bool of_candidates, void* stream) {
  if (!gradient || rows == 0) return nullptr;
  const auto blocks = static_cast<unsigned>(rows < 65535 ? rows : 65535);
  return launch(gradient_kernel<T>, dim3(blocks), dim3(cuda::kMaxThreads), 0, stream, params,
                static_cast<acc_t<T>*>(gradient), rows, of_anchors, of_candidates);
}

}  // namespace

int64_t scratch_bytes(DType, int64_t rows, int64_t others) {
  const int64_t share = static_cast<int64_t>(sizeof(int64_t) + sizeof(double));
  return 2 * splits_for(rows, others) * rows * share +
         2 * kMaxBlocks * static_cast<int64_t>(sizeof(double));
}

const char* launch_forward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    const int64_t tiles = tiles_of(params.others), splits = splits_for(params.rows, params.others);
    const int64_t per_split = (tiles + splits - 1) / splits * kTile;
    if (params.rows > 0) {
      const dim3 grid(static_cast<unsigned>(tiles_of(params.rows)), static_cast<unsigned>(splits));
      const char* error =
          launch(mine_kernel<T>, grid, dim3(kSide, kSide), 0, stream, params, per_split);
      if (error) return error;
    }
    const int64_t wanted = (params.rows + kWarps - 1) / kWarps;
    const int blocks = static_cast<int>(wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks);
    const char* error = launch(finish_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                               dim3(cuda::kWarp, kWarps), 0, stream, params, splits);
    if (error) return error;
    return launch(reduce_kernel<T>, dim3(1), dim3(cuda::kMaxThreads), 0, stream, params, splits,
                  blocks);
  });
}

const char* launch_backward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    const char* error = gradient_of<T>(params, params.grad_anchors, params.rows, true, false,
                                       stream);
    if (error) return error;
    return gradient_of<T>(params, params.grad_candidates, params.others, params.same, true,
                          stream);
  });
}

}  // namespace jitops::batch_hard_triplet_loss
