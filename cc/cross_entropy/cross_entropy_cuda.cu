// Which kernel runs and on how many threads.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "flashtrain/common/cuda_host.h"
#include "flashtrain/cross_entropy/cross_entropy_cuda.h"

namespace flashtrain {
namespace {

constexpr char kOp[] = "cross_entropy";

const CrossEntropyCudaKernels& Kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return kCrossEntropyFloat16;
    case DType::kBFloat16:
      return kCrossEntropyBFloat16;
    default:
      return kCrossEntropyFloat32;
  }
}

constexpr int64_t kVecBytes = 16;

int ThreadsFor(const CrossEntropyTile& tile, int64_t vecs) {
  constexpr int64_t kWarp = 32;
  return static_cast<int>(
      std::clamp<int64_t>(vecs / tile.unroll / kWarp * kWarp, kWarp, tile.max_threads));
}

// Keeps the row in shared memory, in as many CTAs as the device holds at once, if it fits.
Status KeepRow(const CrossEntropyTile& tile, int64_t vecs, CrossEntropyLaunch* launch) {
  constexpr int kReservedBytes = 2048;  // of shared memory, per CTA: the system's and static arrays
  constexpr int kMaxCtas = 32;          // of a multiprocessor
  DeviceLimits device;
  FLASHTRAIN_RETURN_IF_ERROR(GetDeviceLimits(kOp, &device));
  const int64_t bytes = std::max<int64_t>(vecs, 1) * kVecBytes;
  if (bytes + kReservedBytes > device.shared_per_cta) return Status();
  launch->threads = ThreadsFor(tile, vecs);
  launch->shared_bytes = static_cast<int>(bytes);
  const int by_memory = device.shared_per_multiprocessor / (launch->shared_bytes + kReservedBytes);
  const int by_registers = tile.max_threads * tile.min_ctas / launch->threads;
  launch->ctas = std::min(launch->ctas,
                          std::min({by_memory, by_registers, kMaxCtas}) * device.multiprocessors);
  return Status();
}

}  // namespace

Status CrossEntropyCuda(const CrossEntropyParams& p, CrossEntropyPass pass, void* stream) {
  if (p.rows == 0) return Status();
  constexpr int64_t kMaxCtas = 0x7FFFFFFF;
  const int64_t vecs = p.cols * DTypeSize(p.dtype) / kVecBytes;
  CrossEntropyLaunch launch;
  launch.ctas = static_cast<int>(std::min(p.rows, kMaxCtas));
  launch.threads = ThreadsFor(CrossEntropyTileOf(pass, /*keep=*/false), vecs);
  if (pass == CrossEntropyPass::kForwardBackward) {
    FLASHTRAIN_RETURN_IF_ERROR(KeepRow(CrossEntropyTileOf(pass, /*keep=*/true), vecs, &launch));
  }
  return FromCuda(Kernels(p.dtype).launch(p, pass, launch, stream), kOp, "launch");
}

}  // namespace flashtrain
