// Triplet losses of a batch with labels: their tensors, and the formulas of pairs and triplets.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "reduction.h"

namespace jitops {

// `count` dense rows, `stride` elements apart.
template <typename T>
struct RowsOf {
  const T* data;
  int64_t stride, count;
};

struct Triplets {
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
  bool same;    // the candidates are the anchors
  int64_t own;  // anchor i is candidate own + i, which is no positive of itself; -1: it is none

  double margin;
  bool soft;     // log(1 + exp(x)) in place of max(x + margin, 0)
  bool squared;  // squared distances in place of distances
  bool counts_all;  // the mean divides by all, not only by those that the op counts
  Reduction reduction;

  void* loss;  // forward: (rows,) for kNone, else one element

  // Gradients of anchors and candidates, dense, of acc_t<T>. Null if not needed. If `same`, the
  // first is null and the second is the gradient of both.
  const void* grad_loss;  // backward: (rows,) for kNone, else one element
  void* grad_anchors;
  void* grad_candidates;
};

template <typename T>
JITOPS_BOTH const T* anchor_row(const Triplets& params, int64_t i) {
  return static_cast<const T*>(params.anchors) + i * params.anchor_stride;
}

template <typename T>
JITOPS_BOTH const T* candidate_row(const Triplets& params, int64_t j) {
  return static_cast<const T*>(params.candidates) + j * params.candidate_stride;
}

JITOPS_BOTH inline bool is_itself(const Triplets& params, int64_t i, int64_t j) {
  return params.own >= 0 && j == params.own + i;
}

// The factor of a - b in the gradient of the distance between a and b; 0 where they are equal.
template <typename A>
JITOPS_BOTH A distance_factor(const Triplets& params, A d) {
  if (params.squared) return A(2);
  return d == A(0) ? A(0) : A(1) / d;
}

// The loss of x = d+ - d-. NaN stays NaN.
template <typename A>
JITOPS_BOTH A hinge(const Triplets& params, A x) {
  if (params.soft) return (x > A(0) ? x : A(0)) + std::log1p(std::exp(x > A(0) ? -x : x));
  const A with_margin = x + static_cast<A>(params.margin);
  return with_margin < A(0) ? A(0) : with_margin;
}

// The derivative of `hinge`; 0 at its edge, as torch.relu has it.
template <typename A>
JITOPS_BOTH A hinge_slope(const Triplets& params, A x) {
  if (!params.soft) return x + static_cast<A>(params.margin) <= A(0) ? A(0) : A(1);
  const A e = std::exp(x > A(0) ? -x : x);
  return (x > A(0) ? A(1) : e) / (A(1) + e);
}

}  // namespace jitops
