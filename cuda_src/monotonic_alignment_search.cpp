// Monotonic alignment search: host side, CPU kernels, registration.
#include "monotonic_alignment_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/run.h"

namespace jitops::monotonic_alignment_search {
namespace {

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------
//
// Frames follow each other, and the tokens of a frame are computed at once. A thread takes a pair.

// A word as wide as a sum, because then a loop over both vectorises.
template <typename A>
struct Word { using type = uint32_t; };
template <>
struct Word<double> { using type = uint64_t; };

constexpr int64_t kTile = 8;

// Eight rows of eight numbers become columns. g++ vectorises no such loop by itself.
JITOPS_KERNEL inline void transpose(const float* from, int64_t from_stride, float* to,
                                    int64_t to_stride) {
  using Row [[gnu::vector_size(4 * kTile)]] = float;
  Row a[kTile], b[kTile];
  for (int64_t k = 0; k < kTile; ++k) std::memcpy(&a[k], from + k * from_stride, sizeof(Row));
  for (int64_t k = 0; k < kTile; k += 2) {
    b[k] = __builtin_shufflevector(a[k], a[k + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[k + 1] = __builtin_shufflevector(a[k], a[k + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int64_t k = 0; k < kTile; k += k % 4 == 0 ? 1 : 3) {
    a[k] = __builtin_shufflevector(b[k], b[k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[k + 2] = __builtin_shufflevector(b[k], b[k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int64_t k = 0; k < kTile / 2; ++k) {
    b[k] = __builtin_shufflevector(a[k], a[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[k + 4] = __builtin_shufflevector(a[k], a[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int64_t k = 0; k < kTile; ++k) std::memcpy(to + k * to_stride, &b[k], sizeof(Row));
}

template <typename T, typename A>
JITOPS_KERNEL inline void transpose(const T* from, int64_t from_stride, A* to, int64_t to_stride) {
  for (int64_t i = 0; i < kTile; ++i) {
    for (int64_t k = 0; k < kTile; ++k) to[k * to_stride + i] = cpu::load(from[i * from_stride + k]);
  }
}

// The scores of `count` frames, a frame in `stride` elements: of tokens that lie `step` apart.
template <typename T, typename A>
JITOPS_KERNEL void load_frames(const T* __restrict scores, int64_t step, int64_t first,
                               int64_t end, int64_t count, A* __restrict out, int64_t stride) {
  const int64_t whole = count / kTile * kTile;
  int64_t token = first;
  for (; token + kTile <= end; token += kTile) {
    const T* its = scores + token * step;
    for (int64_t k = 0; k < whole; k += kTile) {
      transpose(its + k, step, out + k * stride + token, stride);
    }
    for (int64_t k = whole; k < count; ++k) {
      for (int64_t i = 0; i < kTile; ++i) {
        out[k * stride + token + i] = cpu::load(its[i * step + k]);
      }
    }
  }
  for (; token < end; ++token) {
    for (int64_t k = 0; k < count; ++k) {
      out[k * stride + token] = cpu::load(scores[token * step + k]);
    }
  }
}

template <typename T, typename A>
JITOPS_KERNEL void load_tokens(const T* __restrict scores, int64_t count, A* __restrict out) {
#pragma omp simd
  for (int64_t token = 0; token < count; ++token) out[token] = cpu::load(scores[token]);
}

// A frame. Place -1 of `before` is there too.
template <typename A, typename W>
JITOPS_KERNEL void take_frame(const A* __restrict scores, const A* __restrict before,
                              int64_t first, int64_t end, A* __restrict after,
                              W* __restrict moves) {
#pragma omp simd
  for (int64_t token = first; token < end; ++token) {
    const A stays = before[token], comes = before[token - 1];
    const bool moved = comes > stays;
    after[token] = (moved ? comes : stays) + scores[token];
    moves[token] = moves[token] << 1 | static_cast<W>(moved);
  }
}

template <typename T>
class Search {
  using A = acc_t<T>;
  using W = typename Word<A>::type;

 public:
  explicit Search(const Params& params)
      : params_(params),
        stride_(params.tokens + 1),
        scores_(kWordFrames * params.tokens),
        sums_(2 * stride_, -std::numeric_limits<A>::infinity()),
        moves_(words_of(params.frames) * params.tokens) {}

  void run(const Pair& pair) {
    T* path = static_cast<T*>(params_.path) + pair.number * params_.tokens * params_.frames;
    const size_t elements = static_cast<size_t>(params_.tokens * params_.frames);
    if (pair.valid) {
      std::memset(static_cast<void*>(path), 0, elements * sizeof(T));
    } else {
      for (size_t n = 0; n < elements; ++n) cpu::store(path[n], static_cast<A>(NAN));
    }
    if (!pair.has_path()) return;
    for (int64_t frame = 0; frame < pair.frames; frame += kWordFrames) take_word(pair, frame);
    write(pair, path);
  }

 private:
  void take_word(const Pair& pair, int64_t begin) {
    const int64_t count = std::min(kWordFrames, pair.frames - begin);
    // Earlier tokens cannot reach the last one, later ones are not reached.
    const int64_t first = std::max<int64_t>(0, pair.tokens - (pair.frames - begin));
    const int64_t last = std::min(pair.tokens, begin + count);
    load(pair, begin, count, first, last);
    W* moves = moves_.data() + begin / kWordFrames * params_.tokens;
    std::fill(moves + first, moves + last, W(0));
    for (int64_t frame = begin; frame < begin + count; ++frame) {
      const A* scores = scores_.data() + (frame - begin) * params_.tokens;
      const A* before = sums_.data() + (frame + 1) % 2 * stride_ + 1;
      A* after = sums_.data() + frame % 2 * stride_ + 1;
      take_frame(scores, before, first, std::min(pair.tokens, frame), after, moves);
      if (frame >= pair.tokens) continue;  // else this token is reached from the one before alone
      after[frame] = scores[frame] + (frame > 0 ? before[frame - 1] : A(0));
    }
  }

  void load(const Pair& pair, int64_t begin, int64_t count, int64_t first, int64_t last) {
    const int64_t* strides = params_.strides;
    const T* from = static_cast<const T*>(params_.scores) + pair.number * strides[0];
    if (strides[2] == 1) {
      load_frames(from + begin, strides[1], first, last, count, scores_.data(), params_.tokens);
      return;
    }
    for (int64_t k = 0; k < count; ++k) {
      load_tokens(from + (begin + k) * strides[2] + first, last - first,
                  scores_.data() + k * params_.tokens + first);
    }
  }

  void write(const Pair& pair, T* path) const {
    int64_t token = pair.tokens - 1;
    for (int64_t frame = pair.frames - 1; frame >= 0; --frame) {
      cpu::store(path[token * params_.frames + frame], A(1));
      const int64_t word = frame / kWordFrames, begin = word * kWordFrames;
      const int64_t last = std::min(begin + kWordFrames, pair.frames) - 1;
      const bool moved = moves_[word * params_.tokens + token] >> (last - frame) & 1;
      token -= frame == token || moved ? 1 : 0;
    }
  }

  const Params& params_;
  int64_t stride_;
  std::vector<A> scores_;  // of the frames of a word: (frame, token)
  std::vector<A> sums_;    // of two frames, with minus infinity before each
  std::vector<W> moves_;   // (word, token)
};

template <typename T>
void forward_cpu(const Params& params) {
  torch::stable::parallel_for(0, params.pairs, 1, [&](int64_t begin, int64_t end) {
    Search<T> search(params);
    for (int64_t number = begin; number < end; ++number) search.run(Pair(params, number));
  });
}
#endif

// ---- the operator -------------------------------------------------------------------------------

Tensor forward(const Tensor& scores_, const std::optional<Tensor>& lengths_) {
  check(scores_.dim() == 3, "scores", " must have three dimensions");
  const bool adjacent = scores_.stride(2) == 1 || scores_.stride(1) == 1;
  const Tensor scores = adjacent ? scores_ : torch::stable::contiguous(scores_);
  Params params{};
  params.scores = scores.const_data_ptr();
  for (int d = 0; d < 3; ++d) params.strides[d] = scores.stride(d);
  params.pairs = scores.size(0);
  params.tokens = scores.size(1);
  params.frames = scores.size(2);
  Tensor lengths;
  if (lengths_) {
    lengths = dense(*lengths_);
    check(lengths.numel() == 2 * params.pairs && lengths.scalar_type() == ScalarType::Long &&
              lengths.is_cuda() == scores.is_cuda() &&
              lengths.get_device_index() == scores.get_device_index(),
          "lengths", " must hold two int64 for each pair, on the device of the scores");
    params.lengths = static_cast<const int64_t*>(lengths.const_data_ptr());
  }
  const Tensor path = empty_gradient(scores);
  if (path.numel() == 0) return path;
  params.path = path.mutable_data_ptr();
#ifdef USE_CUDA
  const int64_t at_once = pairs_at_once(params);
  const int64_t words = at_once * words_of(params.frames) * params.tokens;
  const int64_t sums = at_once * 2 * params.frames;
  const Tensor moves = empty({&words, 1}, ScalarType::Int, scores);
  const Tensor of_above = empty({&sums, 1}, wide(scores), scores);
  params.moves = moves.mutable_data_ptr();
  params.of_above = of_above.mutable_data_ptr();
#endif
  const OnDeviceOf device(scores);
  JITOPS_RUN("monotonic_alignment_search", forward, scores, params, device);
  return path;
}

}  // namespace
}  // namespace jitops::monotonic_alignment_search

// ---- registration (schemas and shapes: ops/losses/monotonic_alignment_search.py) ---------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("monotonic_alignment_search_forward",
         TORCH_BOX(&jitops::monotonic_alignment_search::forward));
}
