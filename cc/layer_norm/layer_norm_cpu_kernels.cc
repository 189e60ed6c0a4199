// One thread's share of the CPU path. Compiled once per instruction set: FLASHTRAIN_CPU_ISA_NAME is
// Baseline, V3 or V4. Rows are handled in blocks of columns that stay in the first-level cache;
// dtypes are run-time, since a block's conversion costs little beside its memory traffic.
#include <cmath>
#include <cstdint>

#include "flashtrain/common/cpu_row.h"
#include "flashtrain/layer_norm/layer_norm_cpu.h"

namespace flashtrain {
namespace {

constexpr int64_t kBlock = 512;             // columns; a multiple of 64 (DropoutRow)
constexpr int64_t kTileBytes = 128 * 1024;  // of rows that go from a pass to the next

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Max(int64_t a, int64_t b) { return a < b ? b : a; }

// A sum over a row: in fp32 over the columns of a lane in a run of them, in fp64 over lanes and
// runs, so that the error of a mean far from zero does not grow with the row.
class RowSum {
 public:
  template <typename F>
  inline __attribute__((always_inline)) void Add(int64_t n, F f) {
    run_.Add(n, f);
    columns_ += n;
    if (columns_ < kRun) return;
    total_ += RunTotal();
    run_ = LaneSum();
    columns_ = 0;
  }

  double Total() const { return total_ + RunTotal(); }

 private:
  double RunTotal() const {
    double sum[LaneSum::kLanes];
    for (int l = 0; l < LaneSum::kLanes; ++l) sum[l] = run_.lanes[l];
    for (int width = LaneSum::kLanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
    }
    return sum[0];
  }

  static constexpr int64_t kRun = 2048;
  LaneSum run_;
  double total_ = 0.0;
  int64_t columns_ = 0;
};

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

// `weight`, [cols], 1 added where zero-centred; ones where there is no weight.
template <typename Params>
inline const float* LoadWeight(const Params& p, float* __restrict__ buffer) {
  if (p.weight != nullptr && !p.zero_centered_weight) {
    return LoadFloat(p.weight, p.weight_dtype, 0, p.cols, buffer);
  }
  if (p.weight == nullptr) {
    for (int64_t i = 0; i < p.cols; ++i) buffer[i] = 1.0f;
    return buffer;
  }
  const float* w = LoadFloat(p.weight, p.weight_dtype, 0, p.cols, buffer);
  for (int64_t i = 0; i < p.cols; ++i) buffer[i] = 1.0f + w[i];
  return buffer;
}

// The dropout and scale settings that forward and backward share.
template <typename Params>
struct Scales {
  const Params& p;
  float keep_scale = 1.0f / (1.0f - p.dropout_p);

  explicit Scales(const Params& params) : p(params) {}

