// A tree of bounding boxes over points, for nearest neighbours in few dimensions.
//
// Medians split the points into leaves of one tile. Sixteen neighbouring leaves or nodes make a
// node, whose boxes are compared with a point in a few vector instructions.
#pragma once

#include <cmath>

#include "cpu_neighbours.h"

namespace jitops::cpu {

template <typename A>
class BoxTree {
 public:
  using I = LabelOf<A>;

  // Points with NaN or infinity are left out. `rows` must outlive the tree.
  BoxTree(const A* rows, int64_t count, int64_t cols) : cols_(cols) {
    std::vector<Entry> entries;
    entries.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      if (all_finite(rows + i * cols, cols)) entries.push_back({A(0), static_cast<I>(i)});
    }
    std::vector<A> box(2 * cols);
    for (int64_t k = 0; k < cols; ++k) {
      box[k] = kFar<A>;
      box[cols + k] = -kFar<A>;
      for (const Entry& one : entries) {
        box[k] = std::min(box[k], rows[one.at * cols + k]);
        box[cols + k] = std::max(box[cols + k], rows[one.at * cols + k]);
      }
    }
    split(rows, entries.data(), static_cast<int64_t>(entries.size()), box.data());
    order_.reserve(entries.size());
    for (const Entry& one : entries) order_.push_back(one.at);
    pack(rows);
    while (levels_.back().nodes > kFan) add_level();
  }

  // The points in the order of the leaves: neighbours in space are mostly neighbours here.
  const std::vector<int64_t>& order() const { return order_; }

  // Adds the nearest points to a list.
  JITOPS_KERNEL void search(int64_t norm, const A* point, const Nearest<A>& nearest) const {
    I keys[kMaxLevels][kFan];  // of the children that are left: see `bounds`
    int64_t node[kMaxLevels];
    const int top = static_cast<int>(levels_.size()) - 1;
    int level = top;
    node[top] = 0;
    bounds(norm, levels_[top], 0, point, keys[top]);
    for (;;) {
      I key = keys[level][0];
#pragma omp simd reduction(min : key)
      for (int c = 0; c < kFan; ++c) key = keys[level][c] < key ? keys[level][c] : key;
      const A bound = number_of(key & ~I(kFan - 1));
      if (!(bound <= nearest.worst()) || !(bound < kFar<A>)) {
        if (level == top) return;
        ++level;
        continue;
      }
      const int64_t child = key & (kFan - 1), at = node[level] * kFan + child;
      keys[level][child] = kDone;
      // Equal distances count only for lower indices.
      const int64_t last = nearest.at[nearest.k - 1];
      if (bound == nearest.worst() && levels_[level].first[at] > last) continue;
      if (level > 0) {
        node[--level] = at;
        bounds(norm, levels_[level], at, point, keys[level]);
      } else {
        take_leaf(norm, point, at, nearest);
      }
    }
  }

 private:
  static constexpr int kFan = 16, kMaxLevels = 16;
  static constexpr int64_t kLeaf = kPairLanes<A>;
  static constexpr I kDone = std::numeric_limits<I>::max();

  struct Entry {
    A key;
    I at;

    bool operator<(const Entry& other) const {
      return (key < other.key) | ((key == other.key) & (at < other.at));
    }
  };

  // Nodes that are children of the next level. A group of kFan has, for each dimension, kFan lower
  // and kFan upper ends.
  struct Level {
    int64_t nodes;
    std::vector<A> boxes;
    std::vector<int64_t> first;  // the lowest index below each node

    Level(int64_t nodes_, int64_t cols)
        : nodes(nodes_),
          boxes((nodes + kFan - 1) / kFan * kFan * 2 * cols),
          first(nodes, std::numeric_limits<int64_t>::max()) {
      for (size_t n = 0; n < boxes.size(); ++n) boxes[n] = n / kFan % 2 == 0 ? kFar<A> : -kFar<A>;
    }
    A* low(int64_t node, int64_t cols) {
      return boxes.data() + (node / kFan * cols * 2) * kFan + node % kFan;
    }
  };

  // ---- construction -----------------------------------------------------------------------------

