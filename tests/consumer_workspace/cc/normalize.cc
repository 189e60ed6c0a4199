// Prints the LayerNorm of the numbers given as arguments.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "flashtrain/layer_norm/layer_norm.h"

int main(int argc, char** argv) {
  std::vector<float> x;
  for (int i = 1; i < argc; ++i) x.push_back(std::strtof(argv[i], nullptr));
  std::vector<float> z(x.size());

  flashtrain::LayerNormForwardParams params;
  params.rows = 1;
  params.cols = static_cast<int64_t>(x.size());
  params.x0 = x.data();
  params.x0_row_stride = params.cols;
  params.z = z.data();
  params.z_row_stride = params.cols;
  const flashtrain::Status status =
      flashtrain::LayerNormForward(params, flashtrain::Device::Cpu(), nullptr);
  if (!status.ok()) {
    std::fprintf(stderr, "normalize: %s\n", status.message().c_str());
    return 1;
  }
  for (float value : z) std::printf("%.4f\n", value);
  return 0;
}
