// The batch-all and the batch semi-hard triplet loss: host side, CPU kernels, registration.
#include "batch_all_triplet_loss.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "common/cpu_differences.h"
#include "common/cpu_math.h"
#include "common/cpu_pairs.h"
#include "common/run.h"
#include "common/triplet_inputs.h"

namespace jitops::batch_all_triplet_loss {
namespace {

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------

constexpr int64_t kScratchElements = 131072;  // distances of a chunk of anchors
constexpr int64_t kBlockRows = 64;            // anchors that share a packed tile of candidates
constexpr int64_t kSumElements = 1024;  // summed in acc_t<T>; these sums are added in float64

template <typename A>
JITOPS_KERNEL void distances_of(const A* squares, bool squared, int64_t count, A* distances) {
#pragma omp simd
  for (int64_t lane = 0; lane < count; ++lane) {
    const A root = std::sqrt(squares[lane]);
    distances[lane] = squared ? squares[lane] : root;
  }
}

// The distances of negatives, and infinity in the place of other candidates.
template <typename A, typename L>
JITOPS_KERNEL void distances_of_negatives(const A* distances, const L* labels, L label,
                                          int64_t count, A* negatives) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    negatives[j] = labels[j] == label ? std::numeric_limits<A>::infinity() : distances[j];
  }
}

// Triplets of one positive with some negatives, in sums.
template <typename A>
struct Sums {
  A loss = 0, counted = 0, slope = 0;
};

// The hinge of x = positive - negative for negatives beyond `least`. NaN counts. `weights` gets
// the slopes, if there is one. An infinite distance is in the place of another candidate.
template <bool kWeights, typename A>
JITOPS_KERNEL Sums<A> hinges(A positive, A margin, A least, const A* negatives, int64_t count,
                             A* weights) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  A loss = 0, counted = 0;
#pragma omp simd reduction(+ : loss, counted)
  for (int64_t n = 0; n < count; ++n) {
    const A h = (positive - negatives[n]) + margin;
    const bool off = bool(h <= A(0)) | bool(negatives[n] <= least) | bool(negatives[n] == kInfinity);
    loss += off ? A(0) : h;
    counted += off ? A(0) : A(1);
    if constexpr (kWeights) weights[n] += off ? A(0) : A(1);
  }
  return {loss, counted, counted};
}

template <bool kWeights, typename A>
JITOPS_KERNEL Sums<A> soft_margins(A positive, const A* negatives, int64_t count, A* weights) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  A loss = 0, slopes = 0;
#pragma omp simd reduction(+ : loss, slopes)
  for (int64_t n = 0; n < count; ++n) {
    const A x = negatives[n] == kInfinity ? -kInfinity : positive - negatives[n];
    const auto [value, slope] = cpu::softplus_and_slope(x);
    loss += value;
    slopes += slope;
    if constexpr (kWeights) weights[n] += slope;
  }
  return {loss, 0, slopes};
}

// The nearest negative beyond `positive`, infinity if there is none.
template <typename A>
JITOPS_KERNEL A nearest_beyond(A positive, const A* negatives, int64_t count) {
  A nearest = std::numeric_limits<A>::infinity();
#pragma omp simd reduction(min : nearest)
  for (int64_t n = 0; n < count; ++n) {
    const A d = negatives[n] > positive ? negatives[n] : std::numeric_limits<A>::infinity();
    nearest = d < nearest ? d : nearest;
  }
  return nearest;
}

template <typename V>
JITOPS_KERNEL bool holds(V value, const V* values, int64_t count) {
  int found = 0;  // g++ vectorises no reduction of bool
#pragma omp simd reduction(+ : found)
  for (int64_t n = 0; n < count; ++n) found += values[n] == value ? 1 : 0;
  return found != 0;
}

