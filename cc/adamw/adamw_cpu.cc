// Coefficients and threads of the CPU path.
#include "flashtrain/adamw/adamw_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "flashtrain/common/cpu_isa.h"
#include "flashtrain/common/parallel.h"

namespace flashtrain {
namespace {

const AdamWCpuKernels& Kernels() {
  switch (GetCpuIsa()) {
    case CpuIsa::kX86_64_V4:
      return kAdamWCpuKernelsV4;
    case CpuIsa::kX86_64_V3:
      return kAdamWCpuKernelsV3;
    case CpuIsa::kBaseline:
      break;
  }
  return kAdamWCpuKernelsBaseline;
}

float ReadOr(const float* ptr, float otherwise) { return ptr == nullptr ? otherwise : *ptr; }

// The same operations in the same precisions as on CUDA.
AdamWCpuCoefficients ComputeCoefficients(const AdamWParams& p, const AdamWTensor& tensor) {
  const AdamWGroup& group = p.groups[tensor.group];
  const float scale = ReadOr(p.grad_scale, 1.0f);
  const float norm = ReadOr(p.grad_norm, 0.0f) / scale;
  const float clip = std::min(1.0f, static_cast<float>(p.max_norm) / (norm + 1e-6f));
  const float lr = ReadOr(group.lr_on_device, static_cast<float>(group.lr));
  const double step = static_cast<double>(*tensor.step) + 1.0;
  AdamWCpuCoefficients c;
  c.grad_factor = clip / scale;
  c.decay = 1.0f - lr * static_cast<float>(group.weight_decay);
  c.beta1_complement = static_cast<float>(1.0 - group.beta1);
  c.beta2 = static_cast<float>(group.beta2);
  c.beta2_complement = static_cast<float>(1.0 - group.beta2);
  c.step_size = static_cast<float>(lr / (1.0 - std::pow(group.beta1, step)));
  c.inverse_sqrt_correction2 =
      static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(group.beta2, step)));
  c.eps = static_cast<float>(group.eps);
  return c;
}

// Pieces of all tensors, at most `size` elements each, in order.
struct Chunk {
  int64_t tensor, begin, end;
};

template <typename Tensor>
std::vector<Chunk> MakeChunks(const Tensor* tensors, int64_t count, int64_t size) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].grad == nullptr) continue;
    for (int64_t begin = 0; begin < tensors[i].numel; begin += size) {
      chunks.push_back({i, begin, std::min(tensors[i].numel, begin + size)});
    }
  }
  return chunks;
}

// Runs task(i) for every chunk, several small ones at a time: less than 16 Ki elements are not
// worth waking a thread.
template <typename Task>
void ForChunks(const std::vector<Chunk>& chunks, Task task) {
  constexpr int64_t kMinElements = 16384;
  std::vector<int64_t> starts;
  int64_t elements = kMinElements;
  for (int64_t i = 0; i < static_cast<int64_t>(chunks.size()); ++i) {
    if (elements >= kMinElements) {
      starts.push_back(i);
      elements = 0;
    }
    elements += chunks[i].end - chunks[i].begin;
  }
  starts.push_back(static_cast<int64_t>(chunks.size()));
  ParallelFor(static_cast<int64_t>(starts.size()) - 1, [&](int64_t run) {
    for (int64_t i = starts[run]; i < starts[run + 1]; ++i) task(i);
  });
}

}  // namespace

void AdamWStepCpu(const AdamWParams& p) {
  const float norm = ReadOr(p.grad_norm, 0.0f), scale = ReadOr(p.grad_scale, 1.0f);
  const bool has_scale = std::isfinite(scale) && scale != 0.0f;
  if (!std::isfinite(norm) || !has_scale || ReadOr(p.skip, 0.0f) != 0.0f) {
    if (p.skipped_steps != nullptr) ++*p.skipped_steps;
    return;
  }
  std::vector<AdamWCpuCoefficients> coefficients(p.num_tensors);
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    if (p.tensors[i].grad != nullptr) coefficients[i] = ComputeCoefficients(p, p.tensors[i]);
  }
  constexpr int64_t kChunk = 32768;
  const std::vector<Chunk> chunks = MakeChunks(p.tensors, p.num_tensors, kChunk);
  const AdamWCpuKernels& kernels = Kernels();
  ForChunks(chunks, [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    kernels.update(p.tensors[chunk.tensor], coefficients[chunk.tensor], chunk.begin, chunk.end);
  });
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    if (p.tensors[i].grad != nullptr) *p.tensors[i].step += 1.0f;
  }
}

void GradNormCpu(const GradNormParams& p) {
  const std::vector<Chunk> chunks = MakeChunks(p.tensors, p.num_tensors, kGradNormChunk);
  double* partials = static_cast<double*>(p.workspace);
  const AdamWCpuKernels& kernels = Kernels();
  ForChunks(chunks, [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    partials[i] = kernels.sum_of_squares(p.tensors[chunk.tensor], chunk.begin, chunk.end);
  });
  double sum = 0.0;
  for (size_t i = 0; i < chunks.size(); ++i) sum += partials[i];
  *p.norm = static_cast<float>(std::sqrt(sum));
}

}  // namespace flashtrain
