// The CUDA kernels of adamw.h's AdamWStep.
//
// A CTA takes one chunk of one tensor, found by bisection in the table, and goes over it in vectors
// of 4 elements. The last CTA to finish, known by a counter, increases the step counts: by then
// every CTA has read them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "flashtrain/adamw/adamw_cuda.h"
#include "flashtrain/common/vec.cuh"

namespace flashtrain {

struct AdamWLaunch {
  AdamWTableHeader* header;
  const AdamWRecord* records;
  int num_tensors;

  const float* grad_scale;
  const float* grad_norm;
  const float* skip;
  int64_t* skipped_steps;
  float max_norm;

  const AdamWGroupRecord* groups_in_table;  // null: the ones below
  AdamWGroupRecord groups[kAdamWGroupsByValue];
};

// What the update of one tensor needs besides its elements.
struct AdamWCoefficients {
  float grad_factor, decay, beta1_complement, beta2, beta2_complement;
  float step_size, inverse_sqrt_correction2, eps;

  __device__ __forceinline__ void Update(float grad, float& p, float& m, float& v) const {
    const float g = grad * grad_factor;
    m += beta1_complement * (g - m);
    v = beta2 * v + beta2_complement * g * g;
    const float denominator = sqrtf(v) * inverse_sqrt_correction2 + eps;
    p = p * decay - step_size * m / denominator;
  }
};

__device__ __forceinline__ float ReadOr(const float* ptr, float otherwise) {
  return ptr == nullptr ? otherwise : *ptr;
}

__device__ __forceinline__ bool IsSkipped(const AdamWLaunch& launch) {
  const float scale = ReadOr(launch.grad_scale, 1.0f);
  return !isfinite(ReadOr(launch.grad_norm, 0.0f)) || !isfinite(scale) || scale == 0.0f ||
         ReadOr(launch.skip, 0.0f) != 0.0f;
}

__device__ __forceinline__ AdamWCoefficients ComputeCoefficients(const AdamWLaunch& launch,
                                                                 const AdamWRecord& tensor) {
  const AdamWGroupRecord& group =
      (launch.groups_in_table == nullptr ? launch.groups : launch.groups_in_table)[tensor.group];
  const float scale = ReadOr(launch.grad_scale, 1.0f);
  const float norm = ReadOr(launch.grad_norm, 0.0f) / scale;
  const float clip = fminf(1.0f, launch.max_norm / (norm + 1e-6f));
  const float lr = ReadOr(group.lr_on_device, group.lr);
  const double step = static_cast<double>(*tensor.step) + 1.0;
  AdamWCoefficients c;
  c.grad_factor = clip / scale;
  c.decay = 1.0f - lr * group.weight_decay;
  c.beta1_complement = group.one_minus_beta1;
  c.beta2 = static_cast<float>(group.beta2);
  c.beta2_complement = group.one_minus_beta2;
  c.step_size = static_cast<float>(lr / (1.0 - pow(group.beta1, step)));
  c.inverse_sqrt_correction2 = static_cast<float>(1.0 / sqrt(1.0 - pow(group.beta2, step)));
  c.eps = group.eps;
  return c;
}

// The tensor that holds the chunk: the last one that starts at or before it and has elements.
__device__ __forceinline__ int FindTensor(const AdamWLaunch& launch, int chunk) {
  int low = 0, high = launch.num_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (launch.records[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename T>
__device__ __forceinline__ void LoadVec4(const void* base, int64_t index, float (&out)[4]) {
  ToFloat(*reinterpret_cast<const RawVec<T, 4>*>(static_cast<const T*>(base) + index), out);
}

// Elements [index, index + 4) of the master; where the parameter is not the master rounded, of the
// parameter: see adamw.h.
template <typename TP>
__device__ __forceinline__ void LoadMaster4(const AdamWRecord& t, int64_t index, float (&out)[4]) {
  const auto param =
      *reinterpret_cast<const RawVec<TP, 4>*>(static_cast<const TP*>(t.param) + index);
  LoadVec4<float>(t.master, index, out);
  if constexpr (sizeof(TP) == 2) {
    const RawVec<TP, 4> rounded = FromFloat<TP>(out);
    const uint32_t low = rounded.word[0] ^ param.word[0], high = rounded.word[1] ^ param.word[1];
    if ((low | high) == 0) return;
    float written[4];
    ToFloat(param, written);
    if (low & 0xFFFFu) out[0] = written[0];
    if (low >> 16) out[1] = written[1];
    if (high & 0xFFFFu) out[2] = written[2];
    if (high >> 16) out[3] = written[3];
  }
}

// The same for one element.
__device__ __forceinline__ float LoadMaster(const AdamWRecord& t, int64_t index) {
  const float master = t.master[index];
  alignas(4) uint16_t rounded[2];
  StoreScalar(master, rounded, t.param_dtype, 0);
  if (rounded[0] == static_cast<const uint16_t*>(t.param)[index]) return master;
  return LoadScalar(t.param, t.param_dtype, index);
}

// Elements [begin, end) of an aligned tensor, `begin` and `end` multiples of 4.
template <typename TP, typename TG>
__device__ __forceinline__ void UpdateVectors(const AdamWRecord& t, const AdamWCoefficients& c,
                                              int64_t begin, int64_t end) {
  for (int64_t i = begin + 4 * threadIdx.x; i < end; i += 4 * blockDim.x) {
    float g[4], p[4], m[4], v[4];
    LoadVec4<TG>(t.grad, i, g);
    if (t.master != nullptr) {
      LoadMaster4<TP>(t, i, p);
    } else {
      LoadVec4<TP>(t.param, i, p);
    }
    LoadVec4<float>(t.exp_avg, i, m);
    LoadVec4<float>(t.exp_avg_sq, i, v);
#pragma unroll
    for (int k = 0; k < 4; ++k) c.Update(g[k], p[k], m[k], v[k]);
    if (t.master != nullptr) StoreVec<float>(p, t.master, i);
    StoreVec<TP>(p, t.param, i);
    StoreVec<float>(m, t.exp_avg, i);
    StoreVec<float>(v, t.exp_avg_sq, i);
  }
}

// Elements [begin, end) of any tensor.
__device__ __forceinline__ void UpdateScalars(const AdamWRecord& t, const AdamWCoefficients& c,
                                              int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    float p = t.master != nullptr ? LoadMaster(t, i) : LoadScalar(t.param, t.param_dtype, i);
    c.Update(LoadScalar(t.grad, t.grad_dtype, i), p, t.exp_avg[i], t.exp_avg_sq[i]);
    if (t.master != nullptr) t.master[i] = p;
    StoreScalar(p, t.param, t.param_dtype, i);
  }
}

// The dtypes that occur in training; false for other pairs.
__device__ __forceinline__ bool UpdateByDType(const AdamWRecord& t, const AdamWCoefficients& c,
                                              int64_t begin, int64_t end) {
  const DType grad = t.grad_dtype;
  switch (t.param_dtype) {
    case DType::kFloat32:
      if (grad == DType::kFloat32) {
        UpdateVectors<float, float>(t, c, begin, end);
      } else if (grad == DType::kFloat16) {
        UpdateVectors<float, __half>(t, c, begin, end);
      } else {
        UpdateVectors<float, __nv_bfloat16>(t, c, begin, end);
      }
      return true;
    case DType::kFloat16:
      if (grad == DType::kFloat16) {
        UpdateVectors<__half, __half>(t, c, begin, end);
      } else if (grad == DType::kFloat32) {
        UpdateVectors<__half, float>(t, c, begin, end);
      }
      return grad != DType::kBFloat16;
    default:
      if (grad == DType::kBFloat16) {
        UpdateVectors<__nv_bfloat16, __nv_bfloat16>(t, c, begin, end);
      } else if (grad == DType::kFloat32) {
        UpdateVectors<__nv_bfloat16, float>(t, c, begin, end);
      }
      return grad != DType::kFloat16;
  }
}

__device__ __forceinline__ void UpdateChunk(const AdamWLaunch& launch, int chunk) {
  __shared__ AdamWCoefficients shared;
  const AdamWRecord& t = launch.records[FindTensor(launch, chunk)];
  const int64_t begin = static_cast<int64_t>(chunk - t.first_chunk) * kAdamWChunk;
  if (t.grad == nullptr || begin >= t.numel) return;
  if (threadIdx.x == 0) shared = ComputeCoefficients(launch, t);
  __syncthreads();
  const AdamWCoefficients c = shared;
  const int64_t end = min(begin + kAdamWChunk, t.numel);
  int64_t done = begin;
  if (t.vectorizable) {
    const int64_t whole = begin + (end - begin) / 4 * 4;
    if (UpdateByDType(t, c, begin, whole)) done = whole;
  }
  UpdateScalars(t, c, done, end);
}

// Called by every CTA when it is done; the last one closes the step.
__device__ __forceinline__ void FinishStep(const AdamWLaunch& launch, bool skipped) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(&launch.header->finished_ctas, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  if (threadIdx.x == 0) {
    launch.header->finished_ctas = 0;
    if (skipped && launch.skipped_steps != nullptr) ++*launch.skipped_steps;
  }
  if (skipped) return;
  for (int i = static_cast<int>(threadIdx.x); i < launch.num_tensors; i += blockDim.x) {
    if (launch.records[i].grad != nullptr) *launch.records[i].step += 1.0f;
  }
}

__global__ void __launch_bounds__(kAdamWThreads)
    adamw_kernel(const __grid_constant__ AdamWLaunch launch) {
  const bool skipped = IsSkipped(launch);
  if (!skipped) UpdateChunk(launch, static_cast<int>(blockIdx.x));
  FinishStep(launch, skipped);
}

}  // namespace flashtrain
