// Internal: the CUDA side of layer_norm.h, between validation, launch and kernels.
#pragma once

#include <cstdint>

#include "flashtrain/layer_norm/layer_norm.h"

namespace flashtrain {

// Params are valid (checked by LayerNormForward and LayerNormBackward).
Status LayerNormForwardCuda(const LayerNormForwardParams& params, void* stream);
Status LayerNormBackwardCuda(const LayerNormBackwardParams& params, void* stream);
int64_t LayerNormBackwardWorkspaceBytesCuda(const LayerNormBackwardParams& params);

// How a launch spreads rows over threads; see layer_norm_kernel.cuh.
struct LayerNormLaunch {
  static constexpr int kMaxGroups = 16;

  int vecs = 0;    // vectors of a row held by a thread
  int warps = 0;   // warps per row
  int groups = 0;  // rows per CTA at a time
  int stages = 0;  // backward: slots of shared memory, rows being worked on or loaded, per group
  int shared_bytes = 0;
  int ctas = 0;       // of the grid
  bool lean = false;  // forward: see layer_norm_kernel.cuh
  int num_grads = 0;  // backward: partials per CTA
};

// Limits of the kernels that hold `kVecs` vectors of kN elements per thread: chosen by measurement
// on one H100, where spilled registers cost up to 10% and warps that hide no latency more.
template <int kVecs, int kN, bool kLean>
struct ForwardLimits {
  static constexpr int kMaxThreads = kVecs == 4            ? (kN == 4 ? 1024 : 512)
                                     : kLean && kVecs == 2 ? 512
                                                           : 256;
  static constexpr int kMinCtas = kVecs == 4            ? 1
                                  : kLean && kVecs == 3 ? 4
                                  : kLean || kVecs == 3 ? 2
                                                        : 3;
};

// The register file has room for kMaxThreads * kMinCtas threads per multiprocessor, which sizes the
// persistent grid.
template <int kVecs>
struct BackwardLimits {
  static constexpr int kMaxThreads = kVecs == 1 ? 448 : 512;
  static constexpr int kMinCtas = kVecs == 1 ? 2 : 1;
};

// The kernels for one pair of dtypes. The results are cudaError_t.
struct LayerNormCudaKernels {
  int vec_elements;
  int (*forward)(const LayerNormForwardParams& params, const LayerNormLaunch& launch, void* stream);
  int (*backward)(const LayerNormBackwardParams& params, const LayerNormLaunch& launch,
                  void* stream);
};

// Named by the dtypes of x0 (backward: of dz) and of x; other dtypes are run-time.
extern const LayerNormCudaKernels kLayerNormFloat32Float32;
extern const LayerNormCudaKernels kLayerNormFloat16Float16;
extern const LayerNormCudaKernels kLayerNormFloat16Float32;
extern const LayerNormCudaKernels kLayerNormBFloat16BFloat16;
extern const LayerNormCudaKernels kLayerNormBFloat16Float32;

// For any shape, stride, alignment and dtypes, and for layerscale's gradient.
int LaunchLayerNormForwardGeneral(const LayerNormForwardParams& params, int ctas, void* stream);
int LaunchLayerNormBackwardGeneral(const LayerNormBackwardParams& params, int ctas, void* stream);

// Sums the partials of `ctas` CTAs, [ctas, wanted gradients, cols] in the workspace, into dweight,
// dbias and dlayerscale, whichever are wanted, in this order. early_launch: the kernel is set up
// while the one before it in the stream still runs (sm_90 and later; saves 1.5 us).
int LaunchLayerNormReduce(const LayerNormBackwardParams& params, int ctas, bool early_launch,
                          void* stream);

}  // namespace flashtrain