  bool Any() const {
    return p.rowscale != nullptr || p.dropout_p > 0.0f || p.layerscale != nullptr;
  }

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

// x = x0 + residual of a row, all of them bf16, in one loop.
void AddBFloat16Row(const LayerNormForwardParams& p, int64_t row) {
  const auto* __restrict__ x0 = static_cast<const uint16_t*>(p.x0) + row * p.x0_row_stride;
  const auto* __restrict__ residual =
      static_cast<const uint16_t*>(p.residual) + row * p.residual_row_stride;
  auto* __restrict__ x = static_cast<uint16_t*>(p.x) + row * p.x_row_stride;
  for (int64_t i = 0; i < p.cols; ++i) {
    x[i] = FloatToBFloat16(BFloat16ToFloat(x0[i]) + BFloat16ToFloat(residual[i]));
  }
}

// x = x0, scaled, + residual of a row, in fp32 in `sums`, which may be p.x. Writes the mask, and x
// in a low precision, where wanted.
void AddRow(const LayerNormForwardParams& p, const Scales<LayerNormForwardParams>& scales,
            int64_t row, float* sums) {
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    float buffer[kBlock], keep[kBlock];
    float* __restrict__ x = sums + col;
    const float* loaded = LoadFloat(p.x0, p.x0_dtype, row * p.x0_row_stride + col, n, x);
    if (scales.Any() || p.residual == nullptr) {
      if (loaded != x) std::memcpy(x, loaded, n * sizeof(float));
      if (scales.Any()) scales.Apply(row, col, n, x, keep);
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
    if (p.x != nullptr && p.x_dtype != DType::kFloat32) {
      StoreFloat(x, n, p.x, p.x_dtype, row * p.x_row_stride + col);
    }
    if (p.dropout_mask != nullptr) {
      uint8_t* __restrict__ mask = p.dropout_mask + row * p.cols + col;
      for (int64_t i = 0; i < n; ++i) mask[i] = p.dropout_p == 0.0f || keep[i] != 0.0f;
    }
  }
}

// weight and bias, [cols]; bias is null where there is none.
struct Affine {
  const float* weight;
  const float* bias;
};

// z of a row whose x lies at `offset` of a tensor of this dtype. `scratch`: of a row.
void NormRow(const LayerNormForwardParams& p, const Affine& affine, int64_t row, const void* x_base,
             DType dtype, int64_t offset, float* scratch) {
  RowSum sum;
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    const float* block = LoadFloat(x_base, dtype, offset + col, n, scratch + col);
    sum.Add(n, [block](int64_t i) { return block[i]; });
  }
  const float* __restrict__ x =
      dtype == DType::kFloat32 ? static_cast<const float*>(x_base) + offset : scratch;
  const float mean = p.is_rms_norm ? 0.0f : static_cast<float>(sum.Total() / p.cols);
  RowSum squares;
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const float* __restrict__ block = x + col;
    squares.Add(Min(kBlock, p.cols - col),
                [block, mean](int64_t i) { return (block[i] - mean) * (block[i] - mean); });
  }
  const auto variance = static_cast<float>(squares.Total() / p.cols);
  const float rstd = 1.0f / std::sqrt(variance + p.epsilon);
  if (p.mean != nullptr) p.mean[row] = mean;
  if (p.rstd != nullptr) p.rstd[row] = rstd;
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    float z_buffer[kBlock];
    const int64_t z_offset = row * p.z_row_stride + col;
    // fp32 results go straight to z.
    float* __restrict__ z =
        p.z_dtype == DType::kFloat32 ? static_cast<float*>(p.z) + z_offset : z_buffer;
    const float* __restrict__ w = affine.weight + col;
    if (affine.bias != nullptr) {
      const float* __restrict__ b = affine.bias + col;
      for (int64_t i = 0; i < n; ++i) z[i] = (x[col + i] - mean) * rstd * w[i] + b[i];
    } else {
      for (int64_t i = 0; i < n; ++i) z[i] = (x[col + i] - mean) * rstd * w[i];
    }
    if (z == z_buffer) StoreFloat(z, n, p.z, p.z_dtype, z_offset);
  }
}

