// The inputs of an alignment of two sequences, and the lengths and the band of a pair. It includes no
// header of torch or CUDA.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace jitops::warping {

// Dense: two sequences of each pair, or a matrix of costs.
struct Inputs {
  const void* x;           // (pairs, rows, features), or null
  const void* y;           // (pairs, cols, features), or null
  const void* cost;        // (pairs, rows, cols), or null
  const int64_t* lengths;  // (2, pairs): rows and columns; or null if all pairs have all
  int64_t pairs, rows, cols, features;
  int64_t bandwidth;  // |i - j| is at most this; `rows` + `cols` if there is no band
};

// A pair: its lengths and its band. One whose lengths are out of range, or too different for the
// band, has no results: on a GPU, Python does not wait for lengths, and cannot refuse them.
struct Pair {
  int64_t number, rows, cols, bandwidth;
  bool valid;

  JITOPS_BOTH Pair(const Inputs& inputs, int64_t number_)
      : number(number_), rows(inputs.rows), cols(inputs.cols), bandwidth(inputs.bandwidth) {
    const int64_t x = inputs.lengths ? inputs.lengths[number] : rows;
    const int64_t y = inputs.lengths ? inputs.lengths[inputs.pairs + number] : cols;
    valid = x > 0 && x <= rows && y > 0 && y <= cols && x - y <= bandwidth && y - x <= bandwidth;
    if (valid) rows = x, cols = y;
  }
  // The columns [first, end) of a row that lie in the band.
  JITOPS_BOTH int64_t first(int64_t row) const { return row > bandwidth ? row - bandwidth : 0; }
  JITOPS_BOTH int64_t end(int64_t row) const {
    const int64_t last = row + bandwidth + 1;
    return last < cols ? last : cols;
  }
};

}  // namespace jitops::warping
