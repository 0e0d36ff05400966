// The path of dynamic time warping: host side, CPU kernels, registration.
#include "dtw_path.h"

#include <array>
#include <limits>
#include <tuple>

#include "common/run.h"
#include "common/warping_inputs.h"

#ifndef USE_CUDA
#include "common/cpu_warping.h"
#endif

namespace jitops::dtw_path {
namespace {

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------
//
// Strips of rows from the first to the last, with the moves of all of their cells. A thread takes a
// pair.

using cpu::kLanes;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The sums of a step. Place 0 is the row above the strip, place `lane + 1` a row of the strip.
using Diagonal = std::array<double, kLanes + 1>;

template <bool kMasked>
JITOPS_KERNEL void take_step(const double* __restrict cost, const double* __restrict previous,
                             const double* __restrict earlier,
                             const cpu::Steps& __restrict steps, double k, double* __restrict out,
                             uint8_t* __restrict moves) {
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const Least least(earlier[lane], previous[lane], previous[lane + 1]);
    const bool valid = !kMasked || (k >= steps.first[lane] && k <= steps.last[lane]);
    out[lane + 1] = valid ? cost[lane] + least.sum : kInfinity;
    moves[lane] = least.move;
  }
}

template <typename Source>
class Strips {
 public:
  explicit Strips(const Params& params)
      : params_(params),
        source_(params),
        above_(params.cols),
        steps_(std::min(params.cols, 2 * params.bandwidth + kLanes) + kLanes),
        moves_((params.rows + kLanes - 1) / kLanes * steps_ * kLanes) {}

  void run(const Pair& pair) {
    const int64_t places = params_.rows + params_.cols - 1;
    int64_t* path = params_.path + pair.number * places * 2;
    int64_t count = 0;
    if (pair.valid) {
      source_.start(params_, pair);
      for (int64_t row = 0; row < pair.rows; row += kLanes) sweep(pair, row);
      const auto move = [&](int64_t i, int64_t j) {
        const int64_t lane = i % kLanes;
        return moves_of(i / kLanes)[(j + lane - pair.first(i - lane)) * kLanes + lane];
      };
      count = trace(pair, move, [&](int64_t n, int64_t i, int64_t j) {
        path[2 * (places - 1 - n)] = i;
        path[2 * (places - 1 - n) + 1] = j;
      });
      std::memmove(path, path + 2 * (places - count),
                   static_cast<size_t>(2 * count) * sizeof(int64_t));
    }
    std::fill(path + 2 * count, path + 2 * places, int64_t{-1});
    params_.path_lengths[pair.number] = count;
  }

 private:
  uint8_t* moves_of(int64_t strip) { return moves_.data() + strip * steps_ * kLanes; }

  void sweep(const Pair& pair, int64_t row) {
    const cpu::Strip strip(pair, row);
    const int64_t above_first = row > 0 ? pair.first(row - 1) : 0;
    const int64_t above_end = row > 0 ? pair.end(row - 1) : 0;
    const auto above = [&](int64_t j) {
      return j >= above_first && j < above_end ? above_[j] : kInfinity;
    };
    Diagonal diagonals[3];
    for (Diagonal& one : diagonals) one.fill(kInfinity);
    Diagonal *earlier = &diagonals[0], *previous = &diagonals[1], *out = &diagonals[2];
    (*earlier)[0] = row == 0 ? 0.0 : above(strip.first - 1);
    (*previous)[0] = above(strip.first);
    const int64_t last_row = row + kLanes - 1;
    const int64_t last_first = pair.first(last_row), last_end = pair.end(last_row);
    uint8_t* moves = moves_of(row / kLanes);
    alignas(64) double cost[kLanes];
    for (int64_t k = strip.first; k < strip.end; ++k, moves += kLanes) {
      source_.costs(row, k, cost);
      const auto step = strip.full(k) ? take_step<false> : take_step<true>;
      step(cost, previous->data(), earlier->data(), strip.steps, static_cast<double>(k),
           out->data(), moves);
      (*out)[0] = above(k + 1);
      // Column j of the row above was read kLanes steps ago.
      const int64_t j = k - (kLanes - 1);
      if (j >= last_first && j < last_end) above_[j] = (*out)[kLanes];
      Diagonal* free = earlier;
      earlier = previous, previous = out, out = free;
    }
  }

  const Params& params_;
  Source source_;
  std::vector<double> above_;  // the sums of the row above a strip
  int64_t steps_;              // of a strip, at most
  std::vector<uint8_t> moves_;  // (strip, step, lane)
};

template <typename Source>
void each_pair(const Params& params) {
  torch::stable::parallel_for(0, params.pairs, 1, [&](int64_t begin, int64_t end) {
    Strips<Source> strips(params);
    for (int64_t number = begin; number < end; ++number) strips.run(Pair(params, number));
  });
}

template <typename T>
void forward_cpu(const Params& params) {
  if (params.cost) return each_pair<cpu::GivenCosts<T>>(params);
  each_pair<cpu::SequenceCosts<T>>(params);
}
#endif

// ---- the operators ------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> run(const WarpingInputs& inputs, int64_t bandwidth) {
  Params params{};
  inputs.fill(params, bandwidth);
  const Tensor& first = inputs.first();
  const std::array<int64_t, 3> sizes{params.pairs, params.rows + params.cols - 1, 2};
  const Tensor path = empty(sizes, ScalarType::Long, first);
  const Tensor path_lengths = empty({&params.pairs, 1}, ScalarType::Long, first);
  if (params.pairs == 0) return {path, path_lengths};
  params.path = static_cast<int64_t*>(path.mutable_data_ptr());
  params.path_lengths = static_cast<int64_t*>(path_lengths.mutable_data_ptr());
#ifdef USE_CUDA
  const int64_t at_once = pairs_at_once(params);
  const int64_t cells = at_once * params.rows * params.cols, sums = at_once * params.cols;
  const Tensor moves = empty({&cells, 1}, ScalarType::Byte, first);
  const Tensor above = empty({&sums, 1}, ScalarType::Double, first);
  params.moves = moves.mutable_data_ptr();
  params.above = static_cast<double*>(above.mutable_data_ptr());
#endif
  const OnDeviceOf device(first);
  JITOPS_RUN("dtw_path", forward, first, params, device);
  return {path, path_lengths};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& y,
                                   const std::optional<Tensor>& lengths, int64_t bandwidth) {
  return run(WarpingInputs(x, y, lengths), bandwidth);
}

std::tuple<Tensor, Tensor> forward_from_cost(const Tensor& cost,
                                             const std::optional<Tensor>& lengths,
                                             int64_t bandwidth) {
  return run(WarpingInputs(cost, lengths), bandwidth);
}

}  // namespace
}  // namespace jitops::dtw_path

// ---- registration (schemas and shapes: ops/losses/dtw_path.py) ----------------------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("dtw_path_forward", TORCH_BOX(&jitops::dtw_path::forward));
  m.impl("dtw_path_from_cost_forward", TORCH_BOX(&jitops::dtw_path::forward_from_cost));
}
