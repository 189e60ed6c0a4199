// Which kernel runs and on how many threads.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
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

constexpr int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct TileLimits {
  int vecs, max_warps, max_threads, min_ctas;
};

template <template <int> class Tile, int kVecs>
constexpr TileLimits Limits(int max_warps) {
  return {kVecs, max_warps, Tile<kVecs>::kMaxThreads, Tile<kVecs>::kMinCtas};
}

// Bytes of shared memory per vector: its part of a pipeline slot, and its fp32 weight and bias.
struct VecBytes {
  int slot, columns;
};

// The first of `choices` that is wide enough, with up to `max_stages` stages, and how many of
// its CTAs the device holds. False: none is wide enough, or there is no whole vector.
bool FindTile(std::initializer_list<TileLimits> choices, const DeviceLimits& device,
              int64_t vectors, VecBytes bytes, int max_stages, LayerNormTile* tile,
              int* resident_ctas) {
  constexpr int kReservedBytes = 6144;  // of shared memory, per CTA: the system's and static arrays
  if (vectors == 0) return false;
  for (const TileLimits& limits : choices) {
    if (vectors > int64_t{32} * limits.vecs * limits.max_warps) continue;
    tile->vecs = limits.vecs;
    tile->warps = static_cast<int>((vectors + 32 * limits.vecs - 1) / (32 * limits.vecs));
    tile->groups = std::min(limits.max_threads / (32 * tile->warps), LayerNormTile::kMaxGroups);
    const int threads = 32 * tile->warps * tile->groups;
    const int stage_bytes = threads * limits.vecs * bytes.slot;
    const int column_bytes = 32 * tile->warps * limits.vecs * bytes.columns;
    int resident = limits.max_threads * limits.min_ctas / threads;
    resident =
        std::max(1, std::min(resident, device.shared_per_multiprocessor /
                                           (2 * stage_bytes + column_bytes + kReservedBytes)));
    const int budget =
        std::min(device.shared_per_cta, device.shared_per_multiprocessor / resident) -
        kReservedBytes;
    tile->stages = std::min(max_stages, (budget - column_bytes) / stage_bytes);
    if (tile->stages < 1) return false;
    tile->shared_bytes = tile->stages * stage_bytes + column_bytes;
    *resident_ctas = resident * device.multiprocessors;
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

int CountGradients(const LayerNormBackwardParams& p) {
  return (p.dweight != nullptr) + (p.dbias != nullptr) + (p.dlayerscale != nullptr);
}

bool FindForwardTile(const DeviceLimits& device, const LayerNormForwardParams& p, int n,
                     LayerNormTile* tile) {
  const int64_t slot = n * (DTypeSize(p.x0_dtype) + DTypeSize(p.x_dtype));
  const VecBytes bytes = {static_cast<int>(slot), 2 * n * 4};
  int resident = 0;
  if (!FindTile({Limits<ForwardTile, 2>(16), Limits<ForwardTile, 4>(16)}, device, p.cols / n, bytes,
                2, tile, &resident)) {
    return false;
  }
  // Many short-lived CTAs keep the rows in flight close together and even out multiprocessors that
  // fall behind; 8 rows share the reading of the weight. Few rows are spread over all CTAs.
  const int64_t blocks = CeilDivide(p.rows, tile->groups);
  const int64_t max_steps = std::max(2, 8 / tile->groups);
  const int64_t steps = std::clamp<int64_t>(CeilDivide(blocks, resident), 1, max_steps);
  tile->steps = static_cast<int>(steps);
  tile->ctas = static_cast<int>(CeilDivide(blocks, steps));
  return true;
}

bool FindBackwardTile(const DeviceLimits& device, const LayerNormBackwardParams& p, int n,
                      LayerNormTile* tile) {
  const int64_t slot = n * (DTypeSize(p.z_dtype) + 2 * DTypeSize(p.x_dtype));
  const VecBytes bytes = {static_cast<int>(slot), n * 4};
  tile->num_grads = CountGradients(p);
  int resident = 0;
  if (!FindTile(
          {Limits<BackwardTile, 1>(8), Limits<BackwardTile, 2>(16), Limits<BackwardTile, 4>(16)},
          device, p.cols / n, bytes, 3, tile, &resident)) {
    return false;
  }
  tile->ctas = static_cast<int>(std::min<int64_t>(resident, CeilDivide(p.rows, tile->groups)));
  return true;
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
