// The path of dynamic time warping: the contract between the host (.cpp) and the kernels (.cu).
// It includes no header of torch or CUDA, so both compilers read it fast.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/warping.h"

namespace jitops::dtw_path {

using warping::Pair;

struct Params : warping::Inputs {
  int64_t* path;          // (pairs, rows + cols - 1, 2): written, with -1 behind the path
  int64_t* path_lengths;  // (pairs,): written; 0 for a pair without a path
  void* moves;            // CUDA scratch: (pairs at once, rows, cols) of uint8_t
  double* above;          // CUDA scratch: (pairs at once, cols)
};

// From where the best path arrives at a cell. Of equal ones the first counts.
enum Move : uint8_t { kDiagonal, kUp, kLeft };

// The least sum of the predecessors, and which one it is. Those outside of the matrix and its band
// are infinite. No sum is less than NaN.
struct Least {
  double sum;
  uint8_t move;

  JITOPS_BOTH JITOPS_INLINE Least(double diagonal, double up, double left) {
    const bool is_up = up < diagonal;
    const double first = is_up ? up : diagonal;
    const bool is_left = left < first;
    sum = is_left ? left : first;
    move = is_left ? kLeft : is_up ? kUp : kDiagonal;
  }
};

// Follows the moves from the last cell to the first one. `move(i, j)` is that of a cell, and
// f(n, i, j) takes the cells, of which the last one is n = 0. Returns their number.
template <typename Moves, typename F>
JITOPS_BOTH inline int64_t trace(const Pair& pair, const Moves& move, const F& f) {
  int64_t i = pair.rows - 1, j = pair.cols - 1, n = 0;
  for (f(n++, i, j); i > 0 || j > 0; f(n++, i, j)) {
    const int which = i == 0 ? kLeft : j == 0 ? kUp : move(i, j);
    i -= which != kLeft;
    j -= which != kUp;
  }
  return n;
}

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_forward(DType dtype, const Params& params, void* stream);

// The pairs that have scratch memory at a time.
int64_t pairs_at_once(const Params& params);

}  // namespace jitops::dtw_path
