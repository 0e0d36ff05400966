// Nearest neighbours of points: the contract between the host (.cpp) and the kernels (.cu).
// It includes no header of torch or CUDA, so both compilers read it fast.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace jitops::knn_points {

// A batch of clouds: point i of cloud b begins at data + (b * count + i) * stride.
struct Points {
  const void* data;
  const int64_t* lengths;  // (batch,), or null: all points count
  int64_t stride;
  int64_t count;  // with the padding

  JITOPS_BOTH int64_t length(int64_t b) const { return lengths ? lengths[b] : count; }
};

template <typename T>
JITOPS_BOTH const T* point(const Points& points, int64_t b, int64_t i) {
  return static_cast<const T*>(points.data) + (b * points.count + i) * points.stride;
}

// The neighbours of the points of one side on the other: (batch, count, k) elements.
struct Neighbours {
  void* dists;              // acc_t<T>: forward: written
  int64_t* idx;             // forward: written; backward: read
  const void* grad_dists;   // acc_t<T>: backward: read; null if there is none
  // CUDA, backward: for each element of idx, the point that it means among those of all clouds;
  // sorted, and the places of these elements in idx.
  const int64_t* sorted;
  const int64_t* by_point;
};

struct Params {
  Points points[2];  // p1, p2
  int64_t batch;
  int64_t cols;
  int64_t k;
  int64_t norm;  // 1, or 2: squared
  bool both;     // p2's neighbours in p1 too

  Neighbours neighbours[2];  // of p1, of p2
  void* grads[2];            // acc_t<T>, dense: backward: written; null if not needed
  void* scratch;             // CUDA, forward: see `scratch_bytes`
};

// The real neighbours of point i; the others are padding.
JITOPS_BOTH inline int64_t neighbours_of(const Params& params, int side, int64_t b, int64_t i) {
  const int64_t others = params.points[1 - side].length(b);
  if (i >= params.points[side].length(b)) return 0;
  return params.k < others ? params.k : others;
}

// The derivative of a distance with respect to the difference of two coordinates. The sign of NaN is
// 0, as in torch.
template <typename A>
JITOPS_BOTH A slope(const Params& params, A difference) {
  if (params.norm == 2) return A(2) * difference;
  return difference > A(0) ? A(1) : difference < A(0) ? A(-1) : A(0);
}

// CUDA launchers for the current device. They return null, or CUDA's error message. `launch_places`
// writes what `sorted` is made of.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_places(const Params& params, int side, int64_t* places, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);

// The bytes of `scratch` that the forward launcher needs.
int64_t scratch_bytes(const Params& params);

}  // namespace jitops::knn_points
