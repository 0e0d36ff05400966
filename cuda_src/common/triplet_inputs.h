// The arguments of a triplet loss on the host, checked.
#pragma once

#include "tensor.h"
#include "triplets.h"

namespace jitops {

struct TripletInputs {
  Rows anchors, candidates;
  Tensor anchor_labels, candidate_labels;
  bool same;

  TripletInputs(const Tensor& embeddings, const Tensor& labels,
                const std::optional<Tensor>& ref_emb, const std::optional<Tensor>& ref_labels)
      : anchors(embeddings),
        candidates(ref_emb ? *ref_emb : embeddings),
        anchor_labels(dense(labels)),
        candidate_labels(ref_labels ? dense(*ref_labels) : anchor_labels),
        same(!ref_emb) {
    check(embeddings.dim() == 2, "embeddings", " must have two dimensions");
    check_same_kind("ref_emb", candidates.tensor, embeddings);
    check(candidates.tensor.dim() == 2 && candidates.cols == anchors.cols, "ref_emb",
          " must have as many columns as embeddings");
    check(ref_emb.has_value() == ref_labels.has_value(), "ref_labels", " must come with ref_emb");
    check_labels("labels", anchor_labels, anchors);
    check_labels("ref_labels", candidate_labels, candidates);
  }

  // `own`: the candidate that the first anchor is, or -1. Without references it is the first one.
  void fill(Triplets& params, int64_t own, int64_t reduction) const {
    check(own >= -1 && (own < 0 || own + anchors.count <= candidates.count), "own",
          " must be -1 or the place of the anchors among the candidates");
    check(reduction >= 0 && reduction <= 2, "reduction", " must be 0, 1 or 2");
    params.anchors = anchors.tensor.const_data_ptr();
    params.candidates = candidates.tensor.const_data_ptr();
    params.anchor_labels = static_cast<const int64_t*>(anchor_labels.const_data_ptr());
    params.candidate_labels = static_cast<const int64_t*>(candidate_labels.const_data_ptr());
    params.anchor_stride = anchors.stride;
    params.candidate_stride = candidates.stride;
    params.rows = anchors.count;
    params.others = candidates.count;
    params.cols = anchors.cols;
    params.same = same;
    params.own = same ? 0 : own;
    params.reduction = static_cast<Reduction>(reduction);
  }

 private:
  static void check_labels(const char* name, const Tensor& labels, const Rows& rows) {
    check(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
              labels.size(0) == rows.count &&
              labels.get_device_index() == rows.tensor.get_device_index() &&
              labels.is_cuda() == rows.tensor.is_cuda(),
          name, " must hold an int64 label for each row, on the same device");
  }
};

inline void check_grad_loss(const Tensor& grad, const Tensor& embeddings, const Triplets& params) {
  check_same_kind("grad_loss", grad, embeddings);
  check(grad.numel() == (params.reduction == Reduction::kNone ? params.rows : 1), "grad_loss",
        " must have the shape of the loss");
}

// The gradients that are needed. They are summed in acc_t<T>.
class TripletGradients {
 public:
  TripletGradients(Triplets& params, const TripletInputs& inputs, bool needs_embeddings,
                   bool needs_ref_emb)
      : needs_embeddings_(needs_embeddings),
        needs_ref_emb_(needs_ref_emb && !inputs.same),
        of_embeddings_(sums(needs_embeddings_, inputs.anchors.tensor)),
        of_ref_emb_(sums(needs_ref_emb_, inputs.candidates.tensor)) {
    void* embeddings = needs_embeddings_ ? of_embeddings_.mutable_data_ptr() : nullptr;
    void* references = needs_ref_emb_ ? of_ref_emb_.mutable_data_ptr() : nullptr;
    params.grad_anchors = inputs.same ? nullptr : embeddings;
    params.grad_candidates = inputs.same ? embeddings : references;
  }

  bool empty() const { return !needs_embeddings_ && !needs_ref_emb_; }

  // The sums, or tensors of no elements.
  const Tensor& of_embeddings() const { return of_embeddings_; }
  const Tensor& of_ref_emb() const { return of_ref_emb_; }

  // Those that are needed, rounded once.
  std::vector<Tensor> in_dtype_of(const Tensor& embeddings) const {
    std::vector<Tensor> gradients;
    if (needs_embeddings_) gradients.push_back(of_embeddings_);
    if (needs_ref_emb_) gradients.push_back(of_ref_emb_);
    if (wide(embeddings) != embeddings.scalar_type()) {
      for (Tensor& one : gradients) one = torch::stable::to(one, embeddings.scalar_type());
    }
    return gradients;
  }

 private:
  static Tensor sums(bool needed, const Tensor& like) {
    constexpr int64_t kNone = 0;
    const auto sizes = needed ? like.sizes() : IntHeaderOnlyArrayRef(&kNone, size_t{1});
    return jitops::empty(sizes, wide(like), like);
  }

  bool needs_embeddings_, needs_ref_emb_;
  Tensor of_embeddings_, of_ref_emb_;
};

}  // namespace jitops
