// Which kernel runs and on how many threads.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <utility>

#include "flashtrain/layer_norm/layer_norm_cuda.h"

namespace flashtrain {
namespace {

Status FromCuda(int error, const char* what) {
  if (error == cudaSuccess) return Status();
  const std::string message = std::string("layer_norm: ") + what +
                              " failed: " + cudaGetErrorString(static_cast<cudaError_t>(error));
  const bool no_device = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver;
  return no_device ? Status::Unavailable(message) : Status::Internal(message);
}

struct DeviceLimits {
  int multiprocessors = 0;
  int shared_per_cta = 0, shared_per_multiprocessor = 0;  // bytes
};

// Of the current device; asked for once per device.
Status GetDeviceLimits(DeviceLimits* limits) {
  constexpr int kMaxDevices = 64;
  static DeviceLimits cache[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  static std::mutex mutex;
  int device = 0;
  FLASHTRAIN_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device), "cudaGetDevice"));
  if (device < kMaxDevices && known[device].load(std::memory_order_acquire)) {
    *limits = cache[device];
    return Status();
  }
  const std::pair<cudaDeviceAttr, int*> wanted[] = {
      {cudaDevAttrMultiProcessorCount, &limits->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_per_cta},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits->shared_per_multiprocessor}};
  for (const auto& [attribute, value] : wanted) {
    FLASHTRAIN_RETURN_IF_ERROR(
        FromCuda(cudaDeviceGetAttribute(value, attribute, device), "cudaDeviceGetAttribute"));
  }
  if (device >= kMaxDevices) return Status();
  std::lock_guard<std::mutex> lock(mutex);
  cache[device] = *limits;
  known[device].store(true, std::memory_order_release);
  return Status();
}

// The vectorised kernels for x0 or dz of dtype `a` and x of dtype `b`, or null.
const LayerNormCudaKernels* FindKernels(DType a, DType b) {
  if (a == DType::kFloat32) return b == a ? &kLayerNormFloat32Float32 : nullptr;
  const bool half = a == DType::kFloat16;
  if (b == a) return half ? &kLayerNormFloat16Float16 : &kLayerNormBFloat16BFloat16;
  if (b != DType::kFloat32) return nullptr;
  return half ? &kLayerNormFloat16Float32 : &kLayerNormBFloat16Float32;
}

struct TileLimits {
  int vecs, max_warps, max_threads, min_ctas;
};

template <template <int> class Tile, int kVecs>
constexpr TileLimits Limits(int max_warps) {
  return {kVecs, max_warps, Tile<kVecs>::kMaxThreads, Tile<kVecs>::kMinCtas};
}

// Fewest vectors per thread that fit, so that few lanes have no work (1,600 columns of bf16 are 200
// vectors: 7 warps of 1 vector) and many rows are in flight. A vector takes `vec_bytes` of shared
// memory. False: no tile is wide enough.
template <template <int> class Tile>
bool FindTile(const DeviceLimits& device, int64_t rows, int64_t vectors, int vec_bytes,
              LayerNormTile* tile) {
  constexpr int kMaxStages = 3;
  constexpr int kReservedBytes = 4096;  // of shared memory, per CTA: the system's and static arrays
  for (const TileLimits& limits : {Limits<Tile, 1>(8), Limits<Tile, 2>(16), Limits<Tile, 4>(16)}) {
    if (vectors > int64_t{32} * limits.vecs * limits.max_warps) continue;
    tile->vecs = limits.vecs;
    tile->warps = static_cast<int>((vectors + 32 * limits.vecs - 1) / (32 * limits.vecs));
    tile->groups = std::min(limits.max_threads / (32 * tile->warps), LayerNormTile::kMaxGroups);
    const int threads = 32 * tile->warps * tile->groups;
    const int stage_bytes = threads * limits.vecs * vec_bytes;
    int resident = limits.max_threads * limits.min_ctas / threads;
    resident = std::max(1, std::min(resident, device.shared_per_multiprocessor /
                                                  (2 * stage_bytes + kReservedBytes)));
    const int budget =
        std::min(device.shared_per_cta, device.shared_per_multiprocessor / resident) -
        kReservedBytes;
    tile->stages = std::min(kMaxStages, budget / stage_bytes);
    if (tile->stages < 1) return false;
    tile->shared_bytes = tile->stages * stage_bytes;
    const int64_t ctas = (rows + tile->groups - 1) / tile->groups;
    tile->ctas = static_cast<int>(std::min<int64_t>(resident * device.multiprocessors, ctas));
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
         IsAligned(p.layerscale, 0, p.weight_dtype, n) &&
         reinterpret_cast<uintptr_t>(p.dropout_mask) % 4 == 0;
}

bool IsVectorizable(const LayerNormBackwardParams& p, int n) {
  return p.cols % n == 0 && p.dlayerscale == nullptr &&
         IsAligned(p.dz, p.dz_row_stride, p.z_dtype, n) &&
         IsAligned(p.dx, p.dx_row_stride, p.x_dtype, n) &&
         IsAligned(p.x, p.x_row_stride, p.x_dtype, n) &&
         IsAligned(p.dx0, p.dx0_row_stride, p.x0_dtype, n) &&
         IsAligned(p.dresidual, p.dresidual_row_stride, p.x_dtype, n) &&
         IsAligned(p.weight, 0, p.weight_dtype, n) && IsAligned(p.layerscale, 0, p.weight_dtype, n);
}

constexpr int kGeneralCtasPerMultiprocessor = 2;

int GeneralCtas(int64_t rows, const DeviceLimits& device) {
  return static_cast<int>(
      std::min<int64_t>(rows, int64_t{kGeneralCtasPerMultiprocessor} * device.multiprocessors));
}

int CountGradients(const LayerNormBackwardParams& p) {
  return (p.dweight != nullptr) + (p.dbias != nullptr) + (p.dlayerscale != nullptr);
}

bool FindForwardTile(const DeviceLimits& device, const LayerNormForwardParams& p, int n,
                     LayerNormTile* tile) {
  const int64_t vec_bytes = n * (DTypeSize(p.x0_dtype) + DTypeSize(p.x_dtype));
  return FindTile<ForwardTile>(device, p.rows, p.cols / n, static_cast<int>(vec_bytes), tile);
}

bool FindBackwardTile(const DeviceLimits& device, const LayerNormBackwardParams& p, int n,
                      LayerNormTile* tile) {
  const int64_t vec_bytes = n * (DTypeSize(p.z_dtype) + 2 * DTypeSize(p.x_dtype));
  tile->num_grads = CountGradients(p);
  return FindTile<BackwardTile>(device, p.rows, p.cols / n, static_cast<int>(vec_bytes), tile);
}

}  // namespace

