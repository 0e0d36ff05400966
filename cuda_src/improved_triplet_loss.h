// The improved triplet loss: the contract between the host (.cpp) and the kernels (.cu).
// It includes no header of torch or CUDA, so both compilers read it fast.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace jitops::improved_triplet_loss {

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// The state of a row that the forward pass keeps, so the backward pass measures no distance again.
enum RowState : uint8_t {
  kMarginActive = 1,    // d+ - d- >= t1: the gradient flows through the first clamp
  kPositiveActive = 2,  // d+ >= t2: the gradient flows through the second clamp
  kFinite = 4,          // d+ and d- are finite, so a factor of zero makes a gradient of zero
};

// Largest forward grid. Each block writes one partial sum. Where blocks share rows, each writes
// two, so the grid is half as large.
constexpr int64_t kMaxBlocks = 2048;

struct Params {
  // Inputs: (rows, cols). A row is dense; rows lie `*_stride` elements apart (0: one shared row).
  const void* anchor;
  const void* positive;
  const void* negative;
  int64_t anchor_stride;
  int64_t positive_stride;
  int64_t negative_stride;
  int64_t rows;
  int64_t cols;

  // The loss: max(d+ - d-, t1) + beta * max(d+, t2), with squared distances.
  double t1;
  double t2;
  double beta;
  double eps;
  Reduction reduction;

  // Forward: written. Backward: `state` is read, `loss` and `partials` are not used.
  void* loss;        // (rows,) for kNone, else one element
  uint8_t* state;    // (rows,) RowState bits
  double* partials;  // (kMaxBlocks,) CUDA scratch; null on the CPU

  // Backward: gradients of the inputs, (rows, cols), dense. Null if not needed.
  const void* grad_loss;  // (rows,) for kNone, else one element
  void* grad_anchor;
  void* grad_positive;
  void* grad_negative;
};

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);

}  // namespace jitops::improved_triplet_loss
