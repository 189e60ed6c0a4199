// Which kernel runs and on how many threads.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "flashtrain/cross_entropy/cross_entropy_cuda.h"

namespace flashtrain {
namespace {

Status FromCuda(int error, const char* what) {
  if (error == cudaSuccess) return Status();
  const std::string message = std::string("cross_entropy: ") + what +
                              " failed: " + cudaGetErrorString(static_cast<cudaError_t>(error));
  const bool no_device = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver;
  return no_device ? Status::Unavailable(message) : Status::Internal(message);
}

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
  int device = 0, multiprocessors = 0, shared_per_cta = 0, shared_per_multiprocessor = 0;
  FLASHTRAIN_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device), "cudaGetDevice"));
  const std::pair<cudaDeviceAttr, int*> wanted[] = {
      {cudaDevAttrMultiProcessorCount, &multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_per_cta},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared_per_multiprocessor}};
  for (const auto& [attribute, value] : wanted) {
    FLASHTRAIN_RETURN_IF_ERROR(
        FromCuda(cudaDeviceGetAttribute(value, attribute, device), "cudaDeviceGetAttribute"));
  }
  const int64_t bytes = std::max<int64_t>(vecs, 1) * kVecBytes;
  if (bytes + kReservedBytes > shared_per_cta) return Status();
  launch->threads = ThreadsFor(tile, vecs);
  launch->shared_bytes = static_cast<int>(bytes);
  const int by_memory = shared_per_multiprocessor / (launch->shared_bytes + kReservedBytes);
  const int by_registers = tile.max_threads * tile.min_ctas / launch->threads;
  launch->ctas =
      std::min(launch->ctas, std::min({by_memory, by_registers, kMaxCtas}) * multiprocessors);
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
  return FromCuda(Kernels(p.dtype).launch(p, pass, launch, stream), "launch");
}

}  // namespace flashtrain
