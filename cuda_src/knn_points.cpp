// Nearest neighbours of points: host side, CPU kernels, registration.
#include "knn_points.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "common/run.h"

#ifndef USE_CUDA
#include "common/cpu_box_tree.h"
#include "common/cpu_neighbour_products.h"
#endif

namespace jitops::knn_points {
namespace {

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------

constexpr int64_t kSearchPoints = 512;  // points that a thread searches at a time
constexpr int64_t kShares = 16;         // of a sweep
constexpr int64_t kExactCols = 16;      // beyond, distances are summed again in float64
// A thread takes so many elements of clouds, or differences of pairs, at a time.
constexpr int64_t kCloudElements = 16384, kPairElements = int64_t{1} << 18;

// Whether a tree takes less time than a sweep over all pairs. In many dimensions a search visits
// most of its leaves. A sweep for several neighbours searches many blocks once more.
bool uses_tree(const Params& params) {
  const int64_t least = std::min(params.points[0].count, params.points[1].count);
  const int64_t most = std::max(params.points[0].count, params.points[1].count);
  return params.cols >= 1 && params.cols <= 8 && most < std::numeric_limits<int32_t>::max() &&
         least >= int64_t{params.k == 1 ? 1024 : 256} << (params.cols / 2);
}

bool uses_products(const Params& params) { return params.norm == 2 && params.cols >= 96; }

template <typename A>
class Search {
 public:
  // `load(side, b, packs)` makes a cloud.
  template <typename F>
  Search(const Params& params, const F& load) : params_(params), clouds_(2 * params.batch) {
    each_cloud([&](int64_t b, int side) {
      clouds_[2 * b + side].emplace(load(side, b, !uses_tree(params_) && !uses_products(params_)));
    });
  }

  void run() {
    if (uses_tree(params_)) {
      by_trees();
    } else if (uses_products(params_)) {
      by_products(0);
      if (params_.both) by_products(1);
    } else if (params_.both && params_.k == 1) {
      by_sweep(0, true);
    } else {
      by_sweep(0, false);
      if (params_.both) by_sweep(1, false);
    }
  }

 private:
  const cpu::Cloud<A>& cloud(int64_t b, int side) const { return *clouds_[2 * b + side]; }