// Calls f(index) for each index with this value, in order, until f returns false.
template <typename V, typename F>
void for_each_of(V value, const std::vector<V>& values, const F& f) {
  constexpr int64_t kBlock = 64;  // compared in vectors, because most blocks hold none
  const auto size = static_cast<int64_t>(values.size());
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t end = std::min(size, first + kBlock);
    if (!holds(value, values.data() + first, end - first)) continue;
    for (int64_t n = first; n < end; ++n) {
      if (values[n] == value && !f(n)) return;
    }
  }
}

template <typename A>
int64_t first_of(A value, const std::vector<A>& values) {
  int64_t first = -1;
  for_each_of(value, values, [&](int64_t n) {
    first = n;
    return false;
  });
  return first;
}

// The largest distance below infinity, or NaN if there is any; -1 if all are infinite.
template <typename A>
JITOPS_KERNEL A farthest_of(const A* negatives, int64_t count) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  A farthest = -1, nans = 0;
#pragma omp simd reduction(max : farthest) reduction(+ : nans)
  for (int64_t n = 0; n < count; ++n) {
    const A d = negatives[n] < kInfinity ? negatives[n] : A(-1);
    farthest = d > farthest ? d : farthest;
    nans += negatives[n] == negatives[n] ? A(0) : A(1);
  }
  return nans > 0 ? std::numeric_limits<A>::quiet_NaN() : farthest;
}

// weights *= -g / distance, the factor of a - b in the gradient of a negative's distance.
template <typename A>
JITOPS_KERNEL void weigh_negatives(const A* distances, A g, bool squared, int64_t count,
                                   A* weights) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const A d = distances[j], by = -g * weights[j];
    const A divided = d == A(0) ? A(0) : by / d;
    weights[j] = squared ? 2 * by : divided;
  }
}

template <typename T>
using Labels = std::vector<cpu::LabelOf<acc_t<T>>>;

// The triplets of one anchor at a time.
template <typename T>
class Anchor {
 public:
  using A = acc_t<T>;
  double loss = 0;
  int64_t counted = 0, all = 0;

  Anchor(const Params& params, const Labels<T>& anchors, const Labels<T>& candidates)
      : params_(params),
        anchors_(anchors),
        candidates_(candidates),
        negatives_(params.others),
        weights_(params.others) {}

  // Takes anchor i and its distances. With `g`, the factor of its loss in the gradient, `distances`
  // becomes the weights of the differences.
  void take(int64_t i, A* distances, const A* g) {
    const int64_t others = params_.others;
    find_positives(i);
    distances_of_negatives(distances, candidates_.data(), anchors_[i], others, negatives_.data());
    if (params_.rule == Rule::kNearest) fallback_ = fallback();
    loss = 0, counted = 0;
    std::fill(weights_.begin(), weights_.end(), A(0));
    slopes_.assign(positive_at_.size(), A(0));
    for (size_t p = 0; all > 0 && p < slopes_.size(); ++p) {
      slopes_[p] = triplets_of(distances[positive_at_[p]], g != nullptr);
    }
    if (params_.soft) counted = all;
    if (!g) return;
    weigh_negatives(distances, *g, params_.squared, others, weights_.data());
    for (size_t p = 0; p < slopes_.size(); ++p) {
      const int64_t j = positive_at_[p];
      weights_[j] = *g * slopes_[p] * distance_factor(params_, distances[j]);
    }
    std::copy(weights_.begin(), weights_.end(), distances);
  }

 private:
  void find_positives(int64_t i) {
    positive_at_.clear();
    int64_t same = 0;
    for_each_of(anchors_[i], candidates_, [&](int64_t j) {
      ++same;
      if (!is_itself(params_, i, j)) positive_at_.push_back(j);
      return true;
    });
    all = static_cast<int64_t>(positive_at_.size()) * (params_.others - same);
  }

