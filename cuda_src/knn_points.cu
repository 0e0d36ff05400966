// Nearest neighbours of points on CUDA: kernels and launchers. No torch header.
//
// The forward pass is bound by arithmetic: count * others * cols differences, squared and summed.
// The floor is 2 instructions each. The backward pass moves about 2 k rows for each point.
//
// Blocks write the nearest candidates of their share, and a second kernel merges the shares. A
// gradient is summed in the order of the sorted indices. No atomics, so results are bitwise
// deterministic.
#include "knn_points.h"

#include "common/cuda.cuh"

namespace jitops::knn_points {
namespace {

using cuda::load;

constexpr int kTile = 64;   // points, and candidates, of a block at a time
constexpr int kChunk = 16;  // columns in shared memory at a time
constexpr int kSide = 16;   // threads along each side of a tile
constexpr int kEach = kTile / kSide;
constexpr int kMost = 32;   // neighbours of a point
constexpr int64_t kWantedBlocks = 1024;  // to fill a large GPU
constexpr int64_t kMaxGrid = 65535;
constexpr int kWarps = cuda::kMaxThreads / cuda::kWarp;
constexpr unsigned kAll = 0xffffffffu;

int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

// The number of blocks that share the candidates of a point: a lane each in the merge.
JITOPS_BOTH int64_t splits_for(int64_t batch, int64_t count, int64_t others) {
  const int64_t tiles = (others + kTile - 1) / kTile;
  const int64_t blocks = batch * ((count + kTile - 1) / kTile);
  const int64_t wanted = blocks < 1 ? 1 : (kWantedBlocks + blocks - 1) / blocks;
  const int64_t most = wanted < cuda::kWarp ? wanted : cuda::kWarp;
  return tiles < 1 ? 1 : most < tiles ? most : tiles;
}

// A candidate so far; `at` is -1 if there is none.
template <typename A>
struct Candidate {
  A d;
  int64_t at;

  __device__ bool before(const Candidate& other) const {
    if (at < 0 || other.at < 0) return other.at < 0 && at >= 0;
    return d < other.d || (d == other.d && at < other.at);
  }

  __device__ Candidate of_lane(int lane) const {
    return {__shfl_sync(kAll, d, lane),
            __shfl_sync(kAll, static_cast<long long>(at), lane)};
  }

  // The first one of `width` neighbouring lanes; every lane gets it.
  __device__ Candidate first_of(int width) const {
    Candidate best = *this;
    for (int offset = width / 2; offset > 0; offset /= 2) {
      const Candidate other = {__shfl_xor_sync(kAll, best.d, offset),
                               __shfl_xor_sync(kAll, static_cast<long long>(best.at), offset)};
      if (other.before(best)) best = other;
    }
    return best;
  }
};

// The lists of all shares: (splits, batch, count, k).
template <typename A>
struct Scratch {
  int64_t* at;
  A* d;

