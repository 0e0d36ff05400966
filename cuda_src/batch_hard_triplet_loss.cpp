// The batch-hard triplet loss: host side, CPU kernels, registration.
#include "batch_hard_triplet_loss.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "common/cpu_pairs.h"
#include "common/run.h"
#include "common/triplet_inputs.h"

namespace jitops::batch_hard_triplet_loss {
namespace {

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------

constexpr int64_t kBlockRows = 128;  // anchors that share a packed tile of candidates
constexpr int64_t kBlockElements = 32768;
constexpr int64_t kSumElements = 1024;  // summed in acc_t<T>; these sums are added in float64

// The hardest candidates of an anchor so far.
template <typename A>
struct Hardest {
  A positive = -1, negative = std::numeric_limits<A>::infinity();
  int64_t positive_at = -1, negative_at = -1;

  // NaN is as hard as can be: it counts as infinitely far, or as nearer than 0. Of equal ones the
  // first one is taken.
  void take(A squared, bool same, int64_t at) {
    if (squared != squared) squared = same ? std::numeric_limits<A>::infinity() : A(-1);
    if (same ? positive_at < 0 || squared > positive : negative_at < 0 || squared < negative) {
      (same ? positive : negative) = squared;
      (same ? positive_at : negative_at) = at;
    }
  }
};

// The extremes of a row of a tile, and whether it holds a NaN.
template <typename A, typename L>
JITOPS_KERNEL void extremes(const A* squared, const L* labels, L label, A* most, A* least,
                            A* check) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  A high = -1, low = kInfinity, sum = 0;
#pragma omp simd reduction(max : high) reduction(min : low) reduction(+ : sum)
  for (int64_t lane = 0; lane < cpu::kPairLanes<A>; ++lane) {
    const bool same = labels[lane] == label;
    const A positive = same ? squared[lane] : A(-1), negative = same ? kInfinity : squared[lane];
    high = positive > high ? positive : high;
    low = negative < low ? negative : low;
    sum += squared[lane] * A(0);  // NaN for NaN and infinity
  }
  *most = high;
  *least = low;
  *check = sum;
}

template <typename T>
void mine_block(const Params& params, const std::vector<cpu::LabelOf<acc_t<T>>>& of_anchors,
                const std::vector<cpu::LabelOf<acc_t<T>>>& of_candidates, int64_t begin,
                int64_t end) {
  using A = acc_t<T>;
  using L = cpu::LabelOf<A>;
  constexpr int64_t kLanes = cpu::kPairLanes<A>;
  const int64_t rows = end - begin;
  cpu::PairTiles<T> tiles(anchor_row<T>(params, begin), params.anchor_stride, rows, params.cols);
  std::vector<Hardest<A>> hardest(rows);
  L labels[kLanes];
  for (int64_t first = 0; first < params.others; first += kLanes) {
    const int64_t count = std::min(kLanes, params.others - first);
    tiles.compute(candidate_row<T>(params, first), params.candidate_stride, count);
    std::copy_n(of_candidates.data() + first, count, labels);
    for (int64_t i = 0; i < rows; ++i) {
      const L label = of_anchors[begin + i];
      const A* squared = tiles.row(i);
      Hardest<A>& best = hardest[i];
      if (count == kLanes) {
        A most, least, check;
        extremes(squared, labels, label, &most, &least, &check);
        const bool nothing_new = most <= best.positive && least >= best.negative;
        if (nothing_new && check == 0) continue;
      }
      for (int64_t lane = 0; lane < count; ++lane) {
        if (is_itself(params, begin + i, first + lane)) continue;
        best.take(squared[lane], labels[lane] == label, first + lane);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    params.positive[begin + i] = hardest[i].positive_at;
    params.negative[begin + i] = hardest[i].negative_at;
  }
}

template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL double squared_distance(const T* a, const T* b, int64_t cols) {
  double total = 0;
  for (int64_t first = 0; first < cols; first += kSumElements) {
    const int64_t end = std::min(cols, first + kSumElements);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = first; k < end; ++k) {
      const A difference = cpu::load(a[k]) - cpu::load(b[k]);
      sum += difference * difference;
    }
    total += static_cast<double>(sum);
  }
  return total;
}

template <typename T>
void forward_cpu(const Params& params) {
  using A = acc_t<T>;
  std::vector<cpu::LabelOf<A>> of_anchors, of_candidates;
  cpu::number_labels(params, &of_anchors, &of_candidates);
  A* to_positive = static_cast<A*>(params.distances);
  A* to_negative = to_positive + params.rows;
  const cpu::RowBlocks blocks(params.rows, 1, kBlockRows);
  blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
    mine_block<T>(params, of_anchors, of_candidates, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      const auto to = [&](int64_t j) {
        return j < 0 ? A(0)
                     : distance<A>(params, squared_distance(anchor_row<T>(params, i),
                                                            candidate_row<T>(params, j),
                                                            params.cols));
      };
      to_positive[i] = to(params.positive[i]);
      to_negative[i] = to(params.negative[i]);
    }
  });
  double sum = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < params.rows; ++i) {
    const bool both = params.positive[i] >= 0 && params.negative[i] >= 0;
    const A loss = both ? hinge(params, to_positive[i] - to_negative[i]) : A(0);
    if (params.reduction == Reduction::kNone) cpu::store(static_cast<T*>(params.loss)[i], loss);
    sum += loss;
    count += both;
  }
  *params.count = count;
  if (params.reduction == Reduction::kNone) return;
  if (params.reduction == Reduction::kMean) sum /= divisor(params, count);
  cpu::store(*static_cast<T*>(params.loss), static_cast<A>(sum));
}

