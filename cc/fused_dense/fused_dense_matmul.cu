// The products, by cuBLASLt. It knows column-major matrices only: a row-major [rows, cols] tensor
// is its [cols, rows] matrix, so each product below is the transposed one, D^T = B^T A^T.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "flashtrain/common/check.h"
#include "flashtrain/common/cublas_lt.h"
#include "flashtrain/common/cuda_host.h"
#include "flashtrain/fused_dense/fused_dense.h"

namespace flashtrain {
namespace {

// Hopper's best algorithms want 32 MiB; NVIDIA recommends it for that architecture.
constexpr uint64_t kMaxWorkspaceBytes = uint64_t{32} << 20;

Status FromCublas(const CublasLt& lt, cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return Status();
  const std::string message =
      std::string("fused_dense: ") + what + " failed: " + lt.get_status_name(status);
  return status == CUBLAS_STATUS_NOT_SUPPORTED ? Status::Unavailable(message)
                                               : Status::Internal(message);
}

Status Validate(const DenseMatmulParams& p) {
  FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(p.rows, 1, "rows"));
  for (const auto& [size, name] :
       {std::pair(p.in_features, "in_features"), std::pair(p.out_features, "out_features")}) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckAtLeast(size, 8, name));
    if (size % 8 != 0) {
      return Status::InvalidArgument(std::string(name) + " is " + std::to_string(size) +
                                     "; it must be a multiple of 8");
    }
  }
  FLASHTRAIN_RETURN_IF_ERROR(
      CheckDType(p.dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}, "dtype"));
  const bool forward = p.matmul == DenseMatmul::kForward;
  const bool gelu = p.activation == Activation::kGeluApprox;
  const bool relu = p.activation == Activation::kRelu && forward;
  if (p.matmul == DenseMatmul::kWeightGradient
          ? p.activation != Activation::kIdentity
          : p.activation != Activation::kIdentity && !gelu && !relu) {
    return Status::InvalidArgument(
        "activation is " + std::to_string(static_cast<int>(p.activation)) +
        "; supported: kIdentity; kGeluApprox and, forward, kRelu but for a weight gradient");
  }
  if (!gelu) FLASHTRAIN_RETURN_IF_ERROR(CheckNull(p.pre_act, "pre_act", "but with kGeluApprox"));
  if (forward) return CheckNull(p.dbias, "dbias", "in the forward product");
  FLASHTRAIN_RETURN_IF_ERROR(CheckNull(p.bias, "bias", "in a gradient's product"));
  if (gelu) return CheckNotNull(p.pre_act, "pre_act", "for the derivative of kGeluApprox");
  if (p.matmul == DenseMatmul::kWeightGradient) return Status();
  return CheckNull(p.dbias, "dbias", "but for a weight gradient or with kGeluApprox");
}

cublasLtEpilogue_t Epilogue(const DenseMatmulParams& p) {
  const bool gelu = p.activation == Activation::kGeluApprox;
  switch (p.matmul) {
    case DenseMatmul::kWeightGradient:
      return p.dbias != nullptr ? CUBLASLT_EPILOGUE_BGRADB : CUBLASLT_EPILOGUE_DEFAULT;
    case DenseMatmul::kInputGradient:
      if (!gelu) return CUBLASLT_EPILOGUE_DEFAULT;
      return p.dbias != nullptr ? CUBLASLT_EPILOGUE_DGELU_BGRAD : CUBLASLT_EPILOGUE_DGELU;
    case DenseMatmul::kForward:
      break;
  }
  if (p.activation == Activation::kRelu) {
    return p.bias != nullptr ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
  }
  if (!gelu) return p.bias != nullptr ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  if (p.pre_act != nullptr) {
    return p.bias != nullptr ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
  }
  return p.bias != nullptr ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
}

cudaDataType_t CudaType(DType dtype) {
  if (dtype == DType::kFloat32) return CUDA_R_32F;
  return dtype == DType::kFloat16 ? CUDA_R_16F : CUDA_R_16BF;
}

