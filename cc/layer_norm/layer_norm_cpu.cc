// Threads and workspace of the CPU path.
#include "flashtrain/layer_norm/layer_norm_cpu.h"

#include <algorithm>

#include "flashtrain/common/cpu_isa.h"
#include "flashtrain/common/parallel.h"

namespace flashtrain {
namespace {

const LayerNormCpuKernels& Kernels() {
  switch (GetCpuIsa()) {
    case CpuIsa::kX86_64_V4:
      return kLayerNormCpuKernelsV4;
    case CpuIsa::kX86_64_V3:
      return kLayerNormCpuKernelsV3;
    case CpuIsa::kBaseline:
      break;
  }
  return kLayerNormCpuKernelsBaseline;
}

constexpr int64_t kMaxTasks = 64;

// Rows are shared out in tasks of equal size, a function of the shape alone, so that sums over rows
// do not depend on the number of threads. A task has at least 16 Ki elements: less is not worth
// waking a thread, nor a partial of each weight gradient.
struct RowTasks {
  int64_t count, rows_per_task;

  RowTasks(int64_t rows, int64_t cols) {
    constexpr int64_t kMinElements = 16384;
    const int64_t min_rows = std::max<int64_t>(1, kMinElements / cols);
    rows_per_task = std::max((rows + kMaxTasks - 1) / kMaxTasks, min_rows);
    count = (rows + rows_per_task - 1) / rows_per_task;
  }
};

// The weight gradients that are wanted, each with one [cols] partial per task in the workspace.
struct WantedGradients {
  void* grad[3];
  int64_t count = 0;
  int index[3] = {-1, -1, -1};  // of dweight, dbias, dlayerscale in grad; -1: not wanted

  explicit WantedGradients(const LayerNormBackwardParams& p) {
    void* all[3] = {p.dweight, p.dbias, p.dlayerscale};
    for (int i = 0; i < 3; ++i) {
      if (all[i] == nullptr) continue;
      index[i] = static_cast<int>(count);
      grad[count++] = all[i];
    }
  }
};

}  // namespace

void LayerNormForwardCpu(const LayerNormForwardParams& p) {
  const LayerNormCpuKernels& kernels = Kernels();
  const RowTasks tasks(p.rows, p.cols);
  ParallelFor(tasks.count, [&](int64_t task) {
    const int64_t begin = task * tasks.rows_per_task;
    const int64_t end = std::min(p.rows, begin + tasks.rows_per_task);
    kernels.forward_rows(p, begin, end, ThreadScratch(3 * p.cols));
  });
}

int64_t LayerNormBackwardWorkspaceBytesCpu(const LayerNormBackwardParams& p) {
  return RowTasks(p.rows, p.cols).count * WantedGradients(p).count * p.cols *
         static_cast<int64_t>(sizeof(double));
}

void LayerNormBackwardCpu(const LayerNormBackwardParams& p) {
  const LayerNormCpuKernels& kernels = Kernels();
  const RowTasks tasks(p.rows, p.cols);
  const WantedGradients wanted(p);
  double* partials = static_cast<double*>(p.workspace);  // [tasks, wanted, cols]
  const int64_t task_stride = wanted.count * p.cols;
  // The error of a sum grows with its longest chain of fp32 additions: kGroup, however many rows.
  constexpr int64_t kGroup = 32;
  ParallelFor(tasks.count, [&](int64_t task) {
    const int64_t begin = task * tasks.rows_per_task;
    const int64_t end = std::min(p.rows, begin + tasks.rows_per_task);
    double* mine = partials + task * task_stride;
    float* scratch = ThreadScratch(p.cols + task_stride);
    float* sums = scratch + p.cols;
    float* sum[3];
    for (int i = 0; i < 3; ++i) {
      sum[i] = wanted.index[i] < 0 ? nullptr : sums + wanted.index[i] * p.cols;
    }
    for (int64_t first = begin; first < end; first += kGroup) {
      std::fill_n(sums, task_stride, 0.0f);
      const int64_t last = std::min(end, first + kGroup);
      kernels.backward_rows(p, first, last, sum[0], sum[1], sum[2], scratch);
      if (first == begin) {
        std::copy_n(sums, task_stride, mine);
      } else {
        kernels.add_sums(sums, task_stride, mine);
      }
    }
  });
  constexpr int64_t kColsPerTask = 4096;
  const int64_t col_tasks = (p.cols + kColsPerTask - 1) / kColsPerTask;
  ParallelFor(wanted.count * col_tasks, [&](int64_t task) {
    const int64_t i = task / col_tasks, begin = task % col_tasks * kColsPerTask;
    kernels.reduce_columns(partials + i * p.cols, tasks.count, task_stride, begin,
                           std::min(p.cols, begin + kColsPerTask), wanted.grad[i], p.weight_dtype);
  });
}

}  // namespace flashtrain
