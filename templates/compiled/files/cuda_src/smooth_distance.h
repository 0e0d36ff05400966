// smooth_distance: the contract between the host (.cpp) and the kernels (.cu).
// It includes no header of torch or CUDA, so both compilers read it fast.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/reduction.h"

namespace jitops::smooth_distance {

constexpr int64_t kMaxBlocks = 1024;  // of a grid; each block writes one partial sum

struct Params {
  // Inputs: (rows, cols). A row is dense; rows lie `*_stride` elements apart (0: one shared row).
  const void* input;
  const void* target;
  int64_t input_stride;
  int64_t target_stride;
  int64_t rows;
  int64_t cols;
  double width;
  Reduction reduction;

  // Forward: written. Backward: `roots` is read, `loss` and `partials` are not used.
  void* loss;        // (rows,) for kNone, else one element
  double* roots;     // (rows,) the losses of the rows
  double* partials;  // (kMaxBlocks,) CUDA scratch; null on the CPU

  // Backward: gradients of the inputs, (rows, cols), dense. Null if not needed.
  const void* grad_loss;  // (rows,) for kNone, else one element
  void* grad_input;
  void* grad_target;
};

// ---- the formula of a row, for the CPU and for CUDA -------------------------------------------

JITOPS_BOTH inline double row_loss(const Params& params, double squared_distance) {
  return std::sqrt(squared_distance + params.width * params.width);
}

JITOPS_BOTH inline double reduced(const Params& params, double sum) {
  return params.reduction == Reduction::kMean ? sum / static_cast<double>(params.rows) : sum;
}

// The gradient of the input is factor * (input - target). That of the target is its negative.
// `grad` is the gradient of the loss.
template <typename A>
JITOPS_BOTH A row_factor(const Params& params, double root, A grad) {
  if (params.reduction == Reduction::kMean) grad /= static_cast<A>(params.rows);
  return grad / static_cast<A>(root);
}

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);

}  // namespace jitops::smooth_distance