// The descriptors of one call; they live as long as this.
class Problem {
 public:
  Problem(const CublasLt& lt, const DenseMatmulParams& p) : lt_(lt), p_(p) {}
  ~Problem() {
    for (const cublasLtMatrixLayout_t layout : {a, b, d}) {
      if (layout != nullptr) lt_.matrix_layout_destroy(layout);
    }
    if (desc != nullptr) lt_.matmul_desc_destroy(desc);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  Status Create() {
    const bool tf32 = p_.dtype == DType::kFloat32 && p_.allow_tf32;
    const cublasComputeType_t compute = tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    Note(lt_.matmul_desc_create(&desc, compute, CUDA_R_32F));
    const int64_t n = p_.rows, in = p_.in_features, out = p_.out_features;
    int64_t cols = out;
    switch (p_.matmul) {
      case DenseMatmul::kForward:
        Operands(CUBLAS_OP_T, in, out, CUBLAS_OP_N, in, n, out, n);
        break;
      case DenseMatmul::kInputGradient:
        Operands(CUBLAS_OP_N, in, out, CUBLAS_OP_N, out, n, in, n);
        cols = in;
        break;
      case DenseMatmul::kWeightGradient:
        Operands(CUBLAS_OP_N, in, n, CUBLAS_OP_T, out, n, in, out);
        break;
    }
    Set(CUBLASLT_MATMUL_DESC_EPILOGUE, Epilogue(p_));
    const void* vector = p_.bias != nullptr ? p_.bias : p_.dbias;
    if (vector != nullptr) Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, vector);
    if (p_.pre_act != nullptr) {
      Set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p_.pre_act);
      Set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, cols);
    }
    return FromCublas(lt_, status_, "describing the product");
  }

  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;

 private:
  void Note(cublasStatus_t status) {
    if (status_ == CUBLAS_STATUS_SUCCESS) status_ = status;
  }

  template <typename T>
  void Set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    if (status_ == CUBLAS_STATUS_SUCCESS) {
      Note(lt_.matmul_desc_set_attribute(desc, attribute, &value, sizeof(value)));
    }
  }

  // In cuBLASLt's terms: A is the tensor on the right of the row-major product.
  void Operands(cublasOperation_t transpose_a, int64_t a_rows, int64_t a_cols,
                cublasOperation_t transpose_b, int64_t b_rows, int64_t b_cols, int64_t d_rows,
                int64_t d_cols) {
    Set(CUBLASLT_MATMUL_DESC_TRANSA, transpose_a);
    Set(CUBLASLT_MATMUL_DESC_TRANSB, transpose_b);
    const cudaDataType_t type = CudaType(p_.dtype);
    Note(lt_.matrix_layout_create(&a, type, a_rows, a_cols, a_rows));
    Note(lt_.matrix_layout_create(&b, type, b_rows, b_cols, b_rows));
    Note(lt_.matrix_layout_create(&d, type, d_rows, d_cols, d_rows));
  }

  const CublasLt& lt_;
  const DenseMatmulParams& p_;
  cublasStatus_t status_ = CUBLAS_STATUS_SUCCESS;
};

// The library's context of the current device, made on first use and kept.
Status FindHandle(const CublasLt& lt, cublasLtHandle_t* handle) {
  constexpr int kMaxDevices = 64;
  static cublasLtHandle_t handles[kMaxDevices] = {};
  static std::mutex mutex;
  int device = 0;
  FLASHTRAIN_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device), "fused_dense", "cudaGetDevice"));
  if (device >= kMaxDevices) {
    return Status::Unavailable("fused_dense: device " + std::to_string(device) +
                               "; supported: up to " + std::to_string(kMaxDevices - 1));
  }
  std::lock_guard<std::mutex> lock(mutex);
  if (handles[device] == nullptr) {
    // It allocates, which a capture elsewhere in this thread would forbid but for this mode.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    const cublasStatus_t status = lt.create(&handles[device]);
    cudaThreadExchangeStreamCaptureMode(&mode);
    FLASHTRAIN_RETURN_IF_ERROR(FromCublas(lt, status, "cublasLtCreate"));
  }
  *handle = handles[device];
  return Status();
}

struct Library {
  const CublasLt* lt = nullptr;
  cublasLtHandle_t handle = nullptr;

