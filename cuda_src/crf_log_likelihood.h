// The linear-chain conditional random field: the contract between the host (.cpp) and the kernels
// (.cu). It includes no header of torch or CUDA, so both compilers read it fast.
//
// The forward recursion is a_t(j) = e_t(j) + s_t(j) with s_t(j) = log sum_i exp(a_{t-1}(i) + T(i, j)).
// s is kept. The backward pass takes the shares w(i, j) = exp(a_{t-1}(i) + T(i, j) - s_t(j)), which
// sum to 1 over i: what flows into a cell flows on by them. All of this is float64.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace jitops::crf {

struct Params {
  // Inputs: tag k of step t of pair b lies at b * strides[0] + t * strides[1] + k. The rest is dense.
  const void* emissions;
  int64_t strides[2];
  const int64_t* tags;     // (pairs, steps); -1 for one that is out of range
  const int64_t* lengths;  // (pairs,), or null if all steps count
  const void* transitions;  // (labels, labels)
  const void* start;        // (labels,)
  const void* end;          // (labels,)
  int64_t pairs, steps, labels;

  double* value;  // (pairs,)
  double* sums;   // (pairs, steps, labels): s; the CPU may keep exp(s), scaled

  // Backward: dense gradients. Null if not needed.
  const double* grad_value;  // (pairs,)
  void* grad_emissions;
  void* grad_transitions;
  void* grad_start;
  void* grad_end;
  double* partial;  // (blocks, elements_of_block)
  int64_t blocks;

  // Decoding.
  int64_t* path;        // (pairs, steps): written, with -1 behind the end
  int32_t* before;      // CUDA scratch: (pairs, steps, labels)
  double* scores;       // CUDA scratch: (pairs, 2, labels)
};

// The length of a sequence: 0 if its mask is wrong. On a GPU, Python does not wait for masks and
// tags, and cannot refuse them. The value is NaN then.
JITOPS_BOTH inline int64_t length_of(const Params& params, int64_t pair) {
  const int64_t length = params.lengths ? params.lengths[pair] : params.steps;
  return length > 0 && length <= params.steps ? length : 0;
}

// The pairs of a block of the backward pass, which adds up their gradients of the parameters:
// labels * labels transitions, labels starts, labels ends, and scratch memory for two steps.
inline int64_t blocks_of(int64_t pairs, int64_t labels) {
  const int64_t most = (int64_t{1} << 24) / (labels * labels) + 1;
  const int64_t blocks = most < 64 ? most : 64;
  return blocks < pairs ? blocks : pairs;
}
JITOPS_BOTH inline int64_t elements_of_block(int64_t labels) { return labels * (labels + 4); }

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);
const char* launch_decode(DType dtype, const Params& params, void* stream);

}  // namespace jitops::crf
