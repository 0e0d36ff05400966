// Losses of local windows on CUDA. The kernels of an op call these functions. cpu_windows.h lists
// the members of a formula.
//
// A block takes a square of kSide * kSide windows, or pixels. It loads one product of the images
// after the other, with a margin, into shared memory, sums it along rows, then across rows. The
// depth of a window is summed up while loading.
#pragma once

#include <cmath>

#include "cuda.cuh"
#include "windows.h"

extern __shared__ unsigned char dynamic_shared[];

namespace jitops::cuda {

constexpr int kSide = static_cast<int>(kSquare);  // each thread has a window or a pixel
static_assert(kSide * kSide == kMaxThreads);

constexpr int kSumsOfWarps = kMaxThreads / kWarp;

// Bytes of dynamic shared memory for windows of this many rows and columns.
template <typename A>
size_t shared_bytes(const WindowParams& params) {
  const int64_t rows = kSide + params.height.taps - 1, cols = kSide + params.width.taps - 1;
  return static_cast<size_t>(rows * (cols + kSide) + kMaxWindow) * sizeof(A);
}

// The tile of a block, in units of blocks: plane, depth, then rows and columns of squares.
struct Tile {
  int64_t plane, depth, row, col;

  __device__ explicit Tile(const WindowParams& params, int64_t first_plane) {
    const int64_t cols = WindowParams::squares_of(params.width.size);
    const int64_t rows = WindowParams::squares_of(params.height.size);
    int64_t at = blockIdx.x;
    col = at % cols * kSide;
    at /= cols;
    row = at % rows * kSide;
    at /= rows;
    depth = at % params.depth.size;
    plane = first_plane + at / params.depth.size;
  }
};

// The taps of a window, in shared memory. The caller waits for all threads before it reads them.
template <typename A>
__device__ A* load_taps(const WindowParams& params, A* taps) {
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  if (thread < kMaxWindow) taps[thread] = static_cast<A>(params.taps[thread]);
  return taps;
}

template <typename A>
__device__ A tap_of(const Extent& extent, const A* taps, int64_t k) {
  return extent.taps == 1 ? A(1) : taps[k];
}

// The mean of some finite pixels of a plane. All blocks of a plane get the same.
template <typename T>
__device__ double shift_of(const T* plane, int64_t pixels, double* of_sums, double* of_counts) {
  const int64_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t step = (pixels + kMaxThreads - 1) / kMaxThreads;
  double value = 0, count = 0;
  if (thread * step < pixels) {
    const double pixel = static_cast<double>(load(plane[thread * step]));
    if (isfinite(pixel)) {
      value = pixel;
      count = 1;
    }
  }
  const double sum = block_sum(value, of_sums), all = block_sum(count, of_counts);
  __syncthreads();  // both buffers may be used again
  return all > 0 ? sum / all : 0;
}

// The differences of a pixel from the shifts. Pixels outside of the images are 0.
template <typename T, typename A>
struct Pair {
  const T *input, *target;
  A shift_x, shift_y;

