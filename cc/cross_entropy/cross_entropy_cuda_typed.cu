// The kernels of one dtype, compiled once for each: FLASHTRAIN_A is the C++ type,
// FLASHTRAIN_TABLE the name of the table.
#include "flashtrain/common/shared_memory.cuh"
#include "flashtrain/cross_entropy/cross_entropy_kernel.cuh"

namespace flashtrain {
namespace {

using T = FLASHTRAIN_A;

template <CrossEntropyPass kPass, bool kKeep>
int LaunchPass(const CrossEntropyParams& p, const CrossEntropyLaunch& launch, void* stream) {
  constexpr CrossEntropyTile kTile = CrossEntropyTileOf(kPass, kKeep);
  constexpr auto kKernel =
      cross_entropy_kernel<T, kPass, kKeep, kTile.unroll, kTile.max_threads, kTile.min_ctas>;
  const cudaError_t error = AllowSharedMemory<kKernel>(launch.shared_bytes);
  if (error != cudaSuccess) return error;
  kKernel<<<launch.ctas, launch.threads, launch.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      p);
  return cudaGetLastError();
}

int Launch(const CrossEntropyParams& p, CrossEntropyPass pass, const CrossEntropyLaunch& launch,
           void* stream) {
  switch (pass) {
    case CrossEntropyPass::kForward:
      return LaunchPass<CrossEntropyPass::kForward, false>(p, launch, stream);
    case CrossEntropyPass::kBackward:
      return LaunchPass<CrossEntropyPass::kBackward, false>(p, launch, stream);
    case CrossEntropyPass::kForwardBackward:
      break;
  }
  if (launch.shared_bytes > 0) {
    return LaunchPass<CrossEntropyPass::kForwardBackward, true>(p, launch, stream);
  }
  return LaunchPass<CrossEntropyPass::kForwardBackward, false>(p, launch, stream);
}

}  // namespace

const CrossEntropyCudaKernels FLASHTRAIN_TABLE = {Launch};

}  // namespace flashtrain