  // Returns the derivative of the losses with respect to the distance of the positive.
  A triplets_of(A positive, bool weigh) {
    if (params_.rule == Rule::kNearest) return nearest_of(positive);
    const A margin = static_cast<A>(params_.margin);
    const A least = params_.rule == Rule::kSemiHard ? positive : A(-1);
    double slope = 0;
    for (int64_t first = 0; first < params_.others; first += kSumElements) {
      const int64_t count = std::min(kSumElements, params_.others - first);
      const A* some = negatives_.data() + first;
      A* weights = weights_.data() + first;
      const Sums<A> sums =
          params_.soft ? (weigh ? soft_margins<true>(positive, some, count, weights)
                                : soft_margins<false>(positive, some, count, weights))
                       : (weigh ? hinges<true>(positive, margin, least, some, count, weights)
                                : hinges<false>(positive, margin, least, some, count, weights));
      loss += static_cast<double>(sums.loss);
      counted += static_cast<int64_t>(sums.counted);
      slope += static_cast<double>(sums.slope);
    }
    return static_cast<A>(slope);
  }

  A nearest_of(A positive) {
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    int64_t at = fallback_;
    if (at < 0 || negatives_[at] == negatives_[at]) {
      const A nearest = nearest_beyond(positive, negatives_.data(), params_.others);
      if (nearest < kInfinity) at = first_of(nearest, negatives_);
    }
    ++counted;
    if (at < 0) return A(0);
    const A h = (positive - negatives_[at]) + static_cast<A>(params_.margin);
    if (h <= A(0)) return A(0);
    loss += static_cast<double>(h);
    weights_[at] += A(1);
    return A(1);
  }

  // The first negative with a NaN distance, or else the farthest one; -1 if all are infinitely far.
  int64_t fallback() const {
    const A farthest = farthest_of(negatives_.data(), params_.others);
    if (farthest == farthest) return farthest < A(0) ? -1 : first_of(farthest, negatives_);
    return std::find_if(negatives_.begin(), negatives_.end(), [](A d) { return d != d; }) -
           negatives_.begin();
  }

  const Params& params_;
  const Labels<T>&anchors_, &candidates_;
  std::vector<int64_t> positive_at_;
  int64_t fallback_ = -1;  // of kNearest, where no negative is beyond the positive
  std::vector<A> slopes_, negatives_, weights_;
};

// Chunks of anchors, whose distances fit the scratch memory.
class Chunks {
 public:
  explicit Chunks(const Params& params)
      : rows_(params.rows),
        size_(std::max<int64_t>(1, kScratchElements / std::max<int64_t>(1, params.others))) {}

  int64_t size() const { return std::min(rows_, size_); }

  template <typename F>
  void for_each(const F& f) const {
    for (int64_t begin = 0; begin < rows_; begin += size_) f(begin, std::min(rows_, begin + size_));
  }

 private:
  int64_t rows_, size_;
};

// Computes the distances of anchors [begin, end), and calls take(anchor, i, distances) for each.
template <typename T, typename F>
void for_each_anchor(const Params& params, const Labels<T>& anchors, const Labels<T>& candidates,
                     int64_t begin, int64_t end, acc_t<T>* distances, const F& take) {
  constexpr int64_t kLanes = cpu::kPairLanes<acc_t<T>>;
  const cpu::RowBlocks blocks(end - begin, 1, kBlockRows);
  blocks.for_each([&](int64_t, int64_t first, int64_t last) {
    const T* rows = anchor_row<T>(params, begin + first);
    cpu::PairTiles<T> tiles(rows, params.anchor_stride, last - first, params.cols);
    for (int64_t at = 0; at < params.others; at += kLanes) {
      const int64_t count = std::min(kLanes, params.others - at);
      tiles.compute(candidate_row<T>(params, at), params.candidate_stride, count);
      for (int64_t r = first; r < last; ++r) {
        distances_of(tiles.row(r - first), params.squared, count,
                     distances + r * params.others + at);
      }
    }
    Anchor<T> anchor(params, anchors, candidates);
    for (int64_t r = first; r < last; ++r) take(anchor, begin + r, distances + r * params.others);
  });
}