  __device__ void at(int64_t pixel, A* x, A* y) const {
    *x = (pixel < 0 ? A(0) : static_cast<A>(load(input[pixel]))) - shift_x;
    *y = (pixel < 0 ? A(0) : static_cast<A>(load(target[pixel]))) - shift_y;
  }
};

template <typename T, typename A>
__device__ Pair<T, A> pair_of(const WindowParams& params, int64_t plane, double* of_sums,
                              double* of_counts) {
  const T* input = static_cast<const T*>(params.input) + plane * params.pixels();
  const T* target = static_cast<const T*>(params.target) + plane * params.pixels();
  const double shift_x = shift_of(input, params.pixels(), of_sums, of_counts);
  const double shift_y = shift_of(target, params.pixels(), of_sums, of_counts);
  return {input, target, static_cast<A>(shift_x), static_cast<A>(shift_y)};
}

// Sums up a tile, which `value(row, col)` fills, along rows with along(i, col), then across rows
// with across(i, row). Each thread gets the sum of its place.
template <typename A, typename Value, typename Along, typename Across>
__device__ A separable_sum(const WindowParams& params, A* tile, const Value& value,
                           const Along& along, const Across& across) {
  const int taps_across = static_cast<int>(params.height.taps);
  const int taps_along = static_cast<int>(params.width.taps);
  const int rows = kSide + taps_across - 1, cols = kSide + taps_along - 1;
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  A* sums = tile + rows * cols;
  for (int i = thread; i < rows * cols; i += kMaxThreads) tile[i] = value(i / cols, i % cols);
  __syncthreads();  // the tile is complete, and the sums before have been read
  for (int i = thread; i < rows * kSide; i += kMaxThreads) {
    const int row = i / kSide, col = i % kSide;
    A sum = 0;
    for (int k = 0; k < taps_along; ++k) {
      const A tap = along(k, col);
      if (tap != A(0)) sum += tap * tile[row * cols + col + k];
    }
    sums[i] = sum;
  }
  __syncthreads();  // the sums are complete, and the tile has been read
  const int row = static_cast<int>(threadIdx.y), col = static_cast<int>(threadIdx.x);
  A sum = 0;
  for (int k = 0; k < taps_across; ++k) {
    const A tap = across(k, row);
    if (tap != A(0)) sum += tap * sums[(row + k) * kSide + col];
  }
  return sum;
}

// The losses of the windows of a tile, and with gradients their derivatives.
template <typename T, typename F, typename Params>
__device__ void take_windows(const Params& params, int64_t first_plane) {
  using A = typename F::Number;
  constexpr int kAll = F::kShared + 2 * F::kOwn;
  __shared__ double of_losses[kSumsOfWarps];
  __shared__ double of_distances[kSumsOfWarps];
  const Tile tile(params, first_plane);
  const F formula(params);
  A* taps = load_taps(params, reinterpret_cast<A*>(dynamic_shared));
  A* memory = taps + kMaxWindow;
  const Pair<T, A> pair = pair_of<T, A>(params, tile.plane, of_losses, of_distances);
  const Extent &depth = params.depth, &height = params.height, &width = params.width;

  A means[F::kMeans];
#pragma unroll
  for (int m = 0; m < F::kMeans; ++m) {
    means[m] = separable_sum(
        params, memory,
        [&](int row, int col) {
          const int64_t i = pixel_at(tile.row - height.pad + row, height.size, params.padding);
          const int64_t j = pixel_at(tile.col - width.pad + col, width.size, params.padding);
          // Beyond the last window a reflection may leave the image.
          const bool inside = i >= 0 && i < height.size && j >= 0 && j < width.size;
          A sum = 0;
          for (int64_t k = 0; k < depth.taps; ++k) {
            const int64_t d =
                pixel_at(tile.depth - depth.pad + k, depth.size, params.padding);
            const bool there = inside && d >= 0 && d < depth.size;
            A x, y, products[F::kMeans];
            pair.at(there ? (d * height.size + i) * width.size + j : -1, &x, &y);
            F::products(x, y, products);
            sum += tap_of(depth, taps, k) * products[m];
          }
          return sum;
        },
        [&](int k, int) { return tap_of(width, taps, k); },
        [&](int k, int) { return tap_of(height, taps, k); });
  }

  const int64_t row = tile.row + threadIdx.y, col = tile.col + threadIdx.x;
  const bool is_window =
      row < height.windows && col < width.windows && tile.depth < depth.windows;
  const bool is_pixel = row < height.size && col < width.size;
  A loss = 0;
  double distance = 0;
  if (is_window) {
    const int64_t at = (tile.depth * height.windows + row) * width.windows + col;
    const int64_t all = params.windows();
    A g;
    if (params.grad_map) {
      g = A(F::kSigned) *
          static_cast<A>(load(static_cast<const T*>(params.grad_map)[tile.plane * all + at]));
    } else {
      g = static_cast<A>(params.window_weight / static_cast<double>(all));
      if (params.grad_losses) g *= static_cast<const A*>(params.grad_losses)[tile.plane];
    }
    A derivatives[kAll];
    loss = formula.template window<true>(means, pair.shift_x, pair.shift_y, g, derivatives);
    if (params.map) {
      store(static_cast<T*>(params.map)[tile.plane * all + at],
            static_cast<acc_t<T>>(F::shown(loss)));
    }
    if (params.moments) {
#pragma unroll
      for (int m = 0; m < kAll; ++m) {
        const int64_t plane = m * params.chunk + tile.plane - first_plane;
        static_cast<A*>(params.moments)[plane * all + at] = derivatives[m];
      }
    }
  }
  if (is_pixel && params.l1_weight != 0) {
    const int64_t at = (tile.depth * height.size + row) * width.size + col;
    distance = fabs(static_cast<double>(load(pair.input[at]) - load(pair.target[at])));
  }
  if (!params.losses) return;
  const double losses = block_sum(static_cast<double>(loss), of_losses);
  distance = block_sum(distance, of_distances);
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    const int64_t blocks = params.blocks();
    const int64_t block = tile.plane * blocks + (blockIdx.x % blocks);
    params.partials[block] = losses;
    params.partials[params.planes * blocks + block] = distance;
  }
}