  Status Find() {
    FLASHTRAIN_RETURN_IF_ERROR(FindCublasLt(&lt));
    return FindHandle(*lt, &handle);
  }
};

cublasLtMatmulAlgo_t ToCublas(const DenseMatmulAlgorithm& algorithm) {
  cublasLtMatmulAlgo_t algo;
  static_assert(sizeof(algo.data) == sizeof(algorithm.data), "the library's size");
  std::memcpy(algo.data, algorithm.data, sizeof(algo.data));
  return algo;
}

// What the library's heuristic offers for the problem.
Status Offers(const Library& library, const Problem& problem, int max_offers,
              std::vector<cublasLtMatmulHeuristicResult_t>* offers) {
  const CublasLt& lt = *library.lt;
  cublasLtMatmulPreference_t preference = nullptr;
  FLASHTRAIN_RETURN_IF_ERROR(
      FromCublas(lt, lt.matmul_preference_create(&preference), "cublasLtMatmulPreferenceCreate"));
  const auto destroy = [&](void* made) {
    lt.matmul_preference_destroy(static_cast<cublasLtMatmulPreference_t>(made));
  };
  const std::unique_ptr<void, decltype(destroy)> owner(preference, destroy);
  // Split sums are added in fp32, never in the dtype of the result.
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, alignment = 16;
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    return FromCublas(
        lt, lt.matmul_preference_set_attribute(preference, attribute, &value, sizeof(value)),
        "cublasLtMatmulPreferenceSetAttribute");
  };
  FLASHTRAIN_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMaxWorkspaceBytes));
  FLASHTRAIN_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions));
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    FLASHTRAIN_RETURN_IF_ERROR(set(attribute, alignment));
  }
  offers->resize(max_offers);
  int found = 0;
  const cublasStatus_t status =
      lt.matmul_algo_get_heuristic(library.handle, problem.desc, problem.a, problem.b, problem.d,
                                   problem.d, preference, max_offers, offers->data(), &found);
  offers->resize(status == CUBLAS_STATUS_SUCCESS ? found : 0);
  return FromCublas(lt, status, "cublasLtMatmulAlgoGetHeuristic");
}

// Whether the library takes `algo` for the problem; the workspace that it then needs.
Status Check(const Library& library, const Problem& problem, const cublasLtMatmulAlgo_t& algo,
             int64_t* workspace_bytes) {
  cublasLtMatmulHeuristicResult_t result;
  FLASHTRAIN_RETURN_IF_ERROR(
      FromCublas(*library.lt,
                 library.lt->matmul_algo_check(library.handle, problem.desc, problem.a, problem.b,
                                               problem.d, problem.d, &algo, &result),
                 "cublasLtMatmulAlgoCheck"));
  *workspace_bytes = static_cast<int64_t>(result.workspaceSize);
  return Status();
}

// Appends what the problem takes of the offers, each once.
void Append(const Library& library, const Problem& problem,
            const std::vector<cublasLtMatmulHeuristicResult_t>& offers,
            std::vector<DenseMatmulAlgorithm>* algorithms) {
  for (const cublasLtMatmulHeuristicResult_t& offer : offers) {
    DenseMatmulAlgorithm algorithm;
    std::memcpy(algorithm.data, offer.algo.data, sizeof(algorithm.data));
    if (offer.state != CUBLAS_STATUS_SUCCESS ||
        !Check(library, problem, offer.algo, &algorithm.workspace_bytes).ok() ||
        algorithm.workspace_bytes > static_cast<int64_t>(kMaxWorkspaceBytes)) {
      continue;
    }
    const bool known = std::any_of(algorithms->begin(), algorithms->end(), [&](const auto& other) {
      return std::memcmp(other.data, algorithm.data, sizeof(algorithm.data)) == 0;
    });
    if (!known) algorithms->push_back(algorithm);
  }
}

}  // namespace

Status DenseMatmulVersion(int64_t* version) {
  const CublasLt* lt = nullptr;
  FLASHTRAIN_RETURN_IF_ERROR(FindCublasLt(&lt));
  *version = static_cast<int64_t>(lt->version);
  return Status();
}

