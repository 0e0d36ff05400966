// The batch-all and the batch semi-hard triplet loss on CUDA: kernels and launchers. No torch header.
//
// Bound by arithmetic. The floor is 2 instructions for each of the rows * others * cols differences,
// and 4 more for gradients. The triplets take about 4 for each anchor, positive and negative.
//
// Each sum belongs to one thread, or to one block in a fixed order. No atomics, so results are
// bitwise deterministic.
#include "batch_all_triplet_loss.h"

#include "common/pairs.cuh"

namespace jitops::batch_all_triplet_loss {
namespace {

using cuda::kEach;
using cuda::kSide;
using cuda::kTile;
using cuda::load;
using cuda::store;
using cuda::tiles_of;

constexpr int kWarps = cuda::kMaxThreads / cuda::kWarp;
constexpr int64_t kChunkElements = int64_t{1} << 22;  // distances of a chunk of anchors
constexpr int kSquare = 32;  // rows and columns of a block of a gradient

// Distances of the anchors [begin, end) to all candidates.
// Budget: 120 registers, 16640 bytes shared, 8 bytes spilt.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) distance_kernel(Params params, int64_t begin,
                                                                     int64_t end) {
  using A = acc_t<T>;
  __shared__ cuda::PairChunk<A> anchors, candidates;
  const int64_t first_row = begin + static_cast<int64_t>(blockIdx.x) * kTile;
  A* distances = static_cast<A*>(params.distances);
  for (int64_t tile = blockIdx.y; tile < (params.others + kTile - 1) / kTile; tile += gridDim.y) {
    const int64_t first = tile * kTile;
    A sums[kEach][kEach];
    cuda::pair_tile<T>(params, first_row, end, first, params.others, anchors, candidates, sums);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const int64_t i = first_row + cuda::anchor_of_thread(r);
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        const int64_t j = first + cuda::candidate_of_thread(c);
        if (i >= end || j >= params.others) continue;
        distances[(i - begin) * params.others + j] =
            params.squared ? sums[r][c] : std::sqrt(sums[r][c]);
      }
    }
  }
}

// A candidate is a positive or a negative of an anchor, or the anchor itself.
enum class Kind { kItself, kPositive, kNegative };

__device__ inline Kind kind_of(const Params& params, int64_t i, int64_t j) {
  if (params.candidate_labels[j] != params.anchor_labels[i]) return Kind::kNegative;
  return is_itself(params, i, j) ? Kind::kItself : Kind::kPositive;
}

template <typename A>
struct Term {
  A loss, slope;
};

// The loss of a triplet and its derivative with respect to the positive distance; both are 0 for a
// triplet that does not count. NaN counts.
template <typename A>
__device__ Term<A> term(const Params& params, A positive, A negative) {
  const A x = positive - negative;
  if (negative == static_cast<A>(INFINITY)) return {A(0), A(0)};
  if (params.rule == Rule::kSemiHard && negative <= positive) return {A(0), A(0)};
  const A slope = hinge_slope(params, x);
  return {slope == A(0) ? A(0) : hinge(params, x), slope};
}

// The negative that is taken for a positive, of those that a thread, a warp or a block has seen.
template <typename A>
struct Choice {
  int64_t at = -1;
  A distance = 0;
  int rank = 0;  // 3: NaN. 2: beyond the positive. 1: not beyond it.

  __device__ void take(const Choice& other) {
    if (other.rank == 0) return;
    const bool nearer = other.rank == 2 ? other.distance < distance : other.distance > distance;
    const bool equal = other.rank == 3 || other.distance == distance;
    if (other.rank > rank || (other.rank == rank && (nearer || (equal && other.at < at)))) {
      *this = other;
    }
  }
  __device__ static Choice of(A positive, A negative, int64_t at) {
    if (negative == static_cast<A>(INFINITY)) return {};
    return {at, negative, negative != negative ? 3 : negative > positive ? 2 : 1};
  }
};