  template <typename F>
  void each_cloud(const F& f) const {
    const int64_t points = std::max(params_.points[0].count, params_.points[1].count);
    const cpu::RowBlocks blocks(2 * params_.batch, points * params_.cols, kCloudElements);
    blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) f(n / 2, static_cast<int>(n % 2));
    });
  }

  // The list of neighbours of a point, in the results.
  cpu::Nearest<A> nearest(int side, int64_t b, int64_t i, int64_t k) const {
    const int64_t place = (b * params_.points[side].count + i) * params_.k;
    return {static_cast<A*>(params_.neighbours[side].dists) + place,
            params_.neighbours[side].idx + place, k};
  }

  void by_trees() {
    std::vector<std::optional<cpu::BoxTree<A>>> trees(2 * params_.batch);
    each_cloud([&](int64_t b, int side) {
      if (side == 0 && !params_.both) return;
      trees[2 * b + side].emplace(cloud(b, side).rows.data(), cloud(b, side).count, params_.cols);
    });
    for (int64_t b = 0; b < params_.batch; ++b) {
      for (int side = 0; side < (params_.both ? 2 : 1); ++side) {
        search_tree(side, b, *trees[2 * b + 1 - side], params_.both ? &*trees[2 * b + side] : nullptr);
      }
    }
  }

  // Points near each other visit the same nodes, so their own tree gives the order.
  void search_tree(int side, int64_t b, const cpu::BoxTree<A>& tree, const cpu::BoxTree<A>* own) {
    const int64_t count = params_.points[side].count, *order = nullptr;
    if (own && static_cast<int64_t>(own->order().size()) == count) order = own->order().data();
    cpu::RowBlocks(count, 1, kSearchPoints).for_each([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t i = order ? order[n] : n, k = neighbours_of(params_, side, b, i);
        nearest(side, b, i, params_.k).clear();
        if (k > 0 && cpu::all_finite(cloud(b, side).row(i), params_.cols)) {
          tree.search(params_.norm, cloud(b, side).row(i), nearest(side, b, i, k));
        }
        finish(side, b, i);
      }
    });
  }

  void by_products(int side) {
    for (int64_t b = 0; b < params_.batch; ++b) {
      const cpu::Products<A> products(cloud(b, side), cloud(b, 1 - side));
      const cpu::RowBlocks blocks(params_.points[side].count, 1, 4 * cpu::Products<A>::kRows);
      blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
        const int64_t k = neighbours_of(params_, side, b, begin);
        for (int64_t i = begin; i < end; ++i) nearest(side, b, i, params_.k).clear();
        if (k > 0) {
          products.search(begin, std::min(end, cloud(b, side).count),
                          [&](int64_t i) { return nearest(side, b, i, k); });
        }
        for (int64_t i = begin; i < end; ++i) finish(side, b, i);
      });
    }
  }

  void by_sweep(int side, bool both) {
    const int64_t batch = params_.batch;
    int64_t most = 0;
    for (int64_t b = 0; b < batch; ++b) most = std::max(most, cloud(b, side).blocks());
    const int64_t shares =
        std::max<int64_t>(1, std::min(most, kShares / std::max<int64_t>(1, batch)));
    std::vector<std::optional<cpu::BlockOf<A>>> of_others(batch * shares);
    const auto search = [&](int64_t task) {
      const int64_t b = task / shares, share = task % shares;
      const cpu::Cloud<A>&x = cloud(b, side), &y = cloud(b, 1 - side);
      const int64_t begin = x.blocks() * share / shares, end = x.blocks() * (share + 1) / shares;
      const int64_t k = std::min(params_.k, y.count);
      const int64_t last = std::min(x.count, end * cpu::kSweepBlock);
      for (int64_t i = begin * cpu::kSweepBlock; i < last; ++i) {
        nearest(side, b, i, params_.k).clear();
      }
      if (both) of_others[task].emplace(y.count);
      if (k == 0) return;
      const auto lists = [&](int64_t i) { return nearest(side, b, i, k); };
      cpu::sweep(params_.norm, x, begin, end, y, lists, both ? &*of_others[task] : nullptr);
    };
    const int64_t pairs = params_.points[0].count * params_.points[1].count;
    const cpu::RowBlocks blocks(batch * shares, pairs * params_.cols / shares, kPairElements);
    blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) search(task);
    });
    finish_all(side);
    if (!both) return;
    const auto merge = [&](int64_t b) {
      const cpu::Cloud<A>&x = cloud(b, side), &y = cloud(b, 1 - side);
      cpu::BlockOf<A>& best = *of_others[b * shares];
      for (int64_t i = 0; i < y.count; ++i) {
        for (int64_t share = 1; share < shares; ++share) {
          const cpu::BlockOf<A>& other = *of_others[b * shares + share];
          best.take(i, other.least[i], other.block[i]);
        }
        const cpu::Nearest<A> list = nearest(1 - side, b, i, 1);
        list.clear();
        if (best.block[i] < 0) continue;
        cpu::take_from_block(params_.norm, y.row(i), x, best.block[i], list);
      }
    };
    const cpu::RowBlocks clouds(batch, pairs * params_.cols / shares, kPairElements);
    clouds.for_each([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) merge(b);
    });
    finish_all(1 - side);
  }

  void finish_all(int side) const {
    const int64_t count = params_.points[side].count;
    const cpu::RowBlocks blocks(params_.batch * count, 1, kSearchPoints);
    blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) finish(side, n / count, n % count);
    });
  }

  // Completes the list of a point. Those that are infinitely far come last, by index.
  void finish(int side, int64_t b, int64_t i) const {
    const cpu::Nearest<A> list = nearest(side, b, i, params_.k);
    const int64_t k = neighbours_of(params_, side, b, i);
    int64_t next = 0;
    for (int64_t n = 0; n < k; ++n) {
      const bool missing = list.at[n] < 0;
      if (missing) {
        while (std::find(list.at, list.at + n, next) != list.at + n) ++next;
        list.at[n] = next;
      }
      if (missing || params_.cols > kExactCols) {
        list.distances[n] = cpu::distance(params_.norm, cloud(b, side).row(i),
                                          cloud(b, 1 - side).row(list.at[n]), params_.cols);
      }
      for (int64_t m = n; m > 0 && list.distances[m] < list.distances[m - 1]; --m) {
        std::swap(list.distances[m], list.distances[m - 1]);
        std::swap(list.at[m], list.at[m - 1]);
      }
    }
    std::fill(list.distances + k, list.distances + params_.k, A(0));
    std::fill(list.at + k, list.at + params_.k, int64_t{0});
  }

  const Params& params_;
  std::vector<std::optional<cpu::Cloud<A>>> clouds_;
};

