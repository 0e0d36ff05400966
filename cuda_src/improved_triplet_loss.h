// The improved triplet loss: the contract between the host (.cpp) and the kernels (.cu).
// No torch header and no CUDA header: both compilers read this file in no time.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace jitops::improved_triplet_loss {

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// What the forward pass remembers of a row, so that the backward pass need not measure it again.
enum RowState : uint8_t {
  kMarginActive = 1,    // d+ - d- >= t1: the gradient flows through the first clamp
  kPositiveActive = 2,  // d+ >= t2: the gradient flows through the second clamp
  kFinite = 4,          // d+ and d- are finite, so a factor of zero makes a gradient of zero
};

// Upper bound of the forward grid: one partial sum per block, added up in a fixed order; half as
// many where blocks share rows, with two sums each.
constexpr int64_t kMaxBlocks = 2048;

struct Params {
  // Inputs: (rows, cols); a row is dense, rows lie `*_stride` elements apart (0: one shared row).
  const void* anchor;
  const void* positive;
  const void* negative;
  int64_t anchor_stride;
  int64_t positive_stride;
  int64_t negative_stride;
  int64_t rows;
  int64_t cols;

  // The loss: max(d+ - d-, t1) + beta * max(d+, t2), distances taken of differences plus eps.
  double t1;
  double t2;
  double beta;
  double eps;
  Reduction reduction;

  // Forward: written. Backward: `state` is read, `loss` and `partials` are not used.
  void* loss;        // (rows,) for kNone, else one element
  uint8_t* state;    // (rows,) RowState bits
  double* partials;  // (kMaxBlocks,) CUDA scratch; null on the CPU

  // Backward: gradients of the inputs, (rows, cols) dense; null where nobody asked for one.
  const void* grad_loss;  // (rows,) for kNone, else one element
  void* grad_anchor;
  void* grad_positive;
  void* grad_negative;
};

// CUDA launchers, on the current device. They return null, or the text of CUDA's error.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);

}  // namespace jitops::improved_triplet_loss