  // Puts the `middle` smallest entries first.
  JITOPS_KERNEL static void select(Entry* entries, int64_t count, int64_t middle) {
    uint64_t random = 88172645463325252ull;
    while (count > 1) {
      Entry of[3];
      for (Entry& one : of) {
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        one = entries[static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(count))];
      }
      const Entry low = of[1] < of[0] ? of[1] : of[0], high = of[1] < of[0] ? of[0] : of[1];
      const Entry pivot = of[2] < low ? low : high < of[2] ? high : of[2];
      int64_t below = 0;  // entries less than the pivot; all entries differ
      for (int64_t n = 0; n < count; ++n) {
        const Entry one = entries[n];
        entries[n] = entries[below];
        entries[below] = one;
        below += one < pivot;
      }
      if (middle <= below) {
        count = below;
        if (middle == below) return;
      } else {
        entries += below;
        count -= below;
        middle -= below;
        // The pivot is the least of these.
        for (int64_t n = 0; n < count; ++n) {
          if (entries[n].at == pivot.at) std::swap(entries[n], entries[0]);
        }
        if (--middle == 0) return;
        ++entries;
        --count;
      }
    }
  }

  // The left part takes a power of two of leaves, so that nodes are the parts of some split.
  void split(const A* rows, Entry* entries, int64_t count, const A* box) {
    if (count <= kLeaf) return;
    int64_t middle = kLeaf;
    while (2 * middle < count) middle *= 2;
    int64_t widest = 0;
    for (int64_t k = 1; k < cols_; ++k) {
      if (box[cols_ + k] - box[k] > box[cols_ + widest] - box[widest]) widest = k;
    }
    for (int64_t n = 0; n < count; ++n) entries[n].key = rows[entries[n].at * cols_ + widest];
    select(entries, count, middle);
    A end = -kFar<A>;
    for (int64_t n = 0; n < middle; ++n) end = std::max(end, entries[n].key);
    std::vector<A> part(box, box + 2 * cols_);
    part[cols_ + widest] = end;
    split(rows, entries, middle, part.data());
    part.assign(box, box + 2 * cols_);
    part[widest] = end;
    split(rows, entries + middle, count - middle, part.data());
  }

  // The leaves, and their boxes as the lowest level.
  void pack(const A* rows) {
    const int64_t count = static_cast<int64_t>(order_.size());
    const int64_t leaves = std::max<int64_t>(1, (count + kLeaf - 1) / kLeaf);
    packed_.assign(leaves * kLeaf * cols_, std::numeric_limits<A>::quiet_NaN());
    Level& level = levels_.emplace_back(leaves, cols_);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t leaf = n / kLeaf;
      const A* row = rows + order_[n] * cols_;
      A* low = level.low(leaf, cols_);
      for (int64_t k = 0; k < cols_; ++k) {
        packed_[(leaf * cols_ + k) * kLeaf + n % kLeaf] = row[k];
        low[2 * k * kFan] = std::min(low[2 * k * kFan], row[k]);
        low[(2 * k + 1) * kFan] = std::max(low[(2 * k + 1) * kFan], row[k]);
      }
      level.first[leaf] = std::min(level.first[leaf], order_[n]);
    }
  }

  void add_level() {
    Level level((levels_.back().nodes + kFan - 1) / kFan, cols_);
    Level& below = levels_.back();
    for (int64_t n = 0; n < below.nodes; ++n) {
      const A* from = below.low(n, cols_);
      A* low = level.low(n / kFan, cols_);
      for (int64_t k = 0; k < cols_; ++k) {
        low[2 * k * kFan] = std::min(low[2 * k * kFan], from[2 * k * kFan]);
        low[(2 * k + 1) * kFan] = std::max(low[(2 * k + 1) * kFan], from[(2 * k + 1) * kFan]);
      }
      level.first[n / kFan] = std::min(level.first[n / kFan], below.first[n]);
    }
    levels_.push_back(std::move(level));
  }

  // ---- search -----------------------------------------------------------------------------------

  [[gnu::always_inline]] static inline A number_of(I bits) {
    A x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  // For each child of a node: its distance, rounded down, with its number in the last bits. As
  // integers these are in order. They are less than the distance by more than its rounding errors.
  JITOPS_KERNEL void bounds(int64_t norm, const Level& level, int64_t node, const A* point,
                            I* keys) const {
    const A* box = level.boxes.data() + node * cols_ * 2 * kFan;
    A sums[kFan] = {};
    for (int64_t k = 0; k < cols_; ++k) {
      const A x = point[k];
#pragma omp simd
      for (int c = 0; c < kFan; ++c) {
        const A below = box[2 * k * kFan + c] - x, above = x - box[(2 * k + 1) * kFan + c];
        A gap = below > above ? below : above;
        gap = gap > A(0) ? gap : A(0);
        sums[c] += norm == 1 ? gap : gap * gap;
      }
    }
    I bits[kFan];
    std::memcpy(bits, sums, sizeof bits);
#pragma omp simd
    for (int c = 0; c < kFan; ++c) keys[c] = (bits[c] & ~I(kFan - 1)) | I(c);
  }

  JITOPS_KERNEL void take_leaf(int64_t norm, const A* point, int64_t leaf,
                               const Nearest<A>& nearest) const {
    A d[kLeaf];
    row_distances(norm, point, cols_, packed_.data() + leaf * kLeaf * cols_, 1, d);
    if (!(least_of(d, kLeaf) <= nearest.worst())) return;
    const int64_t first = leaf * kLeaf;
    const int64_t count = std::min(kLeaf, static_cast<int64_t>(order_.size()) - first);
    for (int64_t n = 0; n < count; ++n) {
      if (d[n] <= nearest.worst()) nearest.take(d[n], order_[first + n]);
    }
  }

  int64_t cols_;
  std::vector<int64_t> order_;
  std::vector<A> packed_;
  std::vector<Level> levels_;  // the lowest first
};

}  // namespace jitops::cpu
