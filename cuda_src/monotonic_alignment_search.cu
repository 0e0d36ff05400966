// Monotonic alignment search on CUDA: kernel and launcher. No torch header.
//
// The floor is latency: the frames of a pair depend on each other, at a barrier each, about 50 ns.
// A block takes a pair. A thread takes a token of a tile, and keeps its back pointers as bits of a
// word. One thread follows them. No atomics, so results are bitwise deterministic.
#include "monotonic_alignment_search.h"

#include "common/cuda.cuh"

namespace jitops::monotonic_alignment_search {
namespace {

using cuda::kMaxThreads;
using cuda::kWarp;
using cuda::load;
using cuda::store;

constexpr int64_t kMaxPairs = 1024;  // at a time: each has a scratch memory
constexpr int kAhead = 8;            // frames whose scores are loaded at once, to hide the latency

// The scratch memory of a block.
template <typename A>
struct Scratch {
  uint32_t* moves;  // (words, tokens)
  A* of_above;      // (2, frames): the sums of the last token of every other tile

  __device__ explicit Scratch(const Params& params) {
    const int64_t words = (params.frames + kWordFrames - 1) / kWordFrames;
    moves = static_cast<uint32_t*>(params.moves) + blockIdx.x * words * params.tokens;
    of_above = static_cast<A*>(params.of_above) + blockIdx.x * 2 * params.frames;
  }
};

// All frames of the tokens of a tile, the one that begins with token `first`.
template <typename T, typename A>
__device__ void sweep(const Params& params, const Pair& pair, const T* scores, int64_t first,
                      const Scratch<A>& scratch, A (&shared)[2][kMaxThreads]) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t token = first + thread, tile = first / threads;
  const bool mine = token < pair.tokens;
  const A* above = scratch.of_above + (tile + 1) % 2 * params.frames;
  A* last = scratch.of_above + tile % 2 * params.frames;
  const A never = -static_cast<A>(INFINITY);
  A sum = never;
  uint32_t word = 0;
  for (int64_t begin = 0; begin < pair.frames; begin += kAhead) {
    A ahead[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t frame = begin + k;
      const bool there = mine && frame < pair.frames;
      ahead[k] = there ? load(scores[token * params.strides[1] + frame * params.strides[2]]) : A(0);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t frame = begin + k;
      if (frame >= pair.frames) break;  // all threads
      A comes = never;
      if (frame > 0 && mine) {
        if (thread > 0) {
          comes = shared[(frame + 1) % 2][thread - 1];
        } else if (first > 0) {
          comes = above[frame - 1];
        }
      }
      const bool moved = comes > sum || (frame == token && frame > 0);
      sum = frame == 0 && token == 0 ? ahead[k] : (moved ? comes : sum) + ahead[k];
      word = word << 1 | (moved ? 1u : 0u);
      const bool ends = frame % kWordFrames == kWordFrames - 1 || frame == pair.frames - 1;
      if (mine && ends) {
        scratch.moves[frame / kWordFrames * params.tokens + token] = word;
      }
      shared[frame % 2][thread] = sum;
      if (mine && thread == threads - 1) last[frame] = sum;
      __syncthreads();
    }
  }
}

// Ones along the path, from its end.
template <typename T, typename A>
__device__ void write_path(const Params& params, const Pair& pair, const Scratch<A>& scratch,
                           T* path) {
  int64_t token = pair.tokens - 1, at = -1;
  uint32_t word = 0;
  for (int64_t frame = pair.frames - 1; frame >= 0; --frame) {
    store(path[token * params.frames + frame], A(1));
    const int64_t place = frame / kWordFrames * params.tokens + token;
    if (place != at) word = scratch.moves[place];
    at = place;
    const int64_t end = (frame / kWordFrames + 1) * kWordFrames;
    const int64_t last = (end < pair.frames ? end : pair.frames) - 1;
    if (word >> (last - frame) & 1u) --token;
  }
}

// Budget: 64 registers, 4096 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) forward_kernel(Params params) {
  using A = acc_t<T>;
  __shared__ A shared[2][kMaxThreads];
  const Scratch<A> scratch(params);
  const int64_t elements = params.tokens * params.frames;
  for (int64_t number = blockIdx.x; number < params.pairs; number += gridDim.x) {
    const Pair pair(params, number);
    const T* scores = static_cast<const T*>(params.scores) + number * params.strides[0];
    T* path = static_cast<T*>(params.path) + number * elements;
    const A elsewhere = pair.valid ? A(0) : static_cast<A>(NAN);
    for (int64_t n = threadIdx.x; n < elements; n += blockDim.x) store(path[n], elsewhere);
    if (!pair.has_path()) continue;
    for (int64_t first = 0; first < pair.tokens; first += blockDim.x) {
      sweep(params, pair, scores, first, scratch, shared);
    }
    if (threadIdx.x == 0) write_path(params, pair, scratch, path);
    __syncthreads();  // before the scratch memory is written for the next pair
  }
}

}  // namespace

int64_t pairs_at_once(const Params& params) {
  return params.pairs < kMaxPairs ? params.pairs : kMaxPairs;
}

const char* launch_forward(DType dtype, const Params& params, void* stream) {
  const int64_t whole = (params.tokens + kWarp - 1) / kWarp * kWarp;
  const int64_t threads = whole < kMaxThreads ? whole : kMaxThreads;
  return cuda::dispatch(dtype, [&](auto zero) {
    return launch(forward_kernel<decltype(zero)>,
                  dim3(static_cast<unsigned>(pairs_at_once(params))),
                  dim3(static_cast<unsigned>(threads)), 0, stream, params);
  });
}

}  // namespace jitops::monotonic_alignment_search
