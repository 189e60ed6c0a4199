// Without a GPU: the kernel's error comes back as a status. With one: the numbers are right.
#include "cc/scaled_norm.h"

#include <cmath>
#include <cstdio>

int main() {
  int devices = 0;
  const bool has_gpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;

  const float x[4] = {1, 2, 3, 4};
  float z[4] = {};
  void* memory = nullptr;  // x and z
  if (has_gpu && cudaMalloc(&memory, 8 * sizeof(float)) != cudaSuccess) return 1;
  float* buffer = static_cast<float*>(memory);
  if (has_gpu) cudaMemcpy(buffer, x, sizeof(x), cudaMemcpyHostToDevice);
  flashtrain::LayerNormForwardParams params;
  params.rows = 1;
  params.cols = 4;
  params.x0 = has_gpu ? buffer : x;
  params.x0_row_stride = 4;
  params.z = has_gpu ? buffer + 4 : z;
  params.z_row_stride = 4;
  const flashtrain::Status status = consumer::ScaledNorm(params, 2.0f, nullptr);
  if (!has_gpu) {
    std::printf("no GPU: %s\n", status.message().c_str());
    return status.ok() || status.message().empty();
  }

  if (!status.ok()) {
    std::fprintf(stderr, "ScaledNorm: %s\n", status.message().c_str());
    return 1;
  }
  cudaMemcpy(z, buffer + 4, sizeof(z), cudaMemcpyDeviceToHost);
  for (int i = 0; i < 4; ++i) {
    const double expected = 2 * (x[i] - 2.5) / std::sqrt(1.25 + 1e-5);
    if (!(std::fabs(z[i] - expected) <= 1e-5)) {
      std::fprintf(stderr, "z[%d] = %.8f, expected %.8f\n", i, z[i], expected);
      return 1;
    }
  }
  return 0;
}