  __device__ Scratch(const Params& params, int side, int64_t splits) {
    at = static_cast<int64_t*>(params.scratch);
    d = reinterpret_cast<A*>(at + splits * params.batch * params.points[side].count * params.k);
  }
};

// The nearest candidates of each point in a share of them. A thread keeps the nearest of its own
// candidates, then the threads of a row merge theirs. `kSize` is 1 or kMost.
// Budget: 128 registers, 16640 bytes shared, 64 bytes spilt.
template <typename T, int kSize>
__global__ void __launch_bounds__(cuda::kMaxThreads) search_kernel(Params params, int side,
                                                                   int64_t per_split) {
  using A = acc_t<T>;
  __shared__ A mine[kChunk][kTile + 1], theirs[kChunk][kTile + 1];
  const Points &own = params.points[side], &others = params.points[1 - side];
  const int size = kSize == 1 ? 1 : static_cast<int>(params.k);
  const int thread = static_cast<int>(threadIdx.y) * kSide + static_cast<int>(threadIdx.x);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const Scratch<A> scratch(params, side, gridDim.y);
  for (int64_t b = blockIdx.z; b < params.batch; b += gridDim.z) {
    const int64_t count = own.length(b), most = others.length(b);
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * per_split;
    const int64_t end = begin + per_split < most ? begin + per_split : most;
    Candidate<A> lists[kEach][kSize];
    for (int r = 0; r < kEach; ++r) {
      for (int n = 0; n < kSize; ++n) lists[r][n] = {static_cast<A>(INFINITY), -1};
    }
    for (int64_t first = begin; first < end && first_row < count; first += kTile) {
      A sums[kEach][kEach] = {};
      for (int64_t column = 0; column < params.cols; column += kChunk) {
        const int64_t left = params.cols - column;
        const int width = left < kChunk ? static_cast<int>(left) : kChunk;
        __syncthreads();  // the chunk before has been read
        for (int n = thread; n < kTile * width; n += kSide * kSide) {
          const int row = n / width, at = n % width;
          const int64_t i = first_row + row, j = first + row;
          mine[at][row] = i < count ? load(point<T>(own, b, i)[column + at]) : A(0);
          theirs[at][row] = j < end ? load(point<T>(others, b, j)[column + at]) : A(0);
        }
        __syncthreads();
        for (int k = 0; k < width; ++k) {
          A x[kEach], y[kEach];
#pragma unroll
          for (int r = 0; r < kEach; ++r) {
            x[r] = mine[k][threadIdx.y + kSide * r];
            y[r] = theirs[k][threadIdx.x + kSide * r];
          }
#pragma unroll
          for (int r = 0; r < kEach; ++r) {
#pragma unroll
            for (int c = 0; c < kEach; ++c) {
              const A difference = x[r] - y[c];
              if (params.norm == 1) {
                sums[r][c] += difference < A(0) ? -difference : difference;
              } else {
                sums[r][c] += difference * difference;
              }
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
#pragma unroll
        for (int c = 0; c < kEach; ++c) {
          const Candidate<A> one = {sums[r][c], first + threadIdx.x + kSide * c};
          // NaN and infinity are never near enough.
          if (one.at >= end || !(one.d < lists[r][size - 1].d)) continue;
          int n = size - 1;
          for (; n > 0 && one.d < lists[r][n - 1].d; --n) lists[r][n] = lists[r][n - 1];
          lists[r][n] = one;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const int64_t i = first_row + threadIdx.y + kSide * r;
      int next = 0;
      for (int n = 0; n < size; ++n) {
        const Candidate<A> head =
            next < size ? lists[r][next] : Candidate<A>{static_cast<A>(INFINITY), -1};
        const Candidate<A> best = head.first_of(kSide);
        if (best.at >= 0 && best.at == head.at) ++next;
        if (threadIdx.x != 0 || i >= own.count) continue;
        const int64_t place =
            ((blockIdx.y * params.batch + b) * own.count + i) * params.k + n;
        scratch.at[place] = best.at;
        scratch.d[place] = best.d;
      }
    }
  }
}

// The distance of two points, by a warp; every lane gets it.
template <typename T>
__device__ acc_t<T> warp_distance(const Params& params, const T* a, const T* b) {
  using A = acc_t<T>;
  constexpr int kSum = 64;  // a lane sums so many in acc_t<T>, and adds the sums in float64
  double total = 0;
  for (int64_t k = threadIdx.x; k < params.cols;) {
    A some = 0;
    for (int n = 0; n < kSum && k < params.cols; ++n, k += cuda::kWarp) {
      const A difference = load(a[k]) - load(b[k]);
      some += params.norm == 2     ? difference * difference
              : difference < A(0) ? -difference
                                   : difference;
    }
    total += static_cast<double>(some);
  }
  return static_cast<A>(cuda::lanes_sum(total, cuda::kWarp));
}

// Merges the lists of all shares. One warp a point: a lane has a share, later a neighbour.
// Budget: 64 registers, 0 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) merge_kernel(Params params, int side,
                                                                  int64_t splits) {
  using A = acc_t<T>;
  const int64_t count = params.points[side].count, all = params.batch * count, k = params.k;
  const int lane = static_cast<int>(threadIdx.x);
  const Scratch<A> scratch(params, side, splits);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; p < all; p += step) {
    const int64_t b = p / count, i = p % count;
    const int real = static_cast<int>(neighbours_of(params, side, b, i));
    Candidate<A> found = {A(0), 0};
    int64_t next = 0;
    for (int n = 0; n < real; ++n) {
      Candidate<A> head = {A(0), -1};
      if (lane < splits && next < k) {
        const int64_t place = (lane * all + p) * k + next;
        head = {scratch.d[place], scratch.at[place]};
      }
      const Candidate<A> best = head.first_of(cuda::kWarp);
      if (best.at >= 0 && best.at == head.at) ++next;
      if (lane == n) found = best;
    }
    // Missing ones are infinitely far: they come last, by index.
    int64_t free = 0;
    for (int n = 0; n < real; ++n) {
      if (found.of_lane(n).at >= 0) continue;
      while (__any_sync(kAll, lane < n && found.at == free)) ++free;
      if (lane == n) found.at = free;
    }
    for (int n = 0; n < real; ++n) {
      const int64_t j = found.of_lane(n).at;
      const A d = warp_distance(params, point<T>(params.points[side], b, i),
                                point<T>(params.points[1 - side], b, j));
      if (lane == n) found.d = d;
    }
    // A lane's place is the number of neighbours before it. NaN counts as infinite.
    const A infinity = static_cast<A>(INFINITY);
    const Candidate<A> key = {found.d < infinity ? found.d : infinity, found.at};
    int64_t place = lane < real ? 0 : lane;
    for (int n = 0; n < real; ++n) {
      const Candidate<A> other = key.of_lane(n);
      if (lane < real && other.before(key)) ++place;
    }
    if (lane >= k) continue;
    static_cast<A*>(params.neighbours[side].dists)[p * k + place] = lane < real ? found.d : A(0);
    params.neighbours[side].idx[p * k + place] = lane < real ? found.at : 0;
  }
}

// For each neighbour, its place among the points of all clouds, or one behind all for padding.
// Budget: 48 registers, 0 bytes shared.
__global__ void __launch_bounds__(cuda::kMaxThreads) places_kernel(Params params, int side,
                                                                   int64_t* places) {
  const int64_t count = params.points[side].count, others = params.points[1 - side].count;
  const int64_t all = params.batch * count * params.k;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < all; n += step) {
    const int64_t p = n / params.k, b = p / count;
    const bool real = n % params.k < neighbours_of(params, side, b, p % count);
    places[n] = real ? b * others + params.neighbours[side].idx[n] : params.batch * others;
  }
}

// out += factor * (the derivative of the distance between a and c with respect to a).
template <typename T, typename A>
__device__ void add_slope(const Params& params, A factor, const T* a, const T* c, A* out) {
  for (int64_t k = threadIdx.x; k < params.cols; k += cuda::kWarp) {
    out[k] += factor * slope(params, load(a[k]) - load(c[k]));
  }
}

// One warp a point of one side. Budget: 64 registers, 0 bytes shared, 32 bytes spilt.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) gradient_kernel(Params params, int side) {
  using A = acc_t<T>;
  const Points &own = params.points[side], &others = params.points[1 - side];
  const Neighbours &mine = params.neighbours[side], &theirs = params.neighbours[1 - side];
  const int64_t all = params.batch * own.count, k = params.k;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; p < all; p += step) {
    const int64_t b = p / own.count, i = p % own.count;
    const T* a = point<T>(own, b, i);
    A* out = static_cast<A*>(params.grads[side]) + p * params.cols;
    for (int64_t n = threadIdx.x; n < params.cols; n += cuda::kWarp) out[n] = A(0);
    const int64_t real = mine.grad_dists ? neighbours_of(params, side, b, i) : 0;
    for (int64_t n = p * k; n < p * k + real; ++n) {
      add_slope(params, static_cast<const A*>(mine.grad_dists)[n], a,
                point<T>(others, b, mine.idx[n]), out);
    }
    if (!theirs.grad_dists) continue;
    const int64_t end = params.batch * others.count * k;
    int64_t low = 0, high = end;  // the first one that is not before p
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (theirs.sorted[middle] < p) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    for (; low < end && theirs.sorted[low] == p; ++low) {
      const int64_t n = theirs.by_point[low];
      add_slope(params, static_cast<const A*>(theirs.grad_dists)[n], a,
                point<T>(others, b, n / k % others.count), out);
    }
  }
}

unsigned blocks_for(int64_t wanted) {
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < kMaxGrid ? wanted : kMaxGrid);
}

template <typename T>
const char* search(const Params& params, int side, void* stream) {
  const int64_t count = params.points[side].count, others = params.points[1 - side].count;
  if (params.batch == 0 || count == 0) return nullptr;
  const int64_t splits = splits_for(params.batch, count, others);
  const int64_t per_split = (tiles_of(others) + splits - 1) / splits * kTile;
  const dim3 grid(static_cast<unsigned>(tiles_of(count)), static_cast<unsigned>(splits),
                  blocks_for(params.batch));
  const auto kernel = params.k == 1 ? &search_kernel<T, 1> : &search_kernel<T, kMost>;
  const char* error =
      launch(kernel, grid, dim3(kSide, kSide), 0, stream, params, side, per_split);
  if (error) return error;
  return launch(merge_kernel<T>, dim3(blocks_for((params.batch * count + kWarps - 1) / kWarps)),
                dim3(cuda::kWarp, kWarps), 0, stream, params, side, splits);
}

}  // namespace