template <typename T>
void forward_cpu(const Params& params) {
  using A = acc_t<T>;
  const auto load = [&](int side, int64_t b, bool packs) {
    const Points& points = params.points[side];
    return cpu::Cloud<A>(points.count ? point<T>(points, b, 0) : nullptr, points.stride,
                         points.length(b), params.cols, packs);
  };
  Search<A>(params, load).run();
}

// out += factor * (the derivative of the distance between a and c with respect to a).
template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void add_slope(const Params& params, A factor, const T* a, const T* c, A* out) {
  const Params local = params;
#pragma omp simd
  for (int64_t k = 0; k < local.cols; ++k) {
    out[k] += factor * slope(local, cpu::load(a[k]) - cpu::load(c[k]));
  }
}

// Gradients of the points of one side: each thread takes some points of all clouds.
template <typename T>
void gradient_cpu(const Params& params, int side) {
  using A = acc_t<T>;
  A* const gradients = static_cast<A*>(params.grads[side]);
  const Points &own = params.points[side], &others = params.points[1 - side];
  const int64_t k = params.k, cols = params.cols;
  // All threads read all indices, so there are no more shares than pay.
  const int64_t shares = std::clamp<int64_t>(own.count * cols / 65536, 1, 16);
  const auto sum = [&](int64_t task) {
    const int64_t b = task / shares, share = task % shares;
    const int64_t begin = own.count * share / shares, end = own.count * (share + 1) / shares;
    A* const out = gradients + b * own.count * cols;
    std::fill(out + begin * cols, out + end * cols, A(0));
    const Neighbours& mine = params.neighbours[side];
    for (int64_t i = begin; mine.grad_dists && i < end; ++i) {
      const int64_t real = neighbours_of(params, side, b, i), first = (b * own.count + i) * k;
      for (int64_t n = first; n < first + real; ++n) {
        add_slope(params, static_cast<const A*>(mine.grad_dists)[n], point<T>(own, b, i),
                  point<T>(others, b, mine.idx[n]), out + i * cols);
      }
    }
    const Neighbours& theirs = params.neighbours[1 - side];
    for (int64_t j = 0; theirs.grad_dists && j < others.count; ++j) {
      const int64_t real = neighbours_of(params, 1 - side, b, j), first = (b * others.count + j) * k;
      for (int64_t n = first; n < first + real; ++n) {
        const int64_t i = theirs.idx[n];
        if (i < begin || i >= end) continue;
        add_slope(params, static_cast<const A*>(theirs.grad_dists)[n], point<T>(own, b, i),
                  point<T>(others, b, j), out + i * cols);
      }
    }
  };
  const int64_t elements = (own.count + others.count) * k * cols;
  const cpu::RowBlocks blocks(params.batch * shares, elements / shares, kCloudElements);
  blocks.for_each([&](int64_t, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) sum(task);
  });
}