void ForwardRows(const LayerNormForwardParams& p, int64_t begin, int64_t end, float* scratch) {
  const Scales<LayerNormForwardParams> scales(p);
  float* const weight_and_bias = scratch + p.cols;
  Affine affine = {LoadWeight(p, weight_and_bias), nullptr};
  if (p.bias != nullptr) {
    affine.bias = LoadFloat(p.bias, p.weight_dtype, 0, p.cols, weight_and_bias + p.cols);
  }
  if (!scales.Any() && p.residual == nullptr && p.x == nullptr && p.dropout_mask == nullptr) {
    for (int64_t row = begin; row < end; ++row) {
      NormRow(p, affine, row, p.x0, p.x0_dtype, row * p.x0_row_stride, scratch);
    }
    return;
  }
  if (p.x == nullptr) {
    for (int64_t row = begin; row < end; ++row) {
      AddRow(p, scales, row, scratch);
      RoundRow(p.x_dtype, p.cols, scratch);  // "Numerics" in layer_norm.h
      NormRow(p, affine, row, scratch, DType::kFloat32, 0, scratch);
    }
    return;
  }
  // Some rows are added before the first is normalised: their loads wait for no sum, so that
  // memory is busy all along, and x comes back from the second-level cache.
  const int64_t tile = Max(1, kTileBytes / (p.cols * DTypeSize(p.x_dtype)));
  const bool bfloat16 = !scales.Any() && p.residual != nullptr && p.dropout_mask == nullptr &&
                        p.x0_dtype == DType::kBFloat16 && p.x_dtype == DType::kBFloat16;
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t last = Min(first + tile, end);
    for (int64_t row = first; row < last; ++row) {
      if (bfloat16) {
        AddBFloat16Row(p, row);
        continue;
      }
      const bool fp32 = p.x_dtype == DType::kFloat32;
      AddRow(p, scales, row, fp32 ? static_cast<float*>(p.x) + row * p.x_row_stride : scratch);
    }
    for (int64_t row = first; row < last; ++row) {
      NormRow(p, affine, row, p.x, p.x_dtype, row * p.x_row_stride, scratch);
    }
  }
}

struct WeightGradients {
  float* dweight;
  float* dbias;
  float* dlayerscale;
};

// A block of backward's inputs, as fp32.
struct BackwardBlock {
  float dz_buffer[kBlock], x_buffer[kBlock];
  const float* dz;
  const float* x;
  const float* weight;

  BackwardBlock(const LayerNormBackwardParams& p, const float* weights, int64_t row, int64_t col,
                int64_t n)
      : dz(LoadFloat(p.dz, p.z_dtype, row * p.dz_row_stride + col, n, dz_buffer)),
        x(LoadFloat(p.x, p.x_dtype, row * p.x_row_stride + col, n, x_buffer)),
        weight(weights + col) {}
};

// With xhat = (x - mean) * rstd and wdz = weight * dz, a row's means of xhat * wdz and of wdz.
struct BackwardMeans {
  float xhat_wdz, wdz;
};

// First pass of backward over a row; adds to dweight and dbias.
BackwardMeans BackwardSums(const LayerNormBackwardParams& p, const float* weight, int64_t row,
                           const WeightGradients& grads) {
  const float mean = p.is_rms_norm ? 0.0f : p.mean[row];
  const float rstd = p.rstd[row];
  RowSum xhat_wdz_sum, wdz_sum;
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    const BackwardBlock block(p, weight, row, col, n);
    const float* __restrict__ dz = block.dz;
    const float* __restrict__ x = block.x;
    const float* __restrict__ w = block.weight;
    float wdz[kBlock], xhat_wdz[kBlock];
    if (grads.dweight != nullptr && grads.dbias != nullptr) {  // in one loop: the usual case
      float* __restrict__ dweight = grads.dweight + col;
      float* __restrict__ dbias = grads.dbias + col;
      for (int64_t i = 0; i < n; ++i) {
        const float xhat = (x[i] - mean) * rstd;
        wdz[i] = dz[i] * w[i];
        xhat_wdz[i] = xhat * wdz[i];
        dweight[i] += dz[i] * xhat;
        dbias[i] += dz[i];
      }
    } else {
      float xhat[kBlock];
      for (int64_t i = 0; i < n; ++i) {
        xhat[i] = (x[i] - mean) * rstd;
        wdz[i] = dz[i] * w[i];
        xhat_wdz[i] = xhat[i] * wdz[i];
      }
      if (grads.dweight != nullptr) MultiplyAdd(grads.dweight + col, dz, xhat, n);
      if (grads.dbias != nullptr) Add(grads.dbias + col, dz, n);
    }
    xhat_wdz_sum.Add(n, [&xhat_wdz](int64_t i) { return xhat_wdz[i]; });
    if (!p.is_rms_norm) wdz_sum.Add(n, [&wdz](int64_t i) { return wdz[i]; });
  }
  return {static_cast<float>(xhat_wdz_sum.Total() / p.cols),
          static_cast<float>(wdz_sum.Total() / p.cols)};
}