// Adds up the losses of all anchors, and writes the results.
template <typename T>
void sum_up(const Params& params, const std::vector<double>& losses,
            const std::vector<int64_t>& counted, const std::vector<int64_t>& all) {
  using A = acc_t<T>;
  Totals totals;
  for (int64_t i = 0; i < params.rows; ++i) {
    totals.loss += losses[i];
    totals.counted += counted[i];
    totals.all += all[i];
    if (params.reduction == Reduction::kNone) {
      cpu::store(static_cast<T*>(params.loss)[i], static_cast<A>(losses[i]));
    }
  }
  *static_cast<A*>(params.fraction) = static_cast<A>(totals.fraction());
  *static_cast<A*>(params.scale) = static_cast<A>(1 / totals.divisor(params));
  if (params.reduction == Reduction::kNone) return;
  cpu::store(*static_cast<T*>(params.loss), static_cast<A>(totals.loss / totals.divisor(params)));
}

template <typename T>
void triplets_cpu(const Params& params) {
  using A = acc_t<T>;
  Labels<T> anchors, candidates;
  cpu::number_labels(params, &anchors, &candidates);
  A* of_candidates = static_cast<A*>(params.grad_candidates);
  A* of_anchors = params.same ? of_candidates : static_cast<A*>(params.grad_anchors);
  if (of_candidates) std::fill_n(of_candidates, params.others * params.cols, A(0));
  if (of_anchors) std::fill_n(of_anchors, params.rows * params.cols, A(0));
  const bool weighs = of_candidates || of_anchors;
  const T* grad_loss = static_cast<const T*>(params.grad_loss);
  const bool reduces = params.reduction != Reduction::kNone;
  std::vector<double> losses(params.rows);
  std::vector<int64_t> counted(params.rows), all(params.rows);
  const Chunks chunks(params);
  std::vector<A> distances(chunks.size() * params.others);
  chunks.for_each([&](int64_t begin, int64_t end) {
    for_each_anchor<T>(params, anchors, candidates, begin, end, distances.data(),
                       [&](Anchor<T>& anchor, int64_t i, A* row) {
                         const A g = grad_loss ? cpu::load(grad_loss[reduces ? 0 : i]) *
                                                     *static_cast<const A*>(params.scale)
                                               : A(1);
                         anchor.take(i, row, weighs ? &g : nullptr);
                         losses[i] = anchor.loss;
                         counted[i] = anchor.counted;
                         all[i] = anchor.all;
                       });
    if (!weighs) return;
    cpu::add_differences<T>(
        distances.data(), {anchor_row<T>(params, begin), params.anchor_stride, end - begin},
        {candidate_row<T>(params, 0), params.candidate_stride, params.others}, params.cols,
        of_anchors ? of_anchors + begin * params.cols : nullptr, of_candidates);
  });
  if (params.fraction) sum_up<T>(params, losses, counted, all);
}
#endif

// ---- the two operators ------------------------------------------------------------------------

Params params_of(const TripletInputs& inputs, double margin, bool soft, bool squared, int64_t rule,
                 bool counts_all, int64_t reduction) {
  check(rule >= 0 && rule <= 2, "rule", " must be 0, 1 or 2");
  check(rule == 0 || !soft, "soft", " must be false with that rule");
  Params params{};
  inputs.fill(params, -1, reduction);
  params.margin = margin;
  params.soft = soft;
  params.squared = squared;
  params.rule = static_cast<Rule>(rule);
  params.counts_all = counts_all;
  return params;
}

#ifdef USE_CUDA
// Scratch memory of the kernels. The tensors keep it alive while the launchers run.
struct Scratch {
  Tensor memory;

  Scratch(Params& params, const Tensor& embeddings) : memory(allocate(params, embeddings)) {
    auto* at = static_cast<char*>(memory.mutable_data_ptr());
    params.sums = reinterpret_cast<double*>(at);
    params.counts = reinterpret_cast<int64_t*>(params.sums + params.rows);
    params.distances = params.counts + 2 * params.rows;
    params.weights = static_cast<char*>(params.distances) + matrix_bytes(params);
  }