template <typename T>
void backward_cpu(const Params& params) {
  for (int side = 0; side < 2; ++side) {
    if (params.grads[side]) gradient_cpu<T>(params, side);
  }
}
#endif

// ---- the two operators ------------------------------------------------------------------------

// The inputs on the host, checked. It keeps copies alive.
struct Inputs {
  std::array<Rows, 2> rows;
  std::array<Tensor, 2> lengths;
  Params params{};

  Inputs(const Tensor& p1, const Tensor& p2, const std::optional<Tensor>& lengths1,
         const std::optional<Tensor>& lengths2, int64_t norm)
      : rows{Rows(p1), Rows(p2)} {
    check(p1.dim() == 3 && p2.dim() == 3, "p1 and p2", " must have three dimensions");
    check_same_kind("p2", p2, p1);
    check(p1.size(0) == p2.size(0) && p1.size(2) == p2.size(2), "p2",
          " must have the batch and the columns of p1");
    check(norm == 1 || norm == 2, "norm", " must be 1 or 2");
    params.batch = p1.size(0);
    params.cols = p1.size(2);
    params.norm = norm;
    const Tensor* given[] = {&p1, &p2};
    const std::optional<Tensor>* of[] = {&lengths1, &lengths2};
    for (int side = 0; side < 2; ++side) {
      Points& points = params.points[side];
      points = {rows[side].tensor.const_data_ptr(), nullptr, rows[side].stride,
                given[side]->size(1)};
      if (!of[side]->has_value()) continue;
      lengths[side] = dense(**of[side]);
      check(lengths[side].scalar_type() == ScalarType::Long &&
                lengths[side].numel() == params.batch &&
                lengths[side].is_cuda() == p1.is_cuda() &&
                lengths[side].get_device_index() == p1.get_device_index(),
            "lengths", " must hold an int64 length for each cloud, on the same device");
      points.lengths = static_cast<const int64_t*>(lengths[side].const_data_ptr());
#ifndef USE_CUDA
      for (int64_t b = 0; b < params.batch; ++b) {
        check(points.lengths[b] >= 0 && points.lengths[b] <= points.count, "lengths",
              " must be between 0 and the number of points");
      }
#endif
    }
  }
};

ScalarType wide(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& p1, const Tensor& p2,
                                                   const std::optional<Tensor>& lengths1,
                                                   const std::optional<Tensor>& lengths2,
                                                   int64_t k, int64_t norm, bool both) {
  Inputs inputs(p1, p2, lengths1, lengths2, norm);
  Params& params = inputs.params;
  check(k >= 1 && k <= 32, "k", " must be from 1 to 32");
  params.k = k;
  params.both = both;
  std::array<Tensor, 2> dists, idx;
  for (int side = 0; side < 2; ++side) {
    const int64_t sizes[] = {params.batch, params.points[side].count, k}, none = 0;
    const auto shape = side == 0 || both ? IntHeaderOnlyArrayRef(sizes, 3)
                                         : IntHeaderOnlyArrayRef(&none, size_t{1});
    dists[side] = empty(shape, wide(p1), p1);
    idx[side] = empty(shape, ScalarType::Long, p1);
    params.neighbours[side].dists = dists[side].mutable_data_ptr();
    params.neighbours[side].idx = static_cast<int64_t*>(idx[side].mutable_data_ptr());
  }
#ifdef USE_CUDA
  const int64_t bytes = scratch_bytes(params);
  const Tensor scratch = empty({&bytes, 1}, ScalarType::Byte, p1);
  params.scratch = scratch.mutable_data_ptr();
#endif
  const OnDeviceOf device(p1);
  JITOPS_RUN("knn_points", forward, p1, params, device);
  return {dists[0], idx[0], dists[1], idx[1]};
}

