// Fused dropout + add + LayerNorm/RMSNorm, forward and backward, on CPU and CUDA.
//
//   x = layerscale[col] * dropout(rowscale[row] * x0) + residual
//   z = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + epsilon)       (LayerNorm)
//   z = x * rstd * weight + bias,            rstd = 1 / sqrt(mean(x^2) + epsilon) (RMSNorm)
//
// with 1 + weight in place of weight where zero_centered_weight is set. Every term but x0 is
// optional. var is the biased variance. Formulas: Ba et al. 2016 (arXiv:1607.06450), Zhang and
// Sennrich 2019 (arXiv:1910.07467).
//
// Numerics: all arithmetic is fp32; the variance is taken around the mean, never as E[x^2] -
// E[x]^2. x is rounded to x_dtype before it is normalised, as separate ops would do, whether or not
// it is written: so backward, which reads x, sees what forward normalised, and a row of equal
// elements has variance 0 in both. NaN and inf propagate as in torch.
// Results are bitwise deterministic for one device type and model: no atomics.
//
// Cost: memory bound. Each input is read once and each output written once for cols <= 16384
// (backward with a float32 tensor: 8192) where rows, weight and bias are 16-byte aligned and cols
// is a multiple of 8; other shapes take a slower path that reads its inputs up to three times.
// Backward also moves LayerNormBackwardWorkspaceBytes twice.
//
// Dropout: the mask is a pure function of (seed, offset, row, col), the same on every device (see
// common/philox.h), so backward regenerates it. Kept values are scaled by 1 / (1 - dropout_p).
//
//   LayerNormForwardParams p;
//   p.rows = 4096, p.cols = 1024;
//   p.x0 = x0, p.x0_row_stride = 1024, p.x0_dtype = DType::kBFloat16;
//   p.z = z, p.z_row_stride = 1024, p.z_dtype = DType::kBFloat16;
//   p.x_dtype = DType::kBFloat16, p.rstd = rstd, p.mean = mean;
//   Status s = LayerNormForward(p, Device::Cuda(), stream);
#pragma once

#include <cstdint>

#include "flashtrain/common/device.h"
#include "flashtrain/common/dtype.h"
#include "flashtrain/common/status.h"

namespace flashtrain {

// Conventions for both structs:
// - Pointers are memory of the op's device. "null: ..." says what a null pointer means; a pointer
//   without it must not be null unless rows is 0. Any alignment of at least the dtype's size works.
// - [rows, cols] tensors have unit column stride and the given row stride, in elements,
//   stride >= cols (any where rows is 1). Other tensors are contiguous.
// - Outputs overlap neither inputs nor each other.
// - A dtype field is read only where a pointer of that dtype is given, but for x_dtype.

struct LayerNormForwardParams {
  int64_t rows = 0;  // >= 0
  int64_t cols = 0;  // >= 1, the normalised size

  // Inputs.
  const void* x0 = nullptr;  // [rows, cols], x0_dtype
  int64_t x0_row_stride = 0;
  DType x0_dtype = DType::kFloat32;

  const void* residual = nullptr;  // [rows, cols], x_dtype; null: nothing is added
  int64_t residual_row_stride = 0;

  const void* weight = nullptr;          // [cols], weight_dtype; null: 1
  const void* bias = nullptr;            // [cols], weight_dtype; null: 0
  DType weight_dtype = DType::kFloat32;  // of weight, bias and layerscale: any

  const void* rowscale = nullptr;  // [rows], rowscale_dtype; null: 1
  DType rowscale_dtype = DType::kFloat32;
  const void* layerscale = nullptr;  // [cols], weight_dtype; null: 1

  // {seed, offset} in the op's device memory, read when the kernel runs (so a captured graph can be
  // replayed with new values); null allowed where dropout_p is 0.
  const uint64_t* rng_state = nullptr;
  float dropout_p = 0.0f;  // probability of zeroing an element, in [0, 1)

  float epsilon = 1e-5f;
  bool is_rms_norm = false;
  bool zero_centered_weight = false;  // scale by 1 + weight; weight must not be null