// The choice of a block, in every thread.
template <typename A>
__device__ Choice<A> block_choice(Choice<A> mine, Choice<A>* shared) {
  for (int offset = cuda::kWarp / 2; offset > 0; offset /= 2) {
    const long long at =
        __shfl_xor_sync(0xffffffffu, static_cast<long long>(mine.at), offset);
    const A distance = __shfl_xor_sync(0xffffffffu, mine.distance, offset);
    const int rank = __shfl_xor_sync(0xffffffffu, mine.rank, offset);
    mine.take({at, distance, rank});
  }
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the choice before has been read
  if (thread % cuda::kWarp == 0) shared[thread / cuda::kWarp] = mine;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) mine.take(shared[warp]);
  return mine;
}

// One block an anchor of [begin, end): the sum of its losses, and how many triplets count. For
// gradients also the weights of differences.
// Budget: 64 registers, 704 bytes shared, 32 bytes spilt.
template <typename T, bool kWeigh>
__global__ void __launch_bounds__(cuda::kMaxThreads) triplet_kernel(Params params, int64_t begin,
                                                                    int64_t end) {
  using A = acc_t<T>;
  __shared__ unsigned char positives[cuda::kMaxThreads];
  __shared__ Choice<A> choices[kWarps];
  __shared__ A of_slopes[2][kWarps];
  __shared__ double of_sums[2][kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t i = begin + blockIdx.x; i < end; i += gridDim.x) {
    const A* distances = static_cast<const A*>(params.distances) + (i - begin) * params.others;
    A* weights = static_cast<A*>(params.weights) + (i - begin) * params.others;
    double is_positive = 0, is_negative = 0;
    for (int64_t j = thread; j < params.others; j += cuda::kMaxThreads) {
      const Kind kind = kind_of(params, i, j);
      is_positive += kind == Kind::kPositive ? 1 : 0;
      is_negative += kind == Kind::kNegative ? 1 : 0;
      if (kWeigh) weights[j] = A(0);
    }
    is_positive = cuda::block_sum(is_positive, of_sums[0]);
    const double all = is_positive * cuda::block_sum(is_negative, of_sums[1]);

    double loss = 0, counted = 0;
    int number = 0;
    for (int64_t first = 0; all > 0 && first < params.others; first += cuda::kMaxThreads) {
      const int64_t j = first + thread;
      const bool found = j < params.others && kind_of(params, i, j) == Kind::kPositive;
      if (!__syncthreads_or(found)) continue;
      positives[thread] = found;
      __syncthreads();
      for (int k = 0; k < cuda::kMaxThreads; ++k) {
        if (!positives[k]) continue;
        const A positive = distances[first + k];
        A sum = 0, slope = 0;
        if (params.rule == Rule::kNearest) {
          Choice<A> choice;
          for (int64_t n = thread; n < params.others; n += cuda::kMaxThreads) {
            if (kind_of(params, i, n) != Kind::kNegative) continue;
            choice.take(Choice<A>::of(positive, distances[n], n));
          }
          choice = block_choice(choice, choices);
          const Term<A> one = choice.at < 0 ? Term<A>{} : term(params, positive, choice.distance);
          if (thread == 0) {
            sum = one.loss;
            slope = one.slope;
            counted += 1;
          }
          const bool mine = choice.at >= 0 && choice.at % cuda::kMaxThreads == thread;
          if (kWeigh && mine) weights[choice.at] += one.slope;
        } else {
          for (int64_t n = thread; n < params.others; n += cuda::kMaxThreads) {
            if (kind_of(params, i, n) != Kind::kNegative) continue;
            const Term<A> one = term(params, positive, distances[n]);
            sum += one.loss;
            slope += one.slope;
            counted += one.slope != A(0) ? 1 : 0;
            if (kWeigh) weights[n] += one.slope;
          }
        }
        loss += static_cast<double>(sum);
        if (kWeigh) {
          slope = cuda::block_sum(slope, of_slopes[number++ % 2]);
          if (thread == 0) weights[first + k] = slope;
        }
      }
    }
    if (kWeigh) {
      __syncthreads();  // thread 0 has written the slopes of positives
      const bool reduces = params.reduction != Reduction::kNone;
      const T* grad_loss = static_cast<const T*>(params.grad_loss);
      const A g = grad_loss ? load(grad_loss[reduces ? 0 : i]) * *static_cast<const A*>(params.scale)
                            : A(1);
      for (int64_t j = thread; j < params.others; j += cuda::kMaxThreads) {
        const A signed_g = kind_of(params, i, j) == Kind::kNegative ? -g : g;
        weights[j] *= signed_g * distance_factor(params, distances[j]);
      }
    }
    if (!params.fraction) continue;
    loss = cuda::block_sum(loss, of_sums[0]);
    counted = cuda::block_sum(counted, of_sums[1]);
    if (thread != 0) continue;
    params.sums[i] = loss;
    params.counts[i] = static_cast<int64_t>(params.soft ? all : counted);
    params.counts[params.rows + i] = static_cast<int64_t>(all);
    if (params.reduction == Reduction::kNone) {
      store(static_cast<T*>(params.loss)[i], static_cast<A>(loss));
    }
  }
}