// gradient += factor (a - b), and other -= factor (a - b) if there is one.
template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void add_difference(const T* a, const T* b, A factor, int64_t cols, A* gradient,
                                  A* other) {
  if (gradient) {
#pragma omp simd
    for (int64_t k = 0; k < cols; ++k) gradient[k] += factor * (cpu::load(a[k]) - cpu::load(b[k]));
  }
  if (other) {
#pragma omp simd
    for (int64_t k = 0; k < cols; ++k) other[k] -= factor * (cpu::load(a[k]) - cpu::load(b[k]));
  }
}

template <typename T>
void backward_cpu(const Params& params) {
  using A = acc_t<T>;
  const T* grad_loss = static_cast<const T*>(params.grad_loss);
  const A* to_positive = static_cast<const A*>(params.distances);
  const A* to_negative = to_positive + params.rows;
  const bool reduces = params.reduction != Reduction::kNone;
  const A scale = params.reduction == Reduction::kMean
                      ? A(1) / static_cast<A>(divisor(params, *params.count))
                      : A(1);
  A* of_candidates = static_cast<A*>(params.grad_candidates);
  A* of_anchors = params.same ? of_candidates : static_cast<A*>(params.grad_anchors);
  // A thread takes some columns of all anchors: two anchors may add to one candidate.
  const int64_t width = std::max<int64_t>(16, kBlockElements / std::max<int64_t>(1, params.rows));
  const cpu::RowBlocks blocks(params.cols, 1, width);
  const auto clear = [&](A* gradient, int64_t rows, int64_t begin, int64_t end) {
    for (int64_t i = 0; gradient && i < rows; ++i) {
      std::fill(gradient + i * params.cols + begin, gradient + i * params.cols + end, A(0));
    }
  };
  blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
    clear(of_candidates, params.others, begin, end);
    if (!params.same) clear(of_anchors, params.rows, begin, end);
    for (int64_t i = 0; i < params.rows; ++i) {
      const int64_t p = params.positive[i], n = params.negative[i];
      if (p < 0 || n < 0) continue;
      const A g = cpu::load(grad_loss[reduces ? 0 : i]) * scale *
                  hinge_slope(params, to_positive[i] - to_negative[i]);
      if (g == 0) continue;
      const auto add = [&](int64_t j, A factor) {
        add_difference(anchor_row<T>(params, i) + begin, candidate_row<T>(params, j) + begin,
                       factor, end - begin,
                       of_anchors ? of_anchors + i * params.cols + begin : nullptr,
                       of_candidates ? of_candidates + j * params.cols + begin : nullptr);
      };
      add(p, g * distance_factor(params, to_positive[i]));
      add(n, -g * distance_factor(params, to_negative[i]));
    }
  });
}
#endif

// ---- the two operators ------------------------------------------------------------------------