  // Outputs.
  void* z = nullptr;  // [rows, cols], z_dtype
  int64_t z_row_stride = 0;
  DType z_dtype = DType::kFloat32;  // any; usually x0_dtype

  // [rows, cols], x_dtype; null: not written. Backward needs x: ask for it wherever it differs from
  // x0 (residual, dropout or a scale is used, or x_dtype != x0_dtype).
  void* x = nullptr;
  int64_t x_row_stride = 0;
  DType x_dtype = DType::kFloat32;  // of residual and x: x0_dtype or float32

  float* mean = nullptr;            // [rows]; null: not written; must be null for RMSNorm
  float* rstd = nullptr;            // [rows]; null: not written
  uint8_t* dropout_mask = nullptr;  // [rows, cols], contiguous, 1 = kept; null: not written
};

struct LayerNormBackwardParams {
  int64_t rows = 0;  // >= 0; with 0 rows the weight gradients are set to zero
  int64_t cols = 0;  // >= 1

  // Inputs.
  const void* dz = nullptr;  // [rows, cols], z_dtype: gradient of z
  int64_t dz_row_stride = 0;
  DType z_dtype = DType::kFloat32;

  const void* dx = nullptr;  // [rows, cols], x_dtype: gradient of the prenorm output x; null: 0
  int64_t dx_row_stride = 0;

  const void* x = nullptr;  // [rows, cols], x_dtype: as written by forward, or x0 if they are equal
  int64_t x_row_stride = 0;
  DType x_dtype = DType::kFloat32;  // of x, dx and dresidual: x0_dtype or float32

  const void* x0 = nullptr;  // [rows, cols], x0_dtype; needed for dlayerscale only, else null
  int64_t x0_row_stride = 0;
  DType x0_dtype = DType::kFloat32;  // of x0 and dx0

  const float* mean = nullptr;  // [rows], from forward; null for RMSNorm
  const float* rstd = nullptr;  // [rows], from forward

  // As given to forward.
  const void* weight = nullptr;
  DType weight_dtype = DType::kFloat32;  // of weight, layerscale and their gradients and dbias
  const void* rowscale = nullptr;
  DType rowscale_dtype = DType::kFloat32;
  const void* layerscale = nullptr;
  const uint64_t* rng_state = nullptr;
  float dropout_p = 0.0f;
  bool is_rms_norm = false;
  bool zero_centered_weight = false;

  // Outputs. With g the gradient of x (through z, plus dx):
  //   dresidual = g,  dx0 = g * layerscale * dropout scale * rowscale.
  // Without dropout and scales, and with x_dtype == x0_dtype, the two are equal: ask for dx0 only
  // and use it as both.
  void* dx0 = nullptr;  // [rows, cols], x0_dtype; null: not written
  int64_t dx0_row_stride = 0;
  void* dresidual = nullptr;  // [rows, cols], x_dtype; null: not written
  int64_t dresidual_row_stride = 0;

  // Summed over rows in fp32 (CPU: 32 of them, then in fp64) in a fixed order, then rounded.
  void* dweight = nullptr;      // [cols], weight_dtype; null: not wanted
  void* dbias = nullptr;        // [cols], weight_dtype; null: not wanted
  void* dlayerscale = nullptr;  // [cols], weight_dtype; null: not wanted; needs layerscale and x0

  // LayerNormBackwardWorkspaceBytes(params, device) bytes of device memory, 16-byte aligned,
  // contents undefined before and after; may be null if that is 0.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// `stream` is a cudaStream_t (null: the default stream) and is ignored on CPU. CUDA work is only
// enqueued: no allocation, no synchronisation, valid under graph capture. Returns an error, and
// has written nothing, if the arguments are not as described above.
Status LayerNormForward(const LayerNormForwardParams& params, Device device, void* stream);
Status LayerNormBackward(const LayerNormBackwardParams& params, Device device, void* stream);

// Size of the workspace for these params on this device (CUDA: the current device). Depends on the
// sizes, dtypes and which weight gradients are wanted (non-null), so fill those in first; strides
// and other pointers do not matter. Negative if the params are invalid.
int64_t LayerNormBackwardWorkspaceBytes(const LayerNormBackwardParams& params, Device device);

}  // namespace flashtrain
