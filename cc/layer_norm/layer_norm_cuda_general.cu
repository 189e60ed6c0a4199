// CUDA kernels for any shape, stride, alignment and dtypes, and the sum of the weight gradients'
// partials. One CTA per row, one element per access, dtypes chosen at run time: right first; rows
// are read up to three times, mostly from the caches.
#include "flashtrain/layer_norm/layer_norm_kernel.cuh"

namespace flashtrain {
namespace {

constexpr int kWarps = RowWarps::kMaxWarps;
constexpr int kThreads = 32 * kWarps;

// rowscale * keep of one element.
template <typename Params>
__device__ float ElementScale(const DeviceScales<Params>& scales, float rowscale, int64_t row,
                              int64_t col, bool* kept) {
  *kept = true;
  if (scales.p.dropout_p == 0.0f) return rowscale;
  const Philox4 random =
      PhiloxBlock(scales.seed, scales.offset, row, static_cast<uint32_t>(col / 4));
  const int word = static_cast<int>(col % 4);
  const uint32_t bits = word == 0   ? random.word[0]
                        : word == 1 ? random.word[1]
                        : word == 2 ? random.word[2]
                                    : random.word[3];
  *kept = bits >= scales.threshold;
  return rowscale * (*kept ? scales.keep_scale : 0.0f);
}

__device__ float ElementX(const LayerNormForwardParams& p,
                          const DeviceScales<LayerNormForwardParams>& scales, float rowscale,
                          int64_t row, int64_t col, bool* kept) {
  float x = LoadScalar(p.x0, p.x0_dtype, row * p.x0_row_stride + col);
  x *= ElementScale(scales, rowscale, row, col, kept);
  if (p.layerscale != nullptr) x *= LoadScalar(p.layerscale, p.weight_dtype, col);
  if (p.residual != nullptr) {
    x += LoadScalar(p.residual, p.x_dtype, row * p.residual_row_stride + col);
  }
  return RoundTo(p.x_dtype, x);  // see "Numerics" in layer_norm.h
}

__global__ void __launch_bounds__(kThreads)
    layer_norm_forward_general_kernel(const __grid_constant__ LayerNormForwardParams p) {
  __shared__ float shared[kWarps];
  __shared__ float2 shared2[kWarps];
  const RowWarps group(kWarps);
  const DeviceScales<LayerNormForwardParams> scales(p);
  const float cols = static_cast<float>(p.cols);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float rowscale = scales.RowScale(row);
    bool kept;
    float sum = 0.0f;
    for (int64_t col = group.thread; col < p.cols; col += kThreads) {
      const float x = ElementX(p, scales, rowscale, row, col, &kept);
      sum += x;
      if (p.x != nullptr) StoreScalar(x, p.x, p.x_dtype, row * p.x_row_stride + col);
      if (p.dropout_mask != nullptr) p.dropout_mask[row * p.cols + col] = kept;
    }
    sum = group.Sum(sum, shared);
    float mean = p.is_rms_norm ? 0.0f : sum / cols;
    float2 centered_sums = make_float2(0.0f, 0.0f);
    for (int64_t col = group.thread; col < p.cols; col += kThreads) {
      const float centered = ElementX(p, scales, rowscale, row, col, &kept) - mean;
      centered_sums.x += centered;
      centered_sums.y += centered * centered;
    }
    centered_sums = group.Sum2(centered_sums, shared2);
    float variance = centered_sums.y / cols;
    if (!p.is_rms_norm) {
      // What rounding has left in a long row's mean (Chan, Golub and LeVeque 1983, equation 1.7).
      const float left = centered_sums.x / cols;
      mean += left;
      variance -= left * left;
      if (variance < 0.0f) variance = 0.0f;  // not NaN
    }
    const float rstd = rsqrtf(variance + p.epsilon);
    if (group.thread == 0) {
      if (p.mean != nullptr) p.mean[row] = mean;
      if (p.rstd != nullptr) p.rstd[row] = rstd;
    }
    for (int64_t col = group.thread; col < p.cols; col += kThreads) {
      const float x = ElementX(p, scales, rowscale, row, col, &kept);
      float z = (x - mean) * rstd * WeightAt(p, col);
      if (p.bias != nullptr) z += LoadScalar(p.bias, p.weight_dtype, col);
      StoreScalar(z, p.z, p.z_dtype, row * p.z_row_stride + col);
    }
  }
}

// A CTA's partial of one gradient in global memory; a column belongs to one thread.
struct Partial {
  float* base;  // [cols]; null: not wanted
  bool first;   // the CTA's first row: nothing to add to

