// The batch-all and the batch semi-hard triplet loss: the contract between the host (.cpp) and the
// kernels (.cu). It includes no header of torch or CUDA, so both compilers read it fast.
//
// Both passes work on some anchors at a time. They compute the distances of these to all candidates
// into scratch memory, and turn them into the weights of the differences a - b in the gradient. So
// memory does not grow with rows * others.
//
// The forward pass forms the gradients of a sum of losses, because it has the distances. Only a
// factor is missing then. Losses that are not reduced have a factor for each anchor. So their
// gradients are formed in the backward pass, which computes the distances again.
#pragma once

#include "common/triplets.h"

namespace jitops::batch_all_triplet_loss {

// Which triplets count, by the numbers of ops/losses/batch_all_triplet_loss.py.
enum class Rule : int64_t {
  kAll = 0,       // with a loss above 0
  kSemiHard = 1,  // with a loss above 0, and the negative farther than the positive
  kNearest = 2,   // for each positive: the nearest negative farther than it, else the farthest one
};

struct Params : Triplets {
  Rule rule;

  // Forward: written. One element of acc_t<T> each. Null in the backward pass.
  void* fraction;  // of the triplets with a loss above 0 among all
  void* scale;     // of the sum of losses in the result; the backward pass reads it

  int64_t* counts;   // CUDA scratch (2, rows): the triplets that count, all triplets
  double* sums;      // CUDA scratch (rows,): the losses of the anchors
  void* distances;   // CUDA scratch (chunk, others) of acc_t<T>
  void* weights;     // CUDA scratch of the same size
  int64_t chunk;     // anchors at a time
};

// Sums over all anchors.
struct Totals {
  double loss = 0;
  int64_t counted = 0, all = 0;

  JITOPS_BOTH double divisor(const Params& params) const {
    if (params.reduction != Reduction::kMean) return 1;
    const int64_t count = params.counts_all ? all : counted;
    return static_cast<double>(count < 1 ? 1 : count);
  }
  JITOPS_BOTH double fraction() const {
    return static_cast<double>(counted) / static_cast<double>(all < 1 ? 1 : all);
  }
};

// The CUDA launcher of both passes, for the current device. It returns null, or CUDA's error message.
const char* launch_triplets(DType dtype, const Params& params, void* stream);

// The anchors of a chunk on CUDA.
int64_t chunk_of(int64_t rows, int64_t others);

}  // namespace jitops::batch_all_triplet_loss
