// The batch-hard triplet loss: the contract between the host (.cpp) and the kernels (.cu).
// It includes no header of torch or CUDA, so both compilers read it fast.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/reduction.h"

namespace jitops::batch_hard_triplet_loss {

struct Params {
  // Anchors (rows, cols) and candidates (others, cols). A row is dense; rows lie `*_stride`
  // elements apart. Without references the candidates are the anchors.
  const void* anchors;
  const void* candidates;
  const int64_t* anchor_labels;     // (rows,)
  const int64_t* candidate_labels;  // (others,)
  int64_t anchor_stride;
  int64_t candidate_stride;
  int64_t rows;
  int64_t others;
  int64_t cols;
  bool same;  // the candidates are the anchors: a row is no positive of itself

  double margin;
  bool soft;     // log(1 + exp(x)) in place of max(x + margin, 0)
  bool squared;  // squared distances in place of distances
  bool counts_all;  // the mean divides by all anchors, not by those with both kinds of candidate
  Reduction reduction;

  // Forward: written. Backward: read. The candidates are -1 if there is none.
  int64_t* positive;  // (rows,)
  int64_t* negative;  // (rows,)
  void* distances;    // (2, rows) of acc_t<T>: to the positive, to the negative
  int64_t* count;     // one element: the anchors that have both

  void* loss;    // forward: (rows,) for kNone, else one element
  void* partials;  // CUDA scratch: see `scratch_bytes`

  // Backward: gradients of anchors and candidates, dense, of acc_t<T>. Null if not needed. If
  // `same`, the first is null and the second is the gradient of both.
  const void* grad_loss;  // (rows,) for kNone, else one element
  void* grad_anchors;
  void* grad_candidates;
};

// ---- rows, and the formula of an anchor, for the CPU and for CUDA ------------------------------

template <typename T>
JITOPS_BOTH const T* anchor_row(const Params& params, int64_t i) {
  return static_cast<const T*>(params.anchors) + i * params.anchor_stride;
}

template <typename T>
JITOPS_BOTH const T* candidate_row(const Params& params, int64_t j) {
  return static_cast<const T*>(params.candidates) + j * params.candidate_stride;
}

template <typename A>
JITOPS_BOTH A distance(const Params& params, double sum_of_squares) {
  return static_cast<A>(params.squared ? sum_of_squares : std::sqrt(sum_of_squares));
}

// The loss of x = d+ - d-. NaN stays NaN.
template <typename A>
JITOPS_BOTH A hinge(const Params& params, A x) {
  if (params.soft) return (x > A(0) ? x : A(0)) + std::log1p(std::exp(x > A(0) ? -x : x));
  const A with_margin = x + static_cast<A>(params.margin);
  return with_margin < A(0) ? A(0) : with_margin;
}

// The derivative of `hinge`; 0 at its edge, as torch.relu has it.
template <typename A>
JITOPS_BOTH A hinge_slope(const Params& params, A x) {
  if (!params.soft) return x + static_cast<A>(params.margin) <= A(0) ? A(0) : A(1);
  const A e = std::exp(x > A(0) ? -x : x);
  return (x > A(0) ? A(1) : e) / (A(1) + e);
}

// The factor of a - b in the gradient of the distance between a and b; 0 where they are equal.
template <typename A>
JITOPS_BOTH A distance_factor(const Params& params, A d) {
  if (params.squared) return A(2);
  return d == A(0) ? A(0) : A(1) / d;
}

// The number that the mean divides by.
JITOPS_BOTH inline double divisor(const Params& params, int64_t count) {
  const int64_t all = params.counts_all ? params.rows : count;
  return static_cast<double>(all < 1 ? 1 : all);
}

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);

// The bytes of `partials` that the forward launcher needs.
int64_t scratch_bytes(DType dtype, int64_t rows, int64_t others);

}  // namespace jitops::batch_hard_triplet_loss