int64_t scratch_bytes(const Params& params) {
  int64_t most = 0;
  for (int side = 0; side < 2; ++side) {
    const int64_t count = params.points[side].count;
    const int64_t splits = splits_for(params.batch, count, params.points[1 - side].count);
    const int64_t size = splits * params.batch * count * params.k;
    most = size > most ? size : most;
  }
  return most * static_cast<int64_t>(sizeof(int64_t) + sizeof(double));
}

const char* launch_forward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    const char* error = search<T>(params, 0, stream);
    return error || !params.both ? error : search<T>(params, 1, stream);
  });
}

const char* launch_places(const Params& params, int side, int64_t* places, void* stream) {
  const int64_t all = params.batch * params.points[side].count * params.k;
  return launch(places_kernel,
                dim3(blocks_for((all + cuda::kMaxThreads - 1) / cuda::kMaxThreads)),
                dim3(cuda::kMaxThreads), 0, stream, params, side, places);
}

const char* launch_backward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    for (int side = 0; side < 2; ++side) {
      const int64_t all = params.batch * params.points[side].count;
      if (!params.grads[side] || all == 0) continue;
      const char* error =
          launch(gradient_kernel<T>, dim3(blocks_for((all + kWarps - 1) / kWarps)),
                 dim3(cuda::kWarp, kWarps), 0, stream, params, side);
      if (error) return error;
    }
    return nullptr;
  });
}

}  // namespace jitops::knn_points