 private:
  static int64_t matrix_bytes(const Params& params) {
    return params.chunk * params.others * static_cast<int64_t>(sizeof(double));
  }
  static Tensor allocate(Params& params, const Tensor& embeddings) {
    params.chunk = chunk_of(params.rows, params.others);
    const int64_t bytes = 24 * params.rows + 2 * matrix_bytes(params);
    return empty({&bytes, 1}, ScalarType::Byte, embeddings);
  }
};
#endif

void run(Params& params, const Tensor& embeddings) {
#ifdef USE_CUDA
  const Scratch scratch(params, embeddings);
#endif
  const OnDeviceOf device(embeddings);
  JITOPS_RUN("batch_all_triplet_loss", triplets, embeddings, params, device);
}

// Returns the loss, the fraction, the scale, and the gradients of the sum of losses; those that are
// not needed are empty. With kNone none is formed, because each anchor has its own factor.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& embeddings, const Tensor& labels, const std::optional<Tensor>& ref_emb,
    const std::optional<Tensor>& ref_labels, double margin, bool soft, bool squared, int64_t rule,
    bool counts_all, int64_t reduction, bool needs_embeddings, bool needs_ref_emb) {
  const TripletInputs inputs(embeddings, labels, ref_emb, ref_labels);
  Params params = params_of(inputs, margin, soft, squared, rule, counts_all, reduction);
  const bool reduces = params.reduction != Reduction::kNone;
  const auto number = [&](ScalarType dtype) {
    return empty(IntHeaderOnlyArrayRef(&params.rows, size_t{0}), dtype, embeddings);
  };
  const Tensor loss = empty(IntHeaderOnlyArrayRef(&params.rows, reduces ? 0 : 1), embeddings);
  const Tensor fraction = number(wide(embeddings)), scale = number(wide(embeddings));
  params.loss = loss.mutable_data_ptr();
  params.fraction = fraction.mutable_data_ptr();
  params.scale = scale.mutable_data_ptr();
  TripletGradients gradients(params, inputs, needs_embeddings && reduces, needs_ref_emb && reduces);
  run(params, embeddings);
  return {loss, fraction, scale, gradients.of_embeddings(), gradients.of_ref_emb()};
}

std::vector<Tensor> backward(const Tensor& grad_loss, const Tensor& embeddings,
                             const Tensor& labels, const std::optional<Tensor>& ref_emb,
                             const std::optional<Tensor>& ref_labels, const Tensor& scale,
                             double margin, bool soft, bool squared, int64_t rule, bool counts_all,
                             int64_t reduction, bool needs_embeddings, bool needs_ref_emb) {
  const TripletInputs inputs(embeddings, labels, ref_emb, ref_labels);
  Params params = params_of(inputs, margin, soft, squared, rule, counts_all, reduction);
  const Tensor grad = dense(grad_loss);
  check_grad_loss(grad, embeddings, params);
  check(scale.numel() == 1 && scale.scalar_type() == wide(embeddings), "scale",
        " must be one number");
  params.grad_loss = grad.const_data_ptr();
  params.scale = const_cast<void*>(scale.const_data_ptr());
  TripletGradients gradients(params, inputs, needs_embeddings, needs_ref_emb);
  if (!gradients.empty()) run(params, embeddings);
  return gradients.in_dtype_of(embeddings);
}

}  // namespace
}  // namespace jitops::batch_all_triplet_loss

// ---- registration (schemas and shapes: ops/losses/batch_all_triplet_loss.py) --------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("batch_all_triplet_loss_forward", TORCH_BOX(&jitops::batch_all_triplet_loss::forward));
  m.impl("batch_all_triplet_loss_backward", TORCH_BOX(&jitops::batch_all_triplet_loss::backward));
}