// A block of the gradient of x, dx added where it is not null.
void GradientOfX(const BackwardBlock& block, const float* __restrict__ dx, float mean, float rstd,
                 const BackwardMeans& means, int64_t n, float* __restrict__ g) {
  const float* __restrict__ dz = block.dz;
  const float* __restrict__ x = block.x;
  const float* __restrict__ w = block.weight;
  const float mean_wdz = means.wdz, mean_xhat_wdz = means.xhat_wdz;
  if (dx == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      g[i] = rstd * (dz[i] * w[i] - mean_wdz - (x[i] - mean) * rstd * mean_xhat_wdz);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      g[i] = rstd * (dz[i] * w[i] - mean_wdz - (x[i] - mean) * rstd * mean_xhat_wdz) + dx[i];
    }
  }
}

// Second pass: the gradients of x, and of what x was made of.
void BackwardRow(const LayerNormBackwardParams& p, const Scales<LayerNormBackwardParams>& scales,
                 const float* weight, int64_t row, const BackwardMeans& means,
                 const WeightGradients& grads) {
  const float mean = p.is_rms_norm ? 0.0f : p.mean[row];
  const float rstd = p.rstd[row];
  for (int64_t col = 0; col < p.cols; col += kBlock) {
    const int64_t n = Min(kBlock, p.cols - col);
    float g_buffer[kBlock], buffer[kBlock], keep[kBlock];
    const int64_t dresidual_offset = row * p.dresidual_row_stride + col;
    const int64_t dx0_offset = row * p.dx0_row_stride + col;
    // An fp32 gradient of x goes straight to where it is wanted.
    float* g = g_buffer;
    if (p.dresidual != nullptr && p.x_dtype == DType::kFloat32) {
      g = static_cast<float*>(p.dresidual) + dresidual_offset;
    } else if (p.dresidual == nullptr && p.dx0 != nullptr && p.x0_dtype == DType::kFloat32) {
      g = static_cast<float*>(p.dx0) + dx0_offset;
    }
    const BackwardBlock block(p, weight, row, col, n);
    const float* dx = p.dx == nullptr
                          ? nullptr
                          : LoadFloat(p.dx, p.x_dtype, row * p.dx_row_stride + col, n, buffer);
    GradientOfX(block, dx, mean, rstd, means, n, g);
    if (p.dresidual != nullptr && g == g_buffer) {
      StoreFloat(g, n, p.dresidual, p.x_dtype, dresidual_offset);
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
    const bool is_dresidual = g != g_buffer && p.dresidual != nullptr;
    if (scales.Any()) {
      if (is_dresidual) std::memcpy(g_buffer, g, n * sizeof(float));
      scales.Apply(row, col, n, is_dresidual ? g_buffer : g, keep);
      if (is_dresidual) g = g_buffer;
    }
    if (g == g_buffer || is_dresidual) StoreFloat(g, n, p.dx0, p.x0_dtype, dx0_offset);
  }
}

void BackwardRows(const LayerNormBackwardParams& p, int64_t begin, int64_t end, float* dweight,
                  float* dbias, float* dlayerscale, float* scratch) {
  const float* weight = LoadWeight(p, scratch);
  const Scales<LayerNormBackwardParams> scales(p);
  const WeightGradients grads = {dweight, dbias, dlayerscale};
  // As forward: the loads of some rows before the first sum is needed.
  constexpr int64_t kTileRows = 64;
  BackwardMeans means[kTileRows];
  const int64_t row_bytes = p.cols * (DTypeSize(p.x_dtype) + DTypeSize(p.z_dtype));
  const int64_t tile = Max(1, Min(kTileRows, kTileBytes / row_bytes));
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t last = Min(first + tile, end);
    for (int64_t row = first; row < last; ++row) {
      means[row - first] = BackwardSums(p, weight, row, grads);
    }
    for (int64_t row = first; row < last; ++row) {
      BackwardRow(p, scales, weight, row, means[row - first], grads);
    }
  }
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
