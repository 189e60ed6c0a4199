// Which kernel runs and on how many threads.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "flashtrain/common/cuda_host.h"
#include "flashtrain/layer_norm/layer_norm_cuda.h"

namespace flashtrain {
namespace {

constexpr char kOp[] = "layer_norm";

// The vectorised kernels for x0 or dz of dtype `a` and x of dtype `b`, or null.
const LayerNormCudaKernels* FindKernels(DType a, DType b) {
  if (a == DType::kFloat32) return b == a ? &kLayerNormFloat32Float32 : nullptr;
  const bool half = a == DType::kFloat16;
  if (b == a) return half ? &kLayerNormFloat16Float16 : &kLayerNormBFloat16BFloat16;
  if (b != DType::kFloat32) return nullptr;
  return half ? &kLayerNormFloat16Float32 : &kLayerNormBFloat16Float32;
}

struct LaunchLimits {
  int vecs, max_warps, max_threads, min_ctas;
};

template <int kVecs>
constexpr LaunchLimits Limits(int max_warps) {
  return {kVecs, max_warps, BackwardLimits<kVecs>::kMaxThreads, BackwardLimits<kVecs>::kMinCtas};
}

template <typename Params>
bool IsUnscaled(const Params& p) {
  return p.dropout_p == 0.0f && p.rowscale == nullptr && p.layerscale == nullptr;
}

int CountGradients(const LayerNormBackwardParams& p) {
  return (p.dweight != nullptr) + (p.dbias != nullptr) + (p.dlayerscale != nullptr);
}

// Fills in the first kernel that is wide enough, as many rows a CTA and CTAs as the device holds,
// and up to 3 stages of shared memory. False: none is wide enough, or there is no whole vector.
bool ChooseBackwardLaunch(const DeviceLimits& device, const LayerNormBackwardParams& p, int n,
                          LayerNormLaunch* launch) {
  constexpr int kMaxStages = 3;
  constexpr int kReservedBytes = 6144;  // of shared memory, per CTA: the system's and static arrays
  const LaunchLimits choices[] = {Limits<1>(8), Limits<2>(16), Limits<4>(16)};
  const int slot_bytes = n * (DTypeSize(p.z_dtype) + 2 * DTypeSize(p.x_dtype));
  const int64_t vectors = p.cols / n;
  if (vectors == 0) return false;
  launch->num_grads = CountGradients(p);
  launch->lean = IsUnscaled(p) && p.x0_dtype == p.z_dtype;
  for (const LaunchLimits& limits : choices) {
    if (vectors > int64_t{32} * limits.vecs * limits.max_warps) continue;
    launch->vecs = limits.vecs;
    launch->warps = static_cast<int>(CeilDivide(vectors, 32 * limits.vecs));
    launch->groups =
        std::min(limits.max_threads / (32 * launch->warps), LayerNormLaunch::kMaxGroups);
    const int threads = 32 * launch->warps * launch->groups;
    const int stage_bytes = threads * limits.vecs * slot_bytes;
    const int weight_bytes = 32 * launch->warps * limits.vecs * n * static_cast<int>(sizeof(float));
    int resident = limits.max_threads * limits.min_ctas / threads;
    resident =
        std::max(1, std::min(resident, device.shared_per_multiprocessor /
                                           (2 * stage_bytes + weight_bytes + kReservedBytes)));
    const int budget =
        std::min(device.shared_per_cta, device.shared_per_multiprocessor / resident) -
        kReservedBytes;
    launch->stages = std::min(kMaxStages, (budget - weight_bytes) / stage_bytes);
    if (launch->stages < 1) return false;
    launch->shared_bytes = launch->stages * stage_bytes + weight_bytes;
    launch->ctas = static_cast<int>(std::min<int64_t>(int64_t{resident} * device.multiprocessors,
                                                      CeilDivide(p.rows, launch->groups)));
    return true;
  }
  return false;
}

// Whether vectors of n elements of a [rows, cols] tensor are aligned in every row. Null is.
bool IsAligned(const void* ptr, int64_t row_stride, DType dtype, int n) {
  const int64_t bytes = std::min<int64_t>(16, n * DTypeSize(dtype));
  return ptr == nullptr || (reinterpret_cast<uintptr_t>(ptr) % bytes == 0 && row_stride % n == 0);
}

bool IsVectorizable(const LayerNormForwardParams& p, int n) {
  return p.cols % n == 0 && IsAligned(p.x0, p.x0_row_stride, p.x0_dtype, n) &&
         IsAligned(p.residual, p.residual_row_stride, p.x_dtype, n) &&
         IsAligned(p.z, p.z_row_stride, p.z_dtype, n) &&
         IsAligned(p.x, p.x_row_stride, p.x_dtype, n) &&
         IsAligned(p.weight, 0, p.weight_dtype, n) && IsAligned(p.bias, 0, p.weight_dtype, n) &&
         reinterpret_cast<uintptr_t>(p.dropout_mask) % 4 == 0;
}

bool IsVectorizable(const LayerNormBackwardParams& p, int n) {
  return p.cols % n == 0 && p.dlayerscale == nullptr &&
         IsAligned(p.dz, p.dz_row_stride, p.z_dtype, n) &&
         IsAligned(p.dx, p.dx_row_stride, p.x_dtype, n) &&
         IsAligned(p.x, p.x_row_stride, p.x_dtype, n) &&
         IsAligned(p.dx0, p.dx0_row_stride, p.x0_dtype, n) &&
         IsAligned(p.dresidual, p.dresidual_row_stride, p.x_dtype, n);
}

constexpr int kGeneralCtasPerMultiprocessor = 2;

int GeneralCtas(int64_t rows, const DeviceLimits& device) {
  return static_cast<int>(
      std::min<int64_t>(rows, int64_t{kGeneralCtasPerMultiprocessor} * device.multiprocessors));
}

template <int kN, bool kLean>
constexpr int MaxForwardThreads(int vecs) {
  return vecs == 2   ? ForwardLimits<2, kN, kLean>::kMaxThreads
         : vecs == 3 ? ForwardLimits<3, kN, kLean>::kMaxThreads
                     : ForwardLimits<4, kN, kLean>::kMaxThreads;
}

int MaxForwardWarps(int n, bool lean, int vecs) {
  const int threads =
      n == 4 ? (lean ? MaxForwardThreads<4, true>(vecs) : MaxForwardThreads<4, false>(vecs))
             : (lean ? MaxForwardThreads<8, true>(vecs) : MaxForwardThreads<8, false>(vecs));
  return threads / 32;
}

// The kernel that leaves the fewest threads without a vector, the narrowest of equals, and about 64
// threads a CTA. False: none is wide enough, or the grid would be too large.
bool ChooseForwardLaunch(const LayerNormForwardParams& p, int n, LayerNormLaunch* launch) {
  constexpr int kThreads = 64;
  launch->lean = IsUnscaled(p) && p.dropout_mask == nullptr && p.z_dtype == p.x0_dtype;
  const int64_t vectors = p.cols / n;
  int64_t fewest_idle = 0;
  for (const int vecs : {2, 3, 4}) {
    const int64_t warps = CeilDivide(vectors, 32 * vecs), idle = 32 * vecs * warps - vectors;
    if (warps > MaxForwardWarps(n, launch->lean, vecs)) continue;
    if (launch->vecs != 0 && idle >= fewest_idle) continue;
    fewest_idle = idle;
    launch->vecs = vecs;
    launch->warps = static_cast<int>(warps);
  }
  if (launch->vecs == 0) return false;
  launch->groups = std::max(1, kThreads / (32 * launch->warps));
  const int64_t ctas = CeilDivide(p.rows, launch->groups);
  launch->ctas = static_cast<int>(ctas);
  return ctas <= std::numeric_limits<int>::max();
}

}  // namespace

Status LayerNormForwardCuda(const LayerNormForwardParams& p, void* stream) {
  DeviceLimits device;
  FLASHTRAIN_RETURN_IF_ERROR(GetDeviceLimits(kOp, &device));
  if (p.rows == 0) return Status();
  const LayerNormCudaKernels* kernels = FindKernels(p.x0_dtype, p.x_dtype);
  LayerNormLaunch launch;
  if (kernels != nullptr && IsVectorizable(p, kernels->vec_elements) &&
      ChooseForwardLaunch(p, kernels->vec_elements, &launch)) {
    return FromCuda(kernels->forward(p, launch, stream), kOp, "forward launch");
  }
  const int ctas = GeneralCtas(p.rows, device);
  return FromCuda(LaunchLayerNormForwardGeneral(p, ctas, stream), kOp, "forward launch");
}

// The largest of what the paths may use, so that it does not depend on alignment.
int64_t LayerNormBackwardWorkspaceBytesCuda(const LayerNormBackwardParams& p) {
  DeviceLimits device;
  if (!GetDeviceLimits(kOp, &device).ok()) return -1;
  int64_t ctas = GeneralCtas(p.rows, device);
  const LayerNormCudaKernels* kernels = FindKernels(p.z_dtype, p.x_dtype);
  LayerNormLaunch launch;
  if (kernels != nullptr && ChooseBackwardLaunch(device, p, kernels->vec_elements, &launch)) {
    ctas = std::max<int64_t>(ctas, launch.ctas);
  }
  return ctas * CountGradients(p) * p.cols * static_cast<int64_t>(sizeof(float));
}

Status LayerNormBackwardCuda(const LayerNormBackwardParams& p, void* stream) {
  DeviceLimits device;
  FLASHTRAIN_RETURN_IF_ERROR(GetDeviceLimits(kOp, &device));
  const LayerNormCudaKernels* kernels = FindKernels(p.z_dtype, p.x_dtype);
  LayerNormLaunch launch;
  if (p.rows == 0) {
    launch.ctas = 0;
  } else if (kernels != nullptr && IsVectorizable(p, kernels->vec_elements) &&
             ChooseBackwardLaunch(device, p, kernels->vec_elements, &launch)) {
    FLASHTRAIN_RETURN_IF_ERROR(
        FromCuda(kernels->backward(p, launch, stream), kOp, "backward launch"));
  } else {
    launch.ctas = GeneralCtas(p.rows, device);
    FLASHTRAIN_RETURN_IF_ERROR(
        FromCuda(LaunchLayerNormBackwardGeneral(p, launch.ctas, stream), kOp, "backward launch"));
  }
  return FromCuda(
      LaunchLayerNormReduce(p, launch.ctas, device.compute_capability_major >= 9, stream), kOp,
      "gradient sum launch");
}

}  // namespace flashtrain
