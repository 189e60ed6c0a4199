// Labels and threads of the CPU path.
#include "flashtrain/cross_entropy/cross_entropy_cpu.h"

#include <algorithm>
#include <string>

#include "flashtrain/common/cpu_isa.h"
#include "flashtrain/common/parallel.h"
#include "flashtrain/cross_entropy/cross_entropy_row.h"

namespace flashtrain {
namespace {

const CrossEntropyCpuKernels& Kernels() {
  switch (GetCpuIsa()) {
    case CpuIsa::kX86_64_V4:
      return kCrossEntropyCpuKernelsV4;
    case CpuIsa::kX86_64_V3:
      return kCrossEntropyCpuKernelsV3;
    case CpuIsa::kBaseline:
      break;
  }
  return kCrossEntropyCpuKernelsBaseline;
}

Status CheckLabels(const CrossEntropyParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    if (ReadLabel(p, row, 0).valid) continue;
    return Status::InvalidArgument(
        "labels[" + std::to_string(row) + "] is " + std::to_string(LabelAt(p, row)) +
        "; a label must be in [0, " + std::to_string(p.num_classes) +
        "), the number of classes, or be ignore_index = " + std::to_string(p.ignore_index));
  }
  return Status();
}

}  // namespace

Status CrossEntropyCpu(const CrossEntropyParams& p, CrossEntropyPass pass) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckLabels(p));
  const CrossEntropyCpuKernels& kernels = Kernels();
  // A task has at least 16 Ki elements: less is not worth waking a thread.
  constexpr int64_t kMinElements = 16384, kMaxTasks = 256;
  const int64_t min_rows = std::max<int64_t>(1, kMinElements / p.cols);
  const int64_t rows_per_task = std::max((p.rows + kMaxTasks - 1) / kMaxTasks, min_rows);
  const int64_t tasks = (p.rows + rows_per_task - 1) / rows_per_task;
  ParallelFor(tasks, [&](int64_t task) {
    const int64_t begin = task * rows_per_task;
    kernels.rows(p, pass, begin, std::min(p.rows, begin + rows_per_task));
  });
  return Status();
}

}  // namespace flashtrain