Params params_of(const TripletInputs& inputs, double margin, bool soft, bool squared,
                 bool counts_all, int64_t own, int64_t reduction) {
  Params params{};
  inputs.fill(params, own, reduction);
  params.margin = margin;
  params.soft = soft;
  params.squared = squared;
  params.counts_all = counts_all;
  return params;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& embeddings, const Tensor& labels, const std::optional<Tensor>& ref_emb,
    const std::optional<Tensor>& ref_labels, double margin, bool soft, bool squared,
    bool counts_all, int64_t own, int64_t reduction) {
  const TripletInputs inputs(embeddings, labels, ref_emb, ref_labels);
  Params params = params_of(inputs, margin, soft, squared, counts_all, own, reduction);
  const bool reduces = params.reduction != Reduction::kNone;
  const int64_t rows = params.rows, twice[] = {2, rows};
  const Tensor loss = empty(IntHeaderOnlyArrayRef(&rows, reduces ? 0 : 1), embeddings);
  const Tensor positive = empty({&rows, 1}, ScalarType::Long, embeddings);
  const Tensor negative = empty({&rows, 1}, ScalarType::Long, embeddings);
  const Tensor distances = empty({twice, 2}, wide(embeddings), embeddings);
  const Tensor count = empty(IntHeaderOnlyArrayRef(&rows, size_t{0}), ScalarType::Long, embeddings);
  params.loss = loss.mutable_data_ptr();
  params.positive = static_cast<int64_t*>(positive.mutable_data_ptr());
  params.negative = static_cast<int64_t*>(negative.mutable_data_ptr());
  params.distances = distances.mutable_data_ptr();
  params.count = static_cast<int64_t*>(count.mutable_data_ptr());
#ifdef USE_CUDA
  const int64_t bytes = scratch_bytes(dtype_of(embeddings), params.rows, params.others);
  const Tensor scratch = empty({&bytes, 1}, ScalarType::Byte, embeddings);
  params.partials = scratch.mutable_data_ptr();
#endif
  const OnDeviceOf device(embeddings);
  JITOPS_RUN("batch_hard_triplet_loss", forward, embeddings, params, device);
  return {loss, positive, negative, distances, count};
}

std::vector<Tensor> backward(const Tensor& grad_loss, const Tensor& embeddings,
                             const Tensor& labels, const std::optional<Tensor>& ref_emb,
                             const std::optional<Tensor>& ref_labels, const Tensor& positive,
                             const Tensor& negative, const Tensor& distances, const Tensor& count,
                             double margin, bool soft, bool squared, bool counts_all,
                             int64_t own, int64_t reduction, bool needs_embeddings,
                             bool needs_ref_emb) {
  const TripletInputs inputs(embeddings, labels, ref_emb, ref_labels);
  Params params = params_of(inputs, margin, soft, squared, counts_all, own, reduction);
  const Tensor grad = dense(grad_loss), p = dense(positive), n = dense(negative);
  const Tensor d = dense(distances), c = dense(count);
  check_grad_loss(grad, embeddings, params);
  for (const Tensor* indices : {&p, &n}) {
    check(indices->numel() == params.rows && indices->scalar_type() == ScalarType::Long,
          "positive and negative", " must hold an index for each anchor");
  }
  check(d.numel() == 2 * params.rows && d.scalar_type() == wide(embeddings), "distances",
        " must hold two distances for each anchor");
  check(c.numel() == 1 && c.scalar_type() == ScalarType::Long, "count", " must be one number");
  params.grad_loss = grad.const_data_ptr();
  params.positive = static_cast<int64_t*>(const_cast<void*>(p.const_data_ptr()));
  params.negative = static_cast<int64_t*>(const_cast<void*>(n.const_data_ptr()));
  params.distances = const_cast<void*>(d.const_data_ptr());
  params.count = static_cast<int64_t*>(const_cast<void*>(c.const_data_ptr()));

  TripletGradients gradients(params, inputs, needs_embeddings, needs_ref_emb);
  if (!gradients.empty()) {
    const OnDeviceOf device(embeddings);
    JITOPS_RUN("batch_hard_triplet_loss", backward, embeddings, params, device);
  }
  return gradients.in_dtype_of(embeddings);
}

}  // namespace
}  // namespace jitops::batch_hard_triplet_loss

// ---- registration (schemas and shapes: ops/losses/batch_hard_triplet_loss.py) -------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("batch_hard_triplet_loss_forward",
         TORCH_BOX(&jitops::batch_hard_triplet_loss::forward));
  m.impl("batch_hard_triplet_loss_backward",
         TORCH_BOX(&jitops::batch_hard_triplet_loss::backward));
}
