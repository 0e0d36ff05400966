// The improved triplet loss: the contract between the host (.cpp) and the kernels (.cu).
// It includes no header of torch or CUDA, so both compilers read it fast.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/reduction.h"

namespace jitops::improved_triplet_loss {

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

// ---- the formula of a row, for the CPU and for CUDA -------------------------------------------

// torch.clamp(x, min=bound): NaN stays NaN.
template <typename A>
JITOPS_BOTH A clamp_min(A x, A bound) {
  return x < bound ? bound : x;
}

template <typename A>
JITOPS_BOTH bool is_finite(A x) {
  return x - x == A(0);
}

template <typename A>
struct RowLoss {
  A loss;
  uint8_t state;  // RowState bits
};

template <typename A>
JITOPS_BOTH RowLoss<A> row_loss(const Params& params, A d_pos, A d_neg) {
  const A t1 = static_cast<A>(params.t1), t2 = static_cast<A>(params.t2);
  const A margin = d_pos - d_neg;
  const int state = (margin >= t1 ? kMarginActive : 0) | (d_pos >= t2 ? kPositiveActive : 0) |
                    (is_finite(d_pos) && is_finite(d_neg) ? kFinite : 0);
  return {clamp_min(margin, t1) + static_cast<A>(params.beta) * clamp_min(d_pos, t2),
          static_cast<uint8_t>(state)};
}

// The gradients of a row: u = pos * (a - p + eps), v = neg * (a - n + eps); u + v, -u and -v.
template <typename A>
struct RowFactors {
  A pos, neg;
  bool reads_negative;  // false: v is zero, and the row of the negative is not needed
};

// The weight of a row in the loss.
template <typename A>
JITOPS_BOTH A row_weight(const Params& params) {
  return params.reduction == Reduction::kMean ? A(1) / static_cast<A>(params.rows) : A(1);
}

// `grad` is the gradient of the row's own loss.
template <typename A>
JITOPS_BOTH RowFactors<A> row_factors(uint8_t state, A beta, A grad) {
  const A margin = state & kMarginActive ? grad : A(0);
  const A positive = state & kPositiveActive ? beta * grad : A(0);
  const A neg = A(-2) * margin;
  return {A(2) * (margin + positive), neg, neg != A(0) || !(state & kFinite)};
}

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);

}  // namespace jitops::improved_triplet_loss