#ifdef USE_CUDA
struct Sorted {
  Tensor values, indices;
};

// Equal ones stay in their order, so that sums have a fixed order.
Sorted sort_places(Params& params, int side, const Tensor& like, void* stream) {
  const int64_t count = params.batch * params.points[side].count * params.k;
  const Tensor places = empty({&count, 1}, ScalarType::Long, like);
  int64_t* data = static_cast<int64_t*>(places.mutable_data_ptr());
  if (count > 0) check_launch("knn_points", launch_places(params, side, data, stream));
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(places), from(std::optional<bool>(true)),
                                    from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  Sorted sorted{to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  params.neighbours[side].sorted = static_cast<const int64_t*>(sorted.values.const_data_ptr());
  params.neighbours[side].by_point = static_cast<const int64_t*>(sorted.indices.const_data_ptr());
  return sorted;
}
#endif

std::vector<Tensor> backward(const std::optional<Tensor>& grad_dists,
                             const std::optional<Tensor>& grad_dists_back, const Tensor& p1,
                             const Tensor& p2, const std::optional<Tensor>& lengths1,
                             const std::optional<Tensor>& lengths2, const Tensor& idx,
                             const Tensor& idx_back, int64_t norm, bool needs_p1, bool needs_p2) {
  Inputs inputs(p1, p2, lengths1, lengths2, norm);
  Params& params = inputs.params;
  check(idx.dim() == 3, "idx", " must have three dimensions");
  params.k = idx.size(2);
  const std::optional<Tensor>* given[] = {&grad_dists, &grad_dists_back};
  const Tensor* indices[] = {&idx, &idx_back};
  std::array<Tensor, 2> grads, places, results;
  const bool needed[] = {needs_p1, needs_p2};
  std::vector<Tensor> gradients;
  for (int side = 0; side < 2; ++side) {
    Neighbours& one = params.neighbours[side];
    const int64_t count = params.batch * params.points[side].count * params.k;
    if (given[side]->has_value() && (side == 0 || indices[side]->numel() == count)) {
      grads[side] = dense(**given[side]);
      places[side] = dense(*indices[side]);
      check(grads[side].numel() == count && grads[side].scalar_type() == wide(p1), "grad_dists",
            " must have the shape and dtype of the distances");
      check(places[side].numel() == count && places[side].scalar_type() == ScalarType::Long, "idx",
            " must hold int64 indices in the shape of the distances");
      one.grad_dists = grads[side].const_data_ptr();
      one.idx = static_cast<int64_t*>(const_cast<void*>(places[side].const_data_ptr()));
    }
    if (needed[side]) {
      const Tensor& input = side == 0 ? p1 : p2;
      results[side] = empty(input.sizes(), wide(p1), p1);
      params.grads[side] = results[side].mutable_data_ptr();
    }
  }
  if (needs_p1 || needs_p2) {
    const OnDeviceOf device(p1);
#ifdef USE_CUDA
    std::array<Sorted, 2> sorted;
    for (int side = 0; side < 2; ++side) {
      if (needed[1 - side] && params.neighbours[side].grad_dists) {
        sorted[side] = sort_places(params, side, p1, device.stream());
      }
    }
#endif
    JITOPS_RUN("knn_points", backward, p1, params, device);
  }
  for (int side = 0; side < 2; ++side) {
    if (!needed[side]) continue;
    const bool same = wide(p1) == p1.scalar_type();
    gradients.push_back(same ? results[side] : torch::stable::to(results[side], p1.scalar_type()));
  }
  return gradients;
}

}  // namespace
}  // namespace jitops::knn_points

// ---- registration (schemas and shapes: ops/losses/knn_points.py) --------------------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("knn_points_forward", TORCH_BOX(&jitops::knn_points::forward));
  m.impl("knn_points_backward", TORCH_BOX(&jitops::knn_points::backward));
}
