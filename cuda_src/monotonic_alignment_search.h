// Monotonic alignment search: the contract between the host (.cpp) and the kernels (.cu).
// It includes no header of torch or CUDA, so both compilers read it fast.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace jitops::monotonic_alignment_search {

// The back pointers of a token in so many frames are the bits of a word, the last frame's lowest.
constexpr int64_t kWordFrames = 32;

struct Params {
  // Input: element (b, i, j) lies at b * strides[0] + i * strides[1] + j * strides[2].
  const void* scores;      // (pairs, tokens, frames)
  int64_t strides[3];
  const int64_t* lengths;  // (2, pairs): tokens and frames; or null if all pairs have all
  int64_t pairs, tokens, frames;

  void* path;      // (pairs, tokens, frames), dense
  void* moves;     // CUDA scratch: (pairs at once, words, tokens) of uint32_t
  void* of_above;  // CUDA scratch: (pairs at once, 2, frames) of acc_t<T>
};

// A pair: its lengths. The path of a pair whose lengths are wrong is NaN: on a GPU, Python does not
// wait for lengths, and cannot refuse them.
struct Pair {
  int64_t number, tokens, frames;
  bool valid;

  JITOPS_BOTH Pair(const Params& params, int64_t number_)
      : number(number_), tokens(params.tokens), frames(params.frames) {
    if (params.lengths) {
      tokens = params.lengths[number];
      frames = params.lengths[params.pairs + number];
    }
    valid = tokens >= 0 && tokens <= params.tokens && frames <= params.frames && tokens <= frames;
  }
  JITOPS_BOTH bool has_path() const { return valid && tokens > 0; }
};

inline int64_t words_of(int64_t frames) { return (frames + kWordFrames - 1) / kWordFrames; }

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_forward(DType dtype, const Params& params, void* stream);

// The pairs that have scratch memory at a time.
int64_t pairs_at_once(const Params& params);

}  // namespace jitops::monotonic_alignment_search
