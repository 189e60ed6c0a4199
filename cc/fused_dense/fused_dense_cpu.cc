// Threads and workspace of the CPU path.
#include "flashtrain/fused_dense/fused_dense_cpu.h"

#include <algorithm>

#include "flashtrain/common/cpu_isa.h"
#include "flashtrain/common/parallel.h"

namespace flashtrain {
namespace {

const DenseActivationCpuKernels& Kernels() {
  switch (GetCpuIsa()) {
    case CpuIsa::kX86_64_V4:
      return kDenseActivationCpuKernelsV4;
    case CpuIsa::kX86_64_V3:
      return kDenseActivationCpuKernelsV3;
    case CpuIsa::kBaseline:
      break;
  }
  return kDenseActivationCpuKernelsBaseline;
}

// Rows are shared out in tasks of equal size, a function of the shape alone, so that sums over rows
// do not depend on the number of threads. A task has at least 16 Ki elements: less is not worth
// waking a thread, nor a partial of dbias.
struct RowTasks {
  int64_t count, rows_per_task;

  RowTasks(int64_t rows, int64_t cols) {
    constexpr int64_t kMaxTasks = 64, kMinElements = 16384;
    const int64_t min_rows = std::max<int64_t>(1, kMinElements / cols);
    rows_per_task = std::max((rows + kMaxTasks - 1) / kMaxTasks, min_rows);
    count = (rows + rows_per_task - 1) / rows_per_task;
  }
};

}  // namespace

void DenseActivationForwardCpu(const DenseActivationForwardParams& p) {
  const DenseActivationCpuKernels& kernels = Kernels();
  const RowTasks tasks(p.rows, p.cols);
  ParallelFor(tasks.count, [&](int64_t task) {
    const int64_t begin = task * tasks.rows_per_task;
    kernels.forward_rows(p, begin, std::min(p.rows, begin + tasks.rows_per_task));
  });
}

int64_t DenseActivationBackwardWorkspaceBytesCpu(const DenseActivationBackwardParams& p) {
  if (p.dbias == nullptr) return 0;
  return RowTasks(p.rows, p.cols).count * p.cols * static_cast<int64_t>(sizeof(double));
}

void DenseActivationBackwardCpu(const DenseActivationBackwardParams& p) {
  const DenseActivationCpuKernels& kernels = Kernels();
  const RowTasks tasks(p.rows, p.cols);
  double* partials = p.dbias == nullptr ? nullptr : static_cast<double*>(p.workspace);
  ParallelFor(tasks.count, [&](int64_t task) {
    const int64_t begin = task * tasks.rows_per_task;
    double* mine = partials == nullptr ? nullptr : partials + task * p.cols;
    if (mine != nullptr) std::fill_n(mine, p.cols, 0.0);
    kernels.backward_rows(p, begin, std::min(p.rows, begin + tasks.rows_per_task), mine);
  });
  if (p.dbias == nullptr) return;
  constexpr int64_t kColsPerTask = 4096;
  ParallelFor((p.cols + kColsPerTask - 1) / kColsPerTask, [&](int64_t task) {
    const int64_t begin = task * kColsPerTask;
    kernels.reduce_columns(p, partials, tasks.count, begin, std::min(p.cols, begin + kColsPerTask));
  });
}

}  // namespace flashtrain