// One block adds the sums of all anchors. Budget: 64 registers, 192 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) reduce_kernel(Params params) {
  using A = acc_t<T>;
  __shared__ double of_losses[kWarps], of_counts[kWarps], of_all[kWarps];
  double loss = 0, counted = 0, all = 0;
  for (int64_t i = threadIdx.x; i < params.rows; i += cuda::kMaxThreads) {
    loss += params.sums[i];
    counted += static_cast<double>(params.counts[i]);
    all += static_cast<double>(params.counts[params.rows + i]);
  }
  Totals totals;
  totals.loss = cuda::block_sum(loss, of_losses);
  totals.counted = static_cast<int64_t>(cuda::block_sum(counted, of_counts));
  totals.all = static_cast<int64_t>(cuda::block_sum(all, of_all));
  if (threadIdx.x != 0) return;
  *static_cast<A*>(params.fraction) = static_cast<A>(totals.fraction());
  *static_cast<A*>(params.scale) = static_cast<A>(1 / totals.divisor(params));
  if (params.reduction == Reduction::kNone) return;
  store(*static_cast<T*>(params.loss), static_cast<A>(totals.loss / totals.divisor(params)));
}

// Weights of the differences between `a` and `b`: data[i * row + j * col].
template <typename A>
struct Weights {
  const A* data;
  int64_t row, col;
};

// out[i] = the sum over j of weight[i][j] (a[i] - b[j]), or `add` it. A block has kSquare rows a and
// kSquare columns. Budget: 96 registers, 16896 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) gradient_kernel(Weights<acc_t<T>> weights,
                                                                     RowsOf<T> a, RowsOf<T> b,
                                                                     int64_t cols, bool add,
                                                                     acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr int kStep = cuda::kMaxThreads / kSquare, kMine = kSquare / kStep;
  __shared__ A factors[kSquare][kSquare + 1], others[kSquare][kSquare + 1];
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSquare;
  for (int64_t tile = blockIdx.y; tile < (cols + kSquare - 1) / kSquare; tile += gridDim.y) {
    const int64_t k = tile * kSquare + tx;
    A mine[kMine], sums[kMine];
#pragma unroll
    for (int r = 0; r < kMine; ++r) {
      const int64_t i = first_row + ty + kStep * r;
      mine[r] = i < a.count && k < cols ? load(a.data[i * a.stride + k]) : A(0);
      sums[r] = A(0);
    }
    for (int64_t first = 0; first < b.count; first += kSquare) {
      __syncthreads();  // the rows before have been read
#pragma unroll
      for (int r = 0; r < kMine; ++r) {
        const int slow = ty + kStep * r;
        // Neighbouring threads read neighbouring weights.
        const int row = weights.col == 1 ? slow : tx, at = weights.col == 1 ? tx : slow;
        const int64_t i = first_row + row, j = first + at;
        factors[row][at] = i < a.count && j < b.count
                               ? weights.data[i * weights.row + j * weights.col]
                               : A(0);
        const int64_t other = first + slow;
        others[slow][tx] = other < b.count && k < cols ? load(b.data[other * b.stride + k]) : A(0);
      }
      __syncthreads();
#pragma unroll 8
      for (int j = 0; j < kSquare; ++j) {
        const A other = others[j][tx];
#pragma unroll
        for (int r = 0; r < kMine; ++r) sums[r] += factors[ty + kStep * r][j] * (mine[r] - other);
      }
    }
#pragma unroll
    for (int r = 0; r < kMine; ++r) {
      const int64_t i = first_row + ty + kStep * r;
      if (i >= a.count || k >= cols) continue;
      A& result = out[i * cols + k];
      result = add ? result + sums[r] : sums[r];
    }
  }
}