Status LayerNormForwardCuda(const LayerNormForwardParams& p, void* stream) {
  DeviceLimits device;
  FLASHTRAIN_RETURN_IF_ERROR(GetDeviceLimits(&device));
  if (p.rows == 0) return Status();
  const LayerNormCudaKernels* kernels = FindKernels(p.x0_dtype, p.x_dtype);
  LayerNormTile tile;
  if (kernels != nullptr && IsVectorizable(p, kernels->vec_elements) &&
      FindForwardTile(device, p, kernels->vec_elements, &tile)) {
    return FromCuda(kernels->forward(p, tile, stream), "forward launch");
  }
  const int ctas = GeneralCtas(p.rows, device);
  return FromCuda(LaunchLayerNormForwardGeneral(p, ctas, stream), "forward launch");
}

// The largest of what the paths may use, so that it does not depend on alignment.
int64_t LayerNormBackwardWorkspaceBytesCuda(const LayerNormBackwardParams& p) {
  DeviceLimits device;
  if (!GetDeviceLimits(&device).ok()) return -1;
  int64_t ctas = GeneralCtas(p.rows, device);
  const LayerNormCudaKernels* kernels = FindKernels(p.z_dtype, p.x_dtype);
  LayerNormTile tile;
  if (kernels != nullptr && FindBackwardTile(device, p, kernels->vec_elements, &tile)) {
    ctas = std::max<int64_t>(ctas, tile.ctas);
  }
  return ctas * CountGradients(p) * p.cols * static_cast<int64_t>(sizeof(float));
}

Status LayerNormBackwardCuda(const LayerNormBackwardParams& p, void* stream) {
  DeviceLimits device;
  FLASHTRAIN_RETURN_IF_ERROR(GetDeviceLimits(&device));
  const LayerNormCudaKernels* kernels = FindKernels(p.z_dtype, p.x_dtype);
  LayerNormTile tile;
  if (p.rows == 0) {
    tile.ctas = 0;
  } else if (kernels != nullptr && IsVectorizable(p, kernels->vec_elements) &&
             FindBackwardTile(device, p, kernels->vec_elements, &tile)) {
    FLASHTRAIN_RETURN_IF_ERROR(FromCuda(kernels->backward(p, tile, stream), "backward launch"));
  } else {
    tile.ctas = GeneralCtas(p.rows, device);
    FLASHTRAIN_RETURN_IF_ERROR(
        FromCuda(LaunchLayerNormBackwardGeneral(p, tile.ctas, stream), "backward launch"));
  }
  return FromCuda(LaunchLayerNormReduce(p, tile.ctas, stream), "gradient sum launch");
}

}  // namespace flashtrain
