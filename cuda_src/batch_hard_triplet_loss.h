// The batch-hard triplet loss: the contract between the host (.cpp) and the kernels (.cu).
// It includes no header of torch or CUDA, so both compilers read it fast.
#pragma once

#include "common/triplets.h"

namespace jitops::batch_hard_triplet_loss {

struct Params : Triplets {
  // Forward: written. Backward: read. The candidates are -1 if there is none.
  int64_t* positive;  // (rows,)
  int64_t* negative;  // (rows,)
  void* distances;    // (2, rows) of acc_t<T>: to the positive, to the negative
  int64_t* count;     // one element: the anchors that have both

  void* partials;  // CUDA scratch: see `scratch_bytes`
};

template <typename A>
JITOPS_BOTH A distance(const Params& params, double sum_of_squares) {
  return static_cast<A>(params.squared ? sum_of_squares : std::sqrt(sum_of_squares));
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
