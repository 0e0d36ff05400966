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

  void fill(Triplets& params, int64_t reduction) const {
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

// The dtype of sums.
inline ScalarType wide(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_grad_loss(const Tensor& grad, const Tensor& embeddings, const Triplets& params) {
  check_same_kind("grad_loss", grad, embeddings);
  check(grad.numel() == (params.reduction == Reduction::kNone ? params.rows : 1), "grad_loss",
        " must have the shape of the loss");
}

// The gradients that are needed. They are summed in acc_t<T>, and rounded once.
class TripletGradients {
 public:
  TripletGradients(Triplets& params, const TripletInputs& inputs, bool needs_embeddings,
                   bool needs_ref_emb) {
    void* of_embeddings = allocate(needs_embeddings, inputs.anchors.tensor);
    void* of_references = allocate(needs_ref_emb && !inputs.same, inputs.candidates.tensor);
    params.grad_anchors = inputs.same ? nullptr : of_embeddings;
    params.grad_candidates = inputs.same ? of_embeddings : of_references;
  }

  bool empty() const { return sums_.empty(); }

  std::vector<Tensor> in_dtype_of(const Tensor& embeddings) && {
    if (wide(embeddings) != embeddings.scalar_type()) {
      for (Tensor& sum : sums_) sum = torch::stable::to(sum, embeddings.scalar_type());
    }
    return std::move(sums_);
  }

 private:
  void* allocate(bool needed, const Tensor& like) {
    if (!needed) return nullptr;
    return sums_.emplace_back(jitops::empty(like.sizes(), wide(like), like)).mutable_data_ptr();
  }

  std::vector<Tensor> sums_;
};

}  // namespace jitops
