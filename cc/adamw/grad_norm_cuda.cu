// The launches of the norm.
#include <cuda_runtime.h>

#include <string>

#include "flashtrain/adamw/grad_norm_kernel.cuh"
#include "flashtrain/common/cuda_host.h"

namespace flashtrain {
namespace {

constexpr int kThreads = 512, kUnroll = 2, kFinishThreads = 1024;

// The tensors that are collected for the next launch, and where its partial sums go.
struct Batch {
  GradNormLaunch launch = {};
  int64_t chunks = 0;        // of this launch
  int64_t total_chunks = 0;  // of those before

  Status Launch(cudaStream_t stream) {
    if (chunks > 0) {
      grad_norm_kernel<kThreads, kGradNormChunk, kUnroll>
          <<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(launch);
      FLASHTRAIN_RETURN_IF_ERROR(FromCuda(cudaGetLastError(), "GradNorm", "launch"));
    }
    total_chunks += chunks;
    launch.partials += chunks;
    launch.num_tensors = 0;
    chunks = 0;
    return Status();
  }
};

}  // namespace

Status GradNormCuda(const GradNormParams& p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  constexpr int64_t kMaxChunks = (int64_t{1} << 31) - 1;
  Batch batch;
  batch.launch.partials = static_cast<double*>(p.workspace);
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    const GradNormTensor& t = p.tensors[i];
    if (t.numel == 0) continue;
    const int64_t chunks = CeilDivide(t.numel, kGradNormChunk);
    if (chunks > kMaxChunks) {
      return Status::InvalidArgument("tensors[" + std::to_string(i) + "].numel is " +
                                     std::to_string(t.numel) + "; supported: fewer than 2^46");
    }
    const bool full = batch.launch.num_tensors == GradNormLaunch::kMaxTensors;
    if (full || batch.chunks > kMaxChunks - chunks) {
      FLASHTRAIN_RETURN_IF_ERROR(batch.Launch(cuda_stream));
    }
    GradNormRecord& record = batch.launch.tensors[batch.launch.num_tensors++];
    record = {t.grad, t.numel, static_cast<int32_t>(batch.chunks), t.dtype,
              IsAlignedTo(t.grad, 16)};
    batch.chunks += chunks;
  }
  FLASHTRAIN_RETURN_IF_ERROR(batch.Launch(cuda_stream));
  grad_norm_finish_kernel<kFinishThreads><<<1, kFinishThreads, 0, cuda_stream>>>(
      static_cast<const double*>(p.workspace), batch.total_chunks, p.norm);
  return FromCuda(cudaGetLastError(), "GradNorm", "launch");
}

}  // namespace flashtrain
