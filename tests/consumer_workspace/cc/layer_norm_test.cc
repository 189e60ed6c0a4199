// Calls flashtrain's CPU kernel; also that each repository's cc/layer_norm/layer_norm.h is found as
// its own.
#include "flashtrain/layer_norm/layer_norm.h"

#include <cmath>
#include <cstdio>
#include <cstring>

#include "cc/layer_norm/layer_norm.h"

int main() {
  if (std::strcmp(consumer::kLayerNormOwner, "consumer") != 0) return 1;

  const float x[4] = {1, 2, 3, 4};
  float z[4] = {};
  flashtrain::LayerNormForwardParams params;
  params.rows = 1;
  params.cols = 4;
  params.x0 = x;
  params.x0_row_stride = 4;
  params.z = z;
  params.z_row_stride = 4;
  const flashtrain::Status status =
      flashtrain::LayerNormForward(params, flashtrain::Device::Cpu(), nullptr);
  if (!status.ok()) {
    std::fprintf(stderr, "LayerNormForward: %s\n", status.message().c_str());
    return 1;
  }

  // mean 2.5, variance 1.25, epsilon 1e-5
  for (int i = 0; i < 4; ++i) {
    const double expected = (x[i] - 2.5) / std::sqrt(1.25 + 1e-5);
    if (!(std::fabs(z[i] - expected) <= 1e-6)) {
      std::fprintf(stderr, "z[%d] = %.8f, expected %.8f\n", i, z[i], expected);
      return 1;
    }
  }

  params.cols = -1;
  if (flashtrain::LayerNormForward(params, flashtrain::Device::Cpu(), nullptr).ok()) {
    std::fprintf(stderr, "cols = -1 was accepted\n");
    return 1;
  }
  return 0;
}
