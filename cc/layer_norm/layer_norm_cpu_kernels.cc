// One thread's share of the CPU path. Compiled once per instruction set: FLASHTRAIN_CPU_ISA_NAME is
// Baseline, V3 or V4. Rows are handled in blocks of columns that stay in the first-level cache;
// dtypes are run-time, since a block's conversion costs little beside its memory traffic.
#include <cmath>
#include <cstdint>

#include "flashtrain/common/cpu_row.h"
#include "flashtrain/layer_norm/layer_norm_cpu.h"

namespace flashtrain {
namespace {

constexpr int64_t kBlock = 512;  // columns; a multiple of 64 (DropoutRow)

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

inline void MultiplyBy(float* __restrict__ x, const float* __restrict__ factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor[i];
}

inline void MultiplyBy(float* __restrict__ x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

inline void Add(float* __restrict__ x, const float* __restrict__ y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

inline void MultiplyAdd(float* __restrict__ sum, const float* __restrict__ a,
                        const float* __restrict__ b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += a[i] * b[i];
}

// A block of `weight`, 1 added where zero-centred; ones where there is no weight.
inline const float* LoadWeight(const void* weight, DType dtype, bool zero_centered, int64_t col,
                               int64_t n, float* __restrict__ buffer) {
  if (weight != nullptr && !zero_centered) return LoadFloat(weight, dtype, col, n, buffer);
  if (weight == nullptr) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = 1.0f;
    return buffer;
  }
  const float* w = LoadFloat(weight, dtype, col, n, buffer);
  for (int64_t i = 0; i < n; ++i) buffer[i] = 1.0f + w[i];
  return buffer;
}

// The dropout and scale settings that forward and backward share.
template <typename Params>
struct Scales {
  const Params& p;
  float keep_scale = 1.0f / (1.0f - p.dropout_p);

  explicit Scales(const Params& params) : p(params) {}

  // x = x * rowscale * keep * layerscale, in that order. `keep` is filled when dropout is on.
  inline void Apply(int64_t row, int64_t col, int64_t n, float* x, float* keep) const {
    if (p.rowscale != nullptr) MultiplyBy(x, LoadFloat1(p.rowscale, p.rowscale_dtype, row), n);
    if (p.dropout_p > 0.0f) {
      DropoutRow(p.rng_state, p.dropout_p, keep_scale, row, col, n, keep);
      MultiplyBy(x, keep, n);
    }
    if (p.layerscale != nullptr) {
      float buffer[kBlock];
      MultiplyBy(x, LoadFloat(p.layerscale, p.weight_dtype, col, n, buffer), n);
    }
  }
};

// Writes x and the mask where wanted. Returns a row's x in fp32: x0 or x itself, or in `scratch`.
const float* ForwardSum(const LayerNormForwardParams& p,
                        const Scales<LayerNormForwardParams>& scales, int64_t row, float* scratch,
                        LaneSum* sum) {
  const bool scaled = p.rowscale != nullptr || p.dropout_p > 0.0f || p.layerscale != nullptr;
  const bool is_x0 = !scaled && p.residual == nullptr;  // x is x0
  const bool in_place = is_x0 && p.x0_dtype == DType::kFloat32;
  float* const fp32_x = p.x != nullptr && p.x_dtype == DType::kFloat32 && !in_place
                            ? static_cast<float*>(p.x) + row * p.x_row_stride
                            : nullptr;
  float* const sum_row = fp32_x != nullptr ? fp32_x : scratch;
  const float* const x_row =
      in_place ? static_cast<const float*>(p.x0) + row * p.x0_row_stride : sum_row;
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    float buffer[kBlock], keep[kBlock];
    if (!in_place) {
      float* __restrict__ x = sum_row + col;
      const float* loaded = LoadFloat(p.x0, p.x0_dtype, row * p.x0_row_stride + col, n, x);
      if (scaled) {
        if (loaded != x) std::memcpy(x, loaded, n * sizeof(float));
        scales.Apply(row, col, n, x, keep);
        loaded = x;
      }
      if (p.residual != nullptr) {
        const float* __restrict__ residual =
            LoadFloat(p.residual, p.x_dtype, row * p.residual_row_stride + col, n, buffer);
        if (loaded == x) {
          Add(x, residual, n);
        } else {
          for (int64_t i = 0; i < n; ++i) x[i] = loaded[i] + residual[i];
        }
      }
    }
    const float* x = x_row + col;
    if (p.x != nullptr && fp32_x == nullptr) {
      StoreFloat(x, n, p.x, p.x_dtype, row * p.x_row_stride + col);
    }
    if (!is_x0 && p.x_dtype != DType::kFloat32) {  // rounded: "Numerics" in layer_norm.h
      if (p.x == nullptr) {
        RoundRow(p.x_dtype, n, scratch + col);
      } else {
        LoadFloat(p.x, p.x_dtype, row * p.x_row_stride + col, n, scratch + col);
      }
    }
    sum->Add(n, [x](int64_t i) { return x[i]; });
    if (p.dropout_mask != nullptr) {
      uint8_t* __restrict__ mask = p.dropout_mask + row * p.cols + col;
      for (int64_t i = 0; i < n; ++i) mask[i] = p.dropout_p == 0.0f || keep[i] != 0.0f;
    }
  }
  return x_row;
}

void ForwardRow(const LayerNormForwardParams& p, const Scales<LayerNormForwardParams>& scales,
                int64_t row, float* scratch) {
  LaneSum sum;
  const float* __restrict__ x = ForwardSum(p, scales, row, scratch, &sum);
  const float mean = p.is_rms_norm ? 0.0f : sum.Total() / p.cols;
  LaneSum squares;
  squares.Add(p.cols, [x, mean](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  const float rstd = 1.0f / std::sqrt(squares.Total() / p.cols + p.epsilon);
  if (p.mean != nullptr) p.mean[row] = mean;
  if (p.rstd != nullptr) p.rstd[row] = rstd;
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    float weight_buffer[kBlock], bias_buffer[kBlock], z_buffer[kBlock];
    const int64_t z_offset = row * p.z_row_stride + col;
    // fp32 results go straight to z.
    float* __restrict__ z =
        p.z_dtype == DType::kFloat32 ? static_cast<float*>(p.z) + z_offset : z_buffer;
    const float* __restrict__ w =
        LoadWeight(p.weight, p.weight_dtype, p.zero_centered_weight, col, n, weight_buffer);
    if (p.bias != nullptr) {
      const float* __restrict__ b = LoadFloat(p.bias, p.weight_dtype, col, n, bias_buffer);
      for (int64_t i = 0; i < n; ++i) z[i] = (x[col + i] - mean) * rstd * w[i] + b[i];
    } else {
      for (int64_t i = 0; i < n; ++i) z[i] = (x[col + i] - mean) * rstd * w[i];
    }
    if (z == z_buffer) StoreFloat(z, n, p.z, p.z_dtype, z_offset);
  }
}

void ForwardRows(const LayerNormForwardParams& p, int64_t begin, int64_t end, float* scratch) {
  const Scales<LayerNormForwardParams> scales(p);
  for (int64_t row = begin; row < end; ++row) ForwardRow(p, scales, row, scratch);
}

struct WeightGradients {
  float* dweight;
  float* dbias;
  float* dlayerscale;
};

// First pass of backward over a row. With xhat = (x - mean) * rstd and wdz = weight * dz, leaves
// them in xhat_row and wdz_row, adds to dweight and dbias, and sums xhat * wdz and wdz.
void BackwardSums(const LayerNormBackwardParams& p, int64_t row, const WeightGradients& grads,
                  float* xhat_row, float* wdz_row, LaneSum* xhat_wdz, LaneSum* wdz_sum) {
  const float mean = p.is_rms_norm ? 0.0f : p.mean[row];
  const float rstd = p.rstd[row];
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    float dz_buffer[kBlock], x_buffer[kBlock], weight_buffer[kBlock];
    const float* __restrict__ dz =
        LoadFloat(p.dz, p.z_dtype, row * p.dz_row_stride + col, n, dz_buffer);
    const float* __restrict__ x =
        LoadFloat(p.x, p.x_dtype, row * p.x_row_stride + col, n, x_buffer);
    const float* __restrict__ w =
        LoadWeight(p.weight, p.weight_dtype, p.zero_centered_weight, col, n, weight_buffer);
    float* __restrict__ xhat = xhat_row + col;
    float* __restrict__ wdz = wdz_row + col;
    for (int64_t i = 0; i < n; ++i) {
      xhat[i] = (x[i] - mean) * rstd;
      wdz[i] = dz[i] * w[i];
    }
    if (grads.dweight != nullptr) MultiplyAdd(grads.dweight + col, dz, xhat, n);
    if (grads.dbias != nullptr) Add(grads.dbias + col, dz, n);
    xhat_wdz->Add(n, [xhat, wdz](int64_t i) { return xhat[i] * wdz[i]; });
    if (!p.is_rms_norm) wdz_sum->Add(n, [wdz](int64_t i) { return wdz[i]; });
  }
}

void BackwardRow(const LayerNormBackwardParams& p, const Scales<LayerNormBackwardParams>& scales,
                 int64_t row, const WeightGradients& grads, float* scratch) {
  float* xhat_row = scratch;
  float* wdz_row = scratch + p.cols;
  LaneSum xhat_wdz, wdz_sum;
  BackwardSums(p, row, grads, xhat_row, wdz_row, &xhat_wdz, &wdz_sum);
  const float c1 = xhat_wdz.Total() / p.cols, c2 = wdz_sum.Total() / p.cols;
  const float rstd = p.rstd[row];
  const bool scaled = p.rowscale != nullptr || p.dropout_p > 0.0f || p.layerscale != nullptr;
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    float buffer[kBlock], keep[kBlock];
    const float* __restrict__ xhat = xhat_row + col;
    float* __restrict__ g = wdz_row + col;  // gradient of x, in place
    for (int64_t i = 0; i < n; ++i) g[i] = rstd * (g[i] - c2 - xhat[i] * c1);
    if (p.dx != nullptr)
      Add(g, LoadFloat(p.dx, p.x_dtype, row * p.dx_row_stride + col, n, buffer), n);
    if (p.dresidual != nullptr) {
      StoreFloat(g, n, p.dresidual, p.x_dtype, row * p.dresidual_row_stride + col);
    }
    if (grads.dlayerscale != nullptr) {
      // layerscale's gradient is g times x0 as scaled before layerscale.
      float product[kBlock];
      const float* x0 = LoadFloat(p.x0, p.x0_dtype, row * p.x0_row_stride + col, n, buffer);
      std::memcpy(product, x0, n * sizeof(float));
      LayerNormBackwardParams before_layerscale = p;
      before_layerscale.layerscale = nullptr;
      Scales<LayerNormBackwardParams>(before_layerscale).Apply(row, col, n, product, keep);
      MultiplyAdd(grads.dlayerscale + col, g, product, n);
    }
    if (p.dx0 == nullptr) continue;
    if (scaled) scales.Apply(row, col, n, g, keep);
    StoreFloat(g, n, p.dx0, p.x0_dtype, row * p.dx0_row_stride + col);
  }
}

void BackwardRows(const LayerNormBackwardParams& p, int64_t begin, int64_t end, float* dweight,
                  float* dbias, float* dlayerscale, float* scratch) {
  const Scales<LayerNormBackwardParams> scales(p);
  const WeightGradients grads = {dweight, dbias, dlayerscale};
  for (int64_t row = begin; row < end; ++row) BackwardRow(p, scales, row, grads, scratch);
}

void AddSums(const float* __restrict__ sums, int64_t n, double* __restrict__ totals) {
  for (int64_t i = 0; i < n; ++i) totals[i] += sums[i];
}

void ReduceColumns(const double* partials, int64_t count, int64_t stride, int64_t begin,
                   int64_t end, void* grad, DType dtype) {
  for (int64_t col = begin; col < end; col += kBlock) {
    const int64_t n = Min(kBlock, end - col);
    double sum[kBlock] = {};
    for (int64_t k = 0; k < count; ++k) {
      const double* __restrict__ partial = partials + k * stride + col;
      for (int64_t i = 0; i < n; ++i) sum[i] += partial[i];
    }
    float rounded[kBlock];
    for (int64_t i = 0; i < n; ++i) rounded[i] = static_cast<float>(sum[i]);
    StoreFloat(rounded, n, grad, dtype, col);
  }
}

}  // namespace

#define FLASHTRAIN_CONCAT_(a, b) a##b
#define FLASHTRAIN_CONCAT(a, b) FLASHTRAIN_CONCAT_(a, b)
const LayerNormCpuKernels FLASHTRAIN_CONCAT(kLayerNormCpuKernels, FLASHTRAIN_CPU_ISA_NAME) = {
    ForwardRows, BackwardRows, AddSums, ReduceColumns};

}  // namespace flashtrain
