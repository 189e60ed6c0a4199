// AdamW over all tensors of a model in one launch, and the norm of all gradients, on CPU and CUDA.
//
//   g = grad * min(1, max_norm / (norm + 1e-6)) / grad_scale,   norm = grad_norm / grad_scale
//   p = p * (1 - lr * weight_decay)
//   m = m + (1 - beta1) * (g - m)
//   v = beta2 * v + (1 - beta2) * g^2
//   p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// with t the tensor's step count, this step included. Loshchilov and Hutter 2019
// (arXiv:1711.05101), algorithm 2, with the decay applied as torch.optim.AdamW does; the clipping
// factor is that of torch.nn.utils.clip_grad_norm_.
//
// What the device alone knows is read there, so that the host never waits: where grad_norm is not
// finite, grad_scale is not or is 0, or `skip` is not 0, nothing is updated but the count of
// skipped steps.
//
// Numerics: fp32 arithmetic and state; the powers of beta are fp64. A low-precision parameter with
// a master copy is the master rounded; without one, every step rounds it, and small updates are
// lost. An element of the parameter that is not its master rounded, bit for bit, was written since
// the last step (loaded, clamped): its master starts from there. Bitwise deterministic, whatever
// the number of threads or CTAs.
//
// Cost: memory bound. Bytes for each fp32 parameter with an fp32 gradient: 28 (reads g, p, m, v;
// writes p, m, v); a bf16 or fp16 parameter with a master copy and a gradient of its dtype: 30.
// The norm reads each gradient once. Tensors that are not 16-byte aligned (8-byte for 2-byte
// elements) go element by element.
#pragma once

#include <cstdint>
#include <limits>

#include "flashtrain/common/device.h"
#include "flashtrain/common/dtype.h"
#include "flashtrain/common/status.h"

namespace flashtrain {

// One parameter. Memory is of the op's device; each array has numel adjacent elements, and none
// overlaps another, of this tensor or of others.
struct AdamWTensor {
  void* param = nullptr;  // param_dtype, updated
  DType param_dtype = DType::kFloat32;
  float* master = nullptr;  // updated, and param set to it rounded; null: param alone is updated

  const void* grad = nullptr;  // grad_dtype; null: this step leaves the tensor and its state alone
  DType grad_dtype = DType::kFloat32;

  float* exp_avg = nullptr;     // m, updated
  float* exp_avg_sq = nullptr;  // v, updated
  float* step = nullptr;        // one element: steps done, increased by 1 (exact up to 2^24)

  int64_t numel = 0;  // >= 0; array pointers may be null where 0
  int64_t group = 0;  // index into groups
};

struct AdamWGroup {
  double lr = 1e-3;                     // >= 0; like eps and weight_decay, within float's range
  const float* lr_on_device = nullptr;  // one element of the op's device; null: `lr` counts
  double beta1 = 0.9, beta2 = 0.999;    // in [0, 1)
  double eps = 1e-8;                    // >= 0
  double weight_decay = 0.0;            // >= 0
};

struct AdamWParams {
  // On the host, read before the call returns.
  const AdamWTensor* tensors = nullptr;
  int64_t num_tensors = 0;  // >= 0
  const AdamWGroup* groups = nullptr;
  int64_t num_groups = 0;  // >= 1 where there are tensors

  // One element each, in the op's device memory.
  const float* grad_scale = nullptr;  // gradients are divided by it; 0, inf, NaN: skip; null: 1
  const float* grad_norm = nullptr;   // of the gradients as they are, scaled; null: unknown
  const float* skip = nullptr;        // not 0: skip this step; null: 0
  int64_t* skipped_steps = nullptr;   // increased by 1 where the step is skipped; null: not counted

  double max_norm = std::numeric_limits<double>::infinity();  // finite: needs grad_norm

  // CUDA: the tensors' pointers as the kernel reads them, AdamWTableBytes(num_tensors, num_groups)
  // bytes of device memory, 16-byte aligned, contents undefined at first. `table_on_host`, as
  // large, zeroed at first, remembers what `table` holds, so that it is written anew, by launches
  // of their own, only where something has changed. Null: it is written on every call, as a
  // captured graph needs, whose replays may meet what other calls left there. Both are ignored on
  // CPU.
  void* table = nullptr;
  void* table_on_host = nullptr;
  int64_t table_bytes = 0;
};

// `stream` is a cudaStream_t (null: the default stream) and is ignored on CPU. CUDA work is only
// enqueued: no device allocation, no synchronisation, valid under graph capture. Returns an error,
// and has written nothing, if the arguments are not as described above.
Status AdamWStep(const AdamWParams& params, Device device, void* stream);
int64_t AdamWTableBytes(int64_t num_tensors, int64_t num_groups);

// norm = sqrt(sum of the squares of all elements of all gradients): inf or NaN where an element is.
// Squares are summed in fp32 over at most a chunk of kGradNormChunk elements of a tensor, those
// sums in fp64, in a fixed order.
inline constexpr int64_t kGradNormChunk = 32768;

struct GradNormTensor {
  const void* grad = nullptr;  // [numel] of dtype, adjacent
  DType dtype = DType::kFloat32;
  int64_t numel = 0;
};

struct GradNormParams {
  const GradNormTensor* tensors = nullptr;  // on the host
  int64_t num_tensors = 0;

  float* norm = nullptr;  // one element, written

  // GradNormWorkspaceBytes(params) bytes of the op's device, 16-byte aligned, undefined before and
  // after.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

Status GradNorm(const GradNormParams& params, Device device, void* stream);
int64_t GradNormWorkspaceBytes(const GradNormParams& params);

}  // namespace flashtrain
