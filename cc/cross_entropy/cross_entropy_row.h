// Internal: what a row's label means, for CPU and CUDA alike.
#pragma once

#include <cstdint>

#include "flashtrain/common/host_device.h"
#include "flashtrain/cross_entropy/cross_entropy.h"

namespace flashtrain {
namespace {  // NOLINT: compiled once per instruction set, see common/cpu_row.h

// Columns that are classes; the rest are padding.
FLASHTRAIN_HOST_DEVICE int64_t ValidCols(const CrossEntropyParams& p) {
  const int64_t classes = p.num_classes - p.first_class;
  return classes < 0 ? 0 : classes < p.cols ? classes : p.cols;
}

FLASHTRAIN_HOST_DEVICE int64_t LabelAt(const CrossEntropyParams& p, int64_t row) {
  return p.label_type == LabelType::kInt64 ? static_cast<const int64_t*>(p.labels)[row]
                                           : static_cast<const int32_t*>(p.labels)[row];
}

struct RowLabel {
  bool ignored;
  bool valid;   // ignored, or a class
  int64_t col;  // of the label; -1: it is not among the columns here
};

FLASHTRAIN_HOST_DEVICE RowLabel ReadLabel(const CrossEntropyParams& p, int64_t row,
                                          int64_t valid_cols) {
  const int64_t label = LabelAt(p, row);
  const bool ignored = label == p.ignore_index;
  const bool in_range = label >= 0 && label < p.num_classes;
  const int64_t col = in_range ? label - p.first_class : -1;
  const bool here = !ignored && col >= 0 && col < valid_cols;
  return {ignored, ignored || in_range, here ? col : -1};
}

// loss from its parts: lse, x[label] (0 where it is not here) and the sum of x.
FLASHTRAIN_HOST_DEVICE float RowLoss(const CrossEntropyParams& p, float lse, float x_label,
                                     float x_sum) {
  float loss = -(1.0f - p.label_smoothing) * x_label;
  if (p.label_smoothing > 0.0f) {
    loss -= p.label_smoothing / static_cast<float>(p.num_classes) * x_sum;
  }
  if (p.partial) return loss;
  loss += lse;
  return p.lse_square_scale > 0.0f ? loss + p.lse_square_scale * lse * lse : loss;
}

FLASHTRAIN_HOST_DEVICE float RowZLoss(const CrossEntropyParams& p, float lse) {
  return p.lse_square_scale > 0.0f ? p.lse_square_scale * lse * lse : 0.0f;
}

// dlogits[c] = softmax * exp(x[c] - lse) - smooth - (c == label ? label : 0).
struct RowGradient {
  float lse, softmax, smooth, label;
};

FLASHTRAIN_HOST_DEVICE RowGradient MakeRowGradient(const CrossEntropyParams& p, int64_t row,
                                                   float lse) {
  const float dloss = p.dlosses == nullptr ? 1.0f : p.dlosses[row * p.dlosses_stride];
  const float g = dloss * p.logit_scale;
  const float z = p.lse_square_scale > 0.0f ? 1.0f + 2.0f * p.lse_square_scale * lse : 1.0f;
  return {lse, g * z, g * p.label_smoothing / static_cast<float>(p.num_classes),
          g * (1.0f - p.label_smoothing)};
}

}  // namespace
}  // namespace flashtrain