// The gradients of the pixels of a tile.
template <typename T, typename F, typename Params>
__device__ void take_gradients(const Params& params, int64_t first_plane) {
  using A = typename F::Number;
  __shared__ double of_sums[kSumsOfWarps];
  __shared__ double of_counts[kSumsOfWarps];
  const Tile tile(params, first_plane);
  A* taps = load_taps(params, reinterpret_cast<A*>(dynamic_shared));
  A* memory = taps + kMaxWindow;
  const Pair<T, A> pair = pair_of<T, A>(params, tile.plane, of_sums, of_counts);
  const Extent &depth = params.depth, &height = params.height, &width = params.width;
  const int64_t all = params.windows();
  const int64_t first_row = tile.row + height.pad - height.taps + 1;
  const int64_t first_col = tile.col + width.pad - width.taps + 1;

  const auto sum_of = [&](int m) {
    const A* moments = static_cast<const A*>(params.moments) +
                       (m * params.chunk + tile.plane - first_plane) * all;
    return separable_sum(
        params, memory,
        [&](int row, int col) {
          const int64_t i = first_row + row, j = first_col + col;
          A sum = 0;
          if (i < 0 || i >= height.windows || j < 0 || j >= width.windows) return sum;
          for (int64_t k = 0; k < depth.taps; ++k) {
            const int64_t d = tile.depth + depth.pad - depth.taps + 1 + k;
            if (d < 0 || d >= depth.windows) continue;
            sum += adjoint_tap(taps, depth, params.padding, tile.depth, d) *
                   moments[(d * height.windows + i) * width.windows + j];
          }
          return sum;
        },
        [&](int k, int col) {
          const int64_t q = tile.col + col;
          return q < width.size ? adjoint_tap(taps, width, params.padding, q, first_col + col + k)
                                : A(0);
        },
        [&](int k, int row) {
          const int64_t q = tile.row + row;
          return q < height.size
                     ? adjoint_tap(taps, height, params.padding, q, first_row + row + k)
                     : A(0);
        });
  };

  A shared[F::kShared], own[F::kOwn];
#pragma unroll
  for (int m = 0; m < F::kShared; ++m) shared[m] = sum_of(m);
  const int64_t row = tile.row + threadIdx.y, col = tile.col + threadIdx.x;
  const bool is_pixel = row < height.size && col < width.size;
  const int64_t at = (tile.depth * height.size + row) * width.size + col;
  A x = 0, y = 0, sign = 0;
  if (is_pixel) {
    pair.at(at, &x, &y);
    const A difference = static_cast<A>(load(pair.input[at]) - load(pair.target[at]));
    A factor = static_cast<A>(params.l1_weight / static_cast<double>(params.pixels()));
    if (params.grad_losses) factor *= static_cast<const A*>(params.grad_losses)[tile.plane];
    if (difference != A(0)) sign = difference > A(0) ? factor : -factor;
  }
  for (int image = 0; image < 2; ++image) {
    A* grad = static_cast<A*>(image == 0 ? params.grad_input : params.grad_target);
    if (!grad) continue;
#pragma unroll
    for (int m = 0; m < F::kOwn; ++m) own[m] = sum_of(F::kShared + image * F::kOwn + m);
    if (!is_pixel) continue;
    grad[tile.plane * params.pixels() + at] =
        image == 0 ? F::gradient_of_input(shared, own, x, y) + sign
                   : F::gradient_of_target(shared, own, x, y) - sign;
  }
}

// The loss of a plane, by a block.
template <typename A>
__device__ void sum_up_plane(const WindowParams& params) {
  __shared__ double of_losses[kSumsOfWarps];
  __shared__ double of_distances[kSumsOfWarps];
  const int64_t blocks = params.blocks(), plane = blockIdx.x;
  double loss = 0, distance = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kMaxThreads) {
    loss += params.partials[plane * blocks + i];
    distance += params.partials[(params.planes + plane) * blocks + i];
  }
  loss = block_sum(loss, of_losses);
  distance = block_sum(distance, of_distances);
  if (threadIdx.x == 0) {
    static_cast<A*>(params.losses)[plane] = static_cast<A>(loss_of_plane(params, loss, distance));
  }
}

// Launches the kernels over all planes, `chunk` planes at a time.
template <typename A, typename Params, typename Windows, typename Gradients, typename Sums>
const char* launch_all(const Params& params, void* stream, Windows* windows, Gradients* gradients,
                       Sums* sums) {
  const size_t bytes = shared_bytes<A>(params);
  const dim3 square(kSide, kSide);
  for (int64_t first = 0; first < params.planes; first += params.chunk) {
    const int64_t planes =
        params.planes - first < params.chunk ? params.planes - first : params.chunk;
    const dim3 grid(static_cast<unsigned>(planes * params.blocks()));
    const char* error = launch(windows, grid, square, bytes, stream, params, first);
    if (error) return error;
    if (!params.moments) continue;
    error = launch(gradients, grid, square, bytes, stream, params, first);
    if (error) return error;
  }
  if (!params.losses) return nullptr;
  return launch(sums, dim3(static_cast<unsigned>(params.planes)), dim3(kMaxThreads), 0, stream,
                params);
}

}  // namespace jitops::cuda