// ---- launches -----------------------------------------------------------------------------------

unsigned at_most(int64_t wanted, int64_t limit) {
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < limit ? wanted : limit);
}

// The distances of a chunk, then its triplets.
template <typename T, bool kWeigh>
const char* triplets_of(const Params& params, int64_t begin, int64_t end, void* stream) {
  if (begin == end) return nullptr;
  if (params.others > 0) {
    const dim3 grid(at_most(tiles_of(end - begin), INT32_MAX),
                    at_most(tiles_of(params.others), 65535));
    const char* error =
        launch(distance_kernel<T>, grid, dim3(kSide, kSide), 0, stream, params, begin, end);
    if (error) return error;
  }
  return launch(triplet_kernel<T, kWeigh>, dim3(at_most(end - begin, 65535)),
                dim3(cuda::kMaxThreads), 0, stream, params, begin, end);
}

template <typename T>
const char* gradient_of(Weights<acc_t<T>> weights, RowsOf<T> a, RowsOf<T> b, int64_t cols, bool add,
                        void* out, void* stream) {
  if (!out || a.count == 0 || cols == 0) return nullptr;
  const dim3 grid(at_most((a.count + kSquare - 1) / kSquare, INT32_MAX),
                  at_most((cols + kSquare - 1) / kSquare, 65535));
  return launch(gradient_kernel<T>, grid, dim3(kSquare, cuda::kMaxThreads / kSquare), 0, stream,
                weights, a, b, cols, add, static_cast<acc_t<T>*>(out));
}

// The gradients from the weights of a chunk. The candidates come first, because without references
// their gradient is that of all anchors too, and the first chunk writes it.
template <typename T>
const char* gradients_of(const Params& params, int64_t begin, int64_t end, void* stream) {
  using A = acc_t<T>;
  const auto* data = static_cast<const A*>(params.weights);
  const RowsOf<T> anchors = {anchor_row<T>(params, begin), params.anchor_stride, end - begin};
  const RowsOf<T> candidates = {candidate_row<T>(params, 0), params.candidate_stride, params.others};
  const char* error =
      gradient_of<T>({data, 1, params.others}, candidates, anchors, params.cols, begin > 0,
                     params.grad_candidates, stream);
  if (error) return error;
  A* out = static_cast<A*>(params.same ? params.grad_candidates : params.grad_anchors);
  return gradient_of<T>({data, params.others, 1}, anchors, candidates, params.cols, params.same,
                        out ? out + begin * params.cols : nullptr, stream);
}

}  // namespace

int64_t chunk_of(int64_t rows, int64_t others) {
  const int64_t most = kChunkElements / (others < 1 ? 1 : others);
  const int64_t some = most < 1 ? 1 : most;
  return some < rows ? some : rows;
}

const char* launch_triplets(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    const bool weighs = params.grad_anchors || params.grad_candidates;
    int64_t begin = 0;
    do {  // once without any anchors, because candidates get a gradient of zeros
      const int64_t end = begin + params.chunk < params.rows ? begin + params.chunk : params.rows;
      const char* error = weighs ? triplets_of<T, true>(params, begin, end, stream)
                                 : triplets_of<T, false>(params, begin, end, stream);
      if (!error) error = gradients_of<T>(params, begin, end, stream);
      if (error) return error;
      begin += params.chunk;
    } while (begin < params.rows);
    if (!params.fraction) return nullptr;
    return launch(reduce_kernel<T>, dim3(1), dim3(cuda::kMaxThreads), 0, stream, params);
  });
}

}  // namespace jitops::batch_all_triplet_loss