  __device__ void Add(int64_t col, float value) const {
    if (base != nullptr) base[col] = first ? value : base[col] + value;
  }
};

__global__ void __launch_bounds__(kThreads)
    layer_norm_backward_general_kernel(const __grid_constant__ LayerNormBackwardParams p) {
  __shared__ float2 shared[2][kWarps];
  const RowWarps group(kWarps);
  const DeviceScales<LayerNormBackwardParams> scales(p);
  const float cols = static_cast<float>(p.cols);
  const int num_grads = (p.dweight != nullptr) + (p.dbias != nullptr) + (p.dlayerscale != nullptr);
  float* next =
      static_cast<float*>(p.workspace) + static_cast<int64_t>(blockIdx.x) * num_grads * p.cols;
  const auto take = [&](const void* grad) {
    float* base = grad == nullptr ? nullptr : next;
    if (grad != nullptr) next += p.cols;
    return Partial{base, true};
  };
  Partial dweight = take(p.dweight), dbias = take(p.dbias), dlayerscale = take(p.dlayerscale);
  int buffer = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, buffer ^= 1) {
    const float mean = p.is_rms_norm ? 0.0f : p.mean[row];
    const float rstd = p.rstd[row];
    const float rowscale = scales.RowScale(row);
    float2 sums = make_float2(0.0f, 0.0f);
    for (int64_t col = group.thread; col < p.cols; col += kThreads) {
      const float dz = LoadScalar(p.dz, p.z_dtype, row * p.dz_row_stride + col);
      const float x = LoadScalar(p.x, p.x_dtype, row * p.x_row_stride + col);
      const float wdz = __fmul_rn(dz, WeightAt(p, col));  // never fused, as below
      sums.x += (x - mean) * rstd * wdz;
      sums.y += wdz;
    }
    sums = group.Sum2(sums, shared[buffer]);
    const float c1 = sums.x / cols, c2 = p.is_rms_norm ? 0.0f : sums.y / cols;
    for (int64_t col = group.thread; col < p.cols; col += kThreads) {
      const float dz = LoadScalar(p.dz, p.z_dtype, row * p.dz_row_stride + col);
      const float x = LoadScalar(p.x, p.x_dtype, row * p.x_row_stride + col);
      const float xhat = (x - mean) * rstd;
      float g = rstd * (__fmul_rn(dz, WeightAt(p, col)) - c2 - xhat * c1);
      if (p.dx != nullptr) g += LoadScalar(p.dx, p.x_dtype, row * p.dx_row_stride + col);
      dweight.Add(col, dz * xhat);
      dbias.Add(col, dz);
      if (p.dresidual != nullptr) {
        StoreScalar(g, p.dresidual, p.x_dtype, row * p.dresidual_row_stride + col);
      }
      bool kept;
      g *= ElementScale(scales, rowscale, row, col, &kept);
      if (p.dlayerscale != nullptr) {
        dlayerscale.Add(col, g * LoadScalar(p.x0, p.x0_dtype, row * p.x0_row_stride + col));
      }
      if (p.layerscale != nullptr) g *= LoadScalar(p.layerscale, p.weight_dtype, col);
      if (p.dx0 != nullptr) StoreScalar(g, p.dx0, p.x0_dtype, row * p.dx0_row_stride + col);
    }
    dweight.first = dbias.first = dlayerscale.first = false;
  }
}

// A CTA sums kReduceCols columns: one 32-byte sector of each partial, so that there are many CTAs
// and each thread has few loads, all in flight at once.
constexpr int kReduceCols = 8, kReduceRows = 64;

struct ReduceTargets {
  void* grad[3];
};

// grad[blockIdx.y][col] = the sum over partials[0 ... ctas)[blockIdx.y][col].
__global__ void __launch_bounds__(kReduceCols* kReduceRows)
    layer_norm_reduce_kernel(const float* __restrict__ partials, int ctas, int64_t cols,
                             const __grid_constant__ ReduceTargets targets, DType dtype) {
  __shared__ float shared[kReduceRows][kReduceCols];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kReduceCols + threadIdx.x;
  const int64_t stride = gridDim.y * cols;
  float sum = 0.0f;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");  // for the partials, where launched early
#endif
  if (col < cols) {
    const float* partial = partials + blockIdx.y * cols + col;
#pragma unroll 8
    for (int i = threadIdx.y; i < ctas; i += kReduceRows) sum += partial[i * stride];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int half = kReduceRows / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      shared[threadIdx.y][threadIdx.x] += shared[threadIdx.y + half][threadIdx.x];
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && col < cols) {
    void* grad = blockIdx.y == 0   ? targets.grad[0]
                 : blockIdx.y == 1 ? targets.grad[1]
                                   : targets.grad[2];
    StoreScalar(shared[0][threadIdx.x], grad, dtype, col);
  }
}

}  // namespace

int LaunchLayerNormForwardGeneral(const LayerNormForwardParams& p, int ctas, void* stream) {
  layer_norm_forward_general_kernel<<<ctas, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

int LaunchLayerNormBackwardGeneral(const LayerNormBackwardParams& p, int ctas, void* stream) {
  layer_norm_backward_general_kernel<<<ctas, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

int LaunchLayerNormReduce(const LayerNormBackwardParams& p, int ctas, bool early_launch,
                          void* stream) {
  ReduceTargets targets = {};
  int num_grads = 0;
  for (void* grad : {p.dweight, p.dbias, p.dlayerscale}) {
    if (grad != nullptr) targets.grad[num_grads++] = grad;
  }
  if (num_grads == 0) return cudaSuccess;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((p.cols + kReduceCols - 1) / kReduceCols), num_grads);
  config.blockDim = dim3(kReduceCols, kReduceRows);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = early_launch ? 1 : 0;
  return cudaLaunchKernelEx(&config, layer_norm_reduce_kernel,
                            static_cast<const float*>(p.workspace), ctas, p.cols, targets,
                            p.weight_dtype);
}

}  // namespace flashtrain
