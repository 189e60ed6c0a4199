// The kernels of one dtype, compiled once per dtype: FLASHTRAIN_A is the C++ type, FLASHTRAIN_TABLE
// the name of the table.
#include "flashtrain/rotary/rotary_kernel.cuh"

namespace flashtrain {
namespace {

using T = FLASHTRAIN_A;

template <int kPairs>
int LaunchKernel(const RotaryParams& p, const RotaryTile& tile, void* stream) {
  const dim3 grid(static_cast<unsigned>(tile.grid_tokens), static_cast<unsigned>(tile.grid_groups),
                  static_cast<unsigned>(tile.grid_slices));
  const dim3 cta(tile.cta_slices, tile.cta_groups, tile.cta_tokens);
  rotary_kernel<T, kPairs, kRotaryHeadsPerThread>
      <<<grid, cta, 0, static_cast<cudaStream_t>(stream)>>>(p, tile);
  return cudaGetLastError();
}

int Launch(const RotaryParams& p, const RotaryTile& tile, int pairs, void* stream) {
  switch (pairs * static_cast<int>(sizeof(T))) {
    case 16:
      return LaunchKernel<16 / sizeof(T)>(p, tile, stream);
    case 8:
      return LaunchKernel<8 / sizeof(T)>(p, tile, stream);
    default:
      return LaunchKernel<1>(p, tile, stream);
  }
}

}  // namespace

const RotaryCudaKernels FLASHTRAIN_TABLE = {Launch};

}  // namespace flashtrain
