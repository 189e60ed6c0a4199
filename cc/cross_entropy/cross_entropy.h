// Fused cross entropy of logits and integer labels, forward and backward, on CPU and CUDA.
//
// With x = logit_scale * logits[row, :], y the row's label, C the number of classes, s the label
// smoothing and z the factor of the z-loss:
//
//   lse  = log(sum_c exp(x[c]))
//   loss = lse - (1 - s) * x[y] - s / C * sum_c x[c] + z * lse^2
//   dlogits[c] = dloss * logit_scale *
//                (exp(x[c] - lse) * (1 + 2 * z * lse) - (1 - s) * (c == y) - s / C)
//
// A row whose label is ignore_index has loss 0 and gradient 0. Columns beyond the classes (padding
// of the vocabulary) are not read, take no part in any sum and get gradient 0. Label smoothing:
// Szegedy et al. 2016 (arXiv:1512.00567); z-loss: de Brebisson and Vincent 2016 (arXiv:1604.08859).
//
// The classes may be spread over processes, each with the columns [first_class, first_class + cols)
// of them: forward with `partial` gives each process's share, from which the caller makes the
// losses and the log-sum-exp over all classes; backward needs only the latter.
//
// Numerics: all arithmetic is fp32; the exponentials are taken relative to the row's running
// maximum. The gradient comes from the stored lse, whose rounding is a relative error of the
// softmax of 6e-8 * |lse|. -inf in any place is a class of probability 0; a row of nothing but
// -inf, or with +inf or NaN, is NaN, as in torch, and leaves the other rows alone. Bitwise
// deterministic for one device type and model.
//
// Labels out of range: on CPU an error, and nothing is written. On CUDA, where finding out would
// need a wait for the device, the row's loss and all of its gradient are NaN.
//
// Cost: memory bound. Forward reads the logits once; backward reads them and writes the gradient.
// CrossEntropyForwardBackward reads and writes them once where a row fits in a CTA's shared memory
// (227 KiB on sm_90, 163 on sm_80), else it reads them once more, in part from the caches. Any
// alignment and stride is read in vectors of 16 bytes.
//
//   CrossEntropyParams p;
//   p.rows = 16384, p.cols = 50304, p.num_classes = 50257;
//   p.logits = logits, p.logits_row_stride = 50304, p.dtype = DType::kBFloat16;
//   p.labels = labels, p.losses = losses, p.lse = lse;
//   Status s = CrossEntropyForward(p, Device::Cuda(), stream);
#pragma once

#include <cstdint>

#include "flashtrain/common/device.h"
#include "flashtrain/common/dtype.h"
#include "flashtrain/common/status.h"

namespace flashtrain {

enum class LabelType : int8_t { kInt64, kInt32 };

// The arguments of all three functions; each says what it reads and writes. Pointers are memory of
// the op's device; "null: ..." says what a null pointer means, and a pointer without it must not be
// null, where it is used, unless rows is 0. Any alignment of at least the dtype's size works.
// Strides are in elements. Outputs overlap neither inputs nor each other, but for dlogits.
struct CrossEntropyParams {
  int64_t rows = 0;         // >= 0
  int64_t cols = 0;         // >= 1, columns of logits and dlogits
  int64_t num_classes = 0;  // C >= 1
  int64_t first_class = 0;  // >= 0, the class of column 0; columns of classes >= C are padding

  const void* logits = nullptr;   // [rows, cols], dtype, adjacent columns
  int64_t logits_row_stride = 0;  // >= cols (any where rows is 1)
  DType dtype = DType::kFloat32;  // of logits and dlogits

  const void* labels = nullptr;  // [rows], label_type, in [0, C) or ignore_index
  LabelType label_type = LabelType::kInt64;
  int64_t ignore_index = -100;

  float label_smoothing = 0.0f;   // s, in [0, 1]
  float logit_scale = 1.0f;       // > 0
  float lse_square_scale = 0.0f;  // z, >= 0

  // [rows], the log-sum-exp of x over all classes. Forward: null: computed; else taken as given,
  // and of the logits only the label's is read (label_smoothing must be 0). Backward: required.
  // Forward and backward at once: must be null.
  const float* known_lse = nullptr;

  // Forward: not all classes are among the columns here. The losses leave out what depends on the
  // log-sum-exp over all classes, lse + z * lse^2, and z_losses must be null. Summed over the
  // processes, with that added, they are the losses.
  bool partial = false;

  // Outputs of forward.
  float* losses = nullptr;    // [rows]
  float* lse = nullptr;       // [rows], of the columns here, 0 for ignored rows; null: not written
  float* z_losses = nullptr;  // [rows], z * lse^2, which losses contain; null: not written

  // Backward. The gradient of row i's loss is dlosses[i * dlosses_stride].
  const float* dlosses = nullptr;
  int64_t dlosses_stride = 1;      // >= 0; 0: one gradient for all rows
  void* dlogits = nullptr;         // [rows, cols], dtype; logits itself (same stride) is allowed
  int64_t dlogits_row_stride = 0;  // >= cols (any where rows is 1)
};

// `stream` is a cudaStream_t (null: the default stream) and is ignored on CPU. CUDA work is only
// enqueued: no allocation, no synchronisation, valid under graph capture. Returns an error, and has
// written nothing, if the arguments are not as described above.

// Reads logits, labels and known_lse; writes losses, lse and z_losses.
Status CrossEntropyForward(const CrossEntropyParams& params, Device device, void* stream);

// Reads logits, labels, known_lse and dlosses; writes dlogits.
Status CrossEntropyBackward(const CrossEntropyParams& params, Device device, void* stream);

// Both, for a dlosses that is known up front; null dlosses: 1 for each row. Not for `partial`.
Status CrossEntropyForwardBackward(const CrossEntropyParams& params, Device device, void* stream);

}  // namespace flashtrain