Status DenseMatmulAlgorithms(const DenseMatmulParams& p, int max_algorithms,
                             std::vector<DenseMatmulAlgorithm>* algorithms) {
  algorithms->clear();
  FLASHTRAIN_RETURN_IF_ERROR(Validate(p).In("DenseMatmul"));
  Library library;
  FLASHTRAIN_RETURN_IF_ERROR(library.Find());
  Problem problem(*library.lt, p);
  FLASHTRAIN_RETURN_IF_ERROR(problem.Create());
  DenseMatmulParams bare_params = p;
  bare_params.activation = Activation::kIdentity;
  bare_params.bias = nullptr;
  bare_params.pre_act = bare_params.dbias = nullptr;
  Problem bare(*library.lt, bare_params);
  FLASHTRAIN_RETURN_IF_ERROR(bare.Create());

  std::vector<cublasLtMatmulHeuristicResult_t> offers;
  FLASHTRAIN_RETURN_IF_ERROR(Offers(library, problem, max_algorithms, &offers));
  Append(library, problem, offers, algorithms);
  // The heuristic knows fewer algorithms with an epilogue than without, and not always the fastest:
  // on an H100, 32768 x 768 x 3072 with bias took 226 us by the best of those, 203 by one of these.
  FLASHTRAIN_RETURN_IF_ERROR(Offers(library, bare, max_algorithms, &offers));
  Append(library, problem, offers, algorithms);
  if (algorithms->empty()) return Status::Unavailable("fused_dense: cuBLASLt has no algorithm");
  return Status();
}

Status DenseMatmulCheck(const DenseMatmulParams& p, const DenseMatmulAlgorithm& algorithm) {
  FLASHTRAIN_RETURN_IF_ERROR(Validate(p).In("DenseMatmul"));
  Library library;
  FLASHTRAIN_RETURN_IF_ERROR(library.Find());
  Problem problem(*library.lt, p);
  FLASHTRAIN_RETURN_IF_ERROR(problem.Create());
  int64_t workspace_bytes = 0;
  FLASHTRAIN_RETURN_IF_ERROR(Check(library, problem, ToCublas(algorithm), &workspace_bytes));
  if (workspace_bytes > algorithm.workspace_bytes) {
    return Status::Unavailable("fused_dense: the algorithm needs a larger workspace");
  }
  return Status();
}

Status DenseMatmulRun(const DenseMatmulParams& p, const DenseMatmulAlgorithm& algorithm,
                      void* workspace, void* stream) {
  FLASHTRAIN_RETURN_IF_ERROR(Validate(p).In("DenseMatmul"));
  for (const auto& [ptr, name] : {std::pair(p.left, "left"), std::pair(p.right, "right"),
                                  std::pair<const void*, const char*>(p.out, "out")}) {
    FLASHTRAIN_RETURN_IF_ERROR(CheckNotNull(ptr, name, "for a product").In("DenseMatmul"));
  }
  for (const void* ptr : {p.left, p.right, static_cast<const void*>(p.out), p.bias,
                          static_cast<const void*>(p.pre_act), static_cast<const void*>(p.dbias)}) {
    if (reinterpret_cast<uintptr_t>(ptr) % 16 != 0) {
      return Status::InvalidArgument("DenseMatmul: a pointer is not aligned to 16 bytes");
    }
  }
  if (algorithm.workspace_bytes > 0) {
    FLASHTRAIN_RETURN_IF_ERROR(
        CheckNotNull(workspace, "workspace", "for this algorithm").In("DenseMatmul"));
  }
  Library library;
  FLASHTRAIN_RETURN_IF_ERROR(library.Find());
  Problem problem(*library.lt, p);
  FLASHTRAIN_RETURN_IF_ERROR(problem.Create());
  const float one = 1.0f, zero = 0.0f;
  const cublasLtMatmulAlgo_t algo = ToCublas(algorithm);
  return FromCublas(
      *library.lt,
      library.lt->matmul(library.handle, problem.desc, &one, p.right, problem.a, p.left, problem.b,
                         &zero, p.out, problem.d, p.out, problem.d, &algo, workspace,
                         static_cast<size_t>(algorithm.workspace_bytes),
                         static_cast<cudaStream_t>(stream)),
      "cublasLtMatmul");
}

}  // namespace flashtrain
