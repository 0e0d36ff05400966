// Losses of local windows of two images: the contract between the host and the kernels.
//
// A window is separable: its weights along each dimension are `taps`. A loss has a value for each
// window, a function of the weighted means of a few products of the two images. Sums and gradients
// have the type Number of the formula.
//
// The gradient of a pixel is a sum over the windows that hold it, with the same taps. At a reflected
// border a pixel is in a window more than once, so its taps differ there (`adjoint_tap`).
#pragma once

#include <cstdint>

#include "dtype.h"

// A function of a formula. Without it g++ calls the function for each vector.
#ifdef __CUDACC__
#define JITOPS_FORMULA __host__ __device__
#else
#define JITOPS_FORMULA [[gnu::always_inline]] inline
#endif

namespace jitops {

constexpr int64_t kMaxWindow = 51;  // the largest size, which the shared memory of a GPU sets

constexpr int64_t kSquare = 16;    // of pixels, for a block of threads on CUDA

enum class Padding : int64_t { kValid = 0, kSame = 1, kReflect = 2 };

// A dimension of the images. One that the images lack has one pixel and one tap.
struct Extent {
  int64_t size = 1;     // pixels
  int64_t windows = 1;  // positions of the window
  int64_t taps = 1;
  int64_t pad = 0;  // positions before the first pixel
};

struct WindowParams {
  const void* input;   // (planes, depth, height, width), dense
  const void* target;  // likewise
  int64_t planes;
  Extent depth, height, width;
  Padding padding;
  double taps[kMaxWindow];  // they add up to 1

  // The loss of a plane is window_weight * (mean over windows) + l1_weight * (mean of |x - y|).
  double window_weight;
  double l1_weight;

  // One of both is written by the forward pass.
  void* losses;  // (planes,) Number
  void* map;     // (planes, windows) T

  // Of the backward pass, else null: the gradients of one of both.
  const void* grad_losses;
  const void* grad_map;

  // Gradients of the images, Number, dense; null if not needed. Without grad_losses and grad_map
  // they are those of the sum of all losses.
  void* grad_input;
  void* grad_target;

  // CUDA only: scratch memory.
  double* partials;  // (2, planes, blocks of a plane): sums over windows, and of |x - y|
  void* moments;     // Number: gradients of the means of windows, for `chunk` planes
  int64_t chunk;

  // Blocks of CUDA's kernels for a plane: squares of kSquare * kSquare pixels.
  JITOPS_BOTH int64_t blocks() const {
    return squares_of(width.size) * squares_of(height.size) * depth.size;
  }
  JITOPS_BOTH static int64_t squares_of(int64_t size) { return (size + kSquare - 1) / kSquare; }

  JITOPS_BOTH int64_t windows() const { return depth.windows * height.windows * width.windows; }
  JITOPS_BOTH int64_t pixels() const { return depth.size * height.size * width.size; }
};

// The loss of a plane from the sums over its windows and over |x - y| of its pixels.
JITOPS_BOTH inline double loss_of_plane(const WindowParams& params, double loss, double distance) {
  double sum = 0;  // a weight of 0 would make a NaN of an infinite sum
  if (params.window_weight != 0) {
    sum += params.window_weight * (loss / static_cast<double>(params.windows()));
  }
  if (params.l1_weight != 0) {
    sum += params.l1_weight * (distance / static_cast<double>(params.pixels()));
  }
  return sum;
}

// The pixel at position i, or -1 outside of the image, where all pixels are 0.
JITOPS_BOTH inline int64_t pixel_at(int64_t i, int64_t size, Padding padding) {
  if (i >= 0 && i < size) return i;
  if (padding != Padding::kReflect) return -1;
  return i < 0 ? -i : 2 * (size - 1) - i;
}

// The weight of pixel q in window p along one dimension. All windows p with a weight are
// q + pad - taps + 1 to q + pad.
template <typename A>
JITOPS_BOTH A adjoint_tap(const A* taps, const Extent& extent, Padding padding, int64_t q,
                          int64_t p) {
  const int64_t first = p - extent.pad;
  const auto tap = [&](int64_t i) {
    const int64_t k = i - first;
    return k < 0 || k >= extent.taps ? A(0) : extent.taps == 1 ? A(1) : taps[k];
  };
  A sum = tap(q);
  if (padding == Padding::kReflect) {
    if (q > 0) sum += tap(-q);
    if (q < extent.size - 1) sum += tap(2 * (extent.size - 1) - q);
  }
  return sum;
}

}  // namespace jitops
