// What a dense layer is made of: its three matrix products with fused epilogues (CUDA, cuBLASLt),
// and bias and activation as passes of their own (CPU and CUDA), where no epilogue is.
//
//   forward          pre_act = x weight^T + bias,  out = activation(pre_act)
//   input gradient   dx = (dout weight) * activation'(pre_act),  dbias = sum of dx over rows
//   weight gradient  dweight = dout^T x,  dbias = sum of dout over rows
//
// with x [rows, in_features], weight [out_features, in_features], out [rows, out_features], all
// row-major as torch.nn.Linear has them.
//
// Activations: GELU in its tanh form, x * sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3)
// (Hendrycks and Gimpel 2016, arXiv:1606.08415), ReLU, and squared ReLU (So et al. 2021,
// arXiv:2109.08668). The gradient of ReLU at 0 is 0.
//
// Numerics: products accumulate in fp32 and are rounded once; arithmetic of bias and activation is
// fp32. The passes give the same bits for the same inputs on one device model, and so do the
// products for one algorithm.
//
// Cost: the passes are memory bound, each input is read once and each output written once; sums
// over rows also move DenseActivationBackwardWorkspaceBytes twice. The products cost
// 2 * rows * in_features * out_features FLOPs each.
//
//   DenseMatmulParams p;
//   p.matmul = DenseMatmul::kForward, p.rows = 4096, p.in_features = 768, p.out_features = 3072;
//   p.dtype = DType::kBFloat16, p.activation = Activation::kGeluApprox;
//   p.left = x, p.right = weight, p.bias = bias, p.out = out, p.pre_act = pre_act;
//   std::vector<DenseMatmulAlgorithm> algorithms;
//   Status s = DenseMatmulAlgorithms(p, 8, &algorithms);   // the likely fastest first
//   s = DenseMatmulRun(p, algorithms[0], workspace, stream);
#pragma once

#include <cstdint>
#include <vector>

#include "flashtrain/common/device.h"
#include "flashtrain/common/dtype.h"
#include "flashtrain/common/status.h"

namespace flashtrain {

// The values are stable: they may be stored and passed across the language border.
enum class Activation : int8_t {
  kIdentity = 0,
  kGeluApprox = 1,
  kRelu = 2,
  kSquaredRelu = 3,
};

// Conventions for all structs: tensors are contiguous, of `dtype`, in memory of the op's device, of
// any alignment of at least the dtype's size. "null: ..." says what a null pointer means; a pointer
// without it must not be null unless rows is 0. Outputs overlap neither inputs nor each other but
// where a comment allows it.

struct DenseActivationForwardParams {
  int64_t rows = 0;  // >= 0
  int64_t cols = 0;  // >= 1
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;

  const void* x = nullptr;     // [rows, cols]: a product
  const void* bias = nullptr;  // [cols]; null: 0

  void* pre_act = nullptr;  // [rows, cols], x + bias; null: not written; may be x
  void* out = nullptr;      // [rows, cols], activation(pre_act); null: not written; may be x
};

struct DenseActivationBackwardParams {
  int64_t rows = 0;  // >= 0; with 0 rows dbias is set to zero
  int64_t cols = 0;  // >= 1
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;

  const void* dout = nullptr;  // [rows, cols]: gradient of activation(pre_act)
  // [rows, cols]; null: only for kIdentity. kRelu takes its output as well: it has the same sign.
  const void* pre_act = nullptr;

  void* dx = nullptr;  // [rows, cols], dout * activation'(pre_act); null: not wanted; may be dout
  void* dbias = nullptr;  // [cols], dx summed over rows in fp32 in a fixed order; null: not wanted

  // DenseActivationBackwardWorkspaceBytes(params, device) bytes of device memory, 16-byte aligned,
  // contents undefined before and after; may be null if that is 0.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// `stream` is a cudaStream_t (null: the default stream) and is ignored on CPU. CUDA work is only
// enqueued: no allocation, no synchronisation, valid under graph capture. Returns an error, and
// has written nothing, if the arguments are not as described above.
Status DenseActivationForward(const DenseActivationForwardParams& params, Device device,
                              void* stream);
Status DenseActivationBackward(const DenseActivationBackwardParams& params, Device device,
                               void* stream);

// Depends on sizes, dtype and whether dbias is wanted. Negative if the params are invalid.
int64_t DenseActivationBackwardWorkspaceBytes(const DenseActivationBackwardParams& params,
                                              Device device);

enum class DenseMatmul : int8_t { kForward = 0, kInputGradient = 1, kWeightGradient = 2 };

// One product with its epilogue, on the current CUDA device. Pointers are 16-byte aligned.
struct DenseMatmulParams {
  DenseMatmul matmul = DenseMatmul::kForward;
  int64_t rows = 0;                           // >= 1
  int64_t in_features = 0, out_features = 0;  // multiples of 8
  DType dtype = DType::kFloat32;
  bool allow_tf32 = false;  // kFloat32 only: products of inputs rounded to TF32
  // kForward: what is applied: kIdentity, kGeluApprox or kRelu. kInputGradient: whose derivative
  // multiplies: kIdentity or kGeluApprox. kWeightGradient: kIdentity.
  Activation activation = Activation::kIdentity;

  const void* left = nullptr;   // kForward: x; else dout
  const void* right = nullptr;  // kWeightGradient: x; else weight
  void* out = nullptr;          // out, dx or dweight

  const void* bias = nullptr;  // kForward: [out_features]; null: none. Else null
  // With kGeluApprox, of the shape of `out`: written by kForward (null: not wanted), read by
  // kInputGradient.
  void* pre_act = nullptr;
  // kInputGradient: [in_features], kWeightGradient: [out_features]; null: not wanted. The former
  // only with kGeluApprox: cuBLASLt has no other epilogue for it.
  void* dbias = nullptr;
};

// A way to compute one product: for the same params, but for other pointers, and the same device
// model and library version; then it may be stored as bytes.
struct DenseMatmulAlgorithm {
  uint64_t data[8];
  int64_t workspace_bytes;
};

// OK if cuBLASLt is there; *version (not null) is 10000 * major + 100 * minor + patch.
Status DenseMatmulVersion(int64_t* version);

// Up to `max_algorithms` that the library's heuristic offers for the product, the likely fastest
// first, then those of up to as many offered for the product without its epilogue that it takes
// with it. Which of the optional pointers are null is all that matters of the pointers.
// kUnavailable if the library is not there or has none.
Status DenseMatmulAlgorithms(const DenseMatmulParams& params, int max_algorithms,
                             std::vector<DenseMatmulAlgorithm>* algorithms);

// Whether the library accepts the algorithm for the params.
Status DenseMatmulCheck(const DenseMatmulParams& params, const DenseMatmulAlgorithm& algorithm);

// workspace: algorithm.workspace_bytes of device memory, 256-byte aligned. Only enqueues, as above.
Status DenseMatmulRun(const DenseMatmulParams& params, const DenseMatmulAlgorithm& algorithm,
                      void* workspace, void* stream);

}  // namespace flashtrain
