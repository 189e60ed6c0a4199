// cuBLASLt, opened at run time: the library that the process has loaded already (torch's), else the
// machine's. Nothing is linked, so what uses it loads on machines without CUDA.
//
//   const CublasLt* lt = nullptr;
//   FLASHTRAIN_RETURN_IF_ERROR(FindCublasLt(&lt));
//   cublasStatus_t status = lt->create(&handle);
#pragma once

#include <cublasLt.h>

#include <cstddef>

#include "flashtrain/common/status.h"

namespace flashtrain {

struct CublasLt {
  size_t version = 0;  // 10000 * major + 100 * minor + patch

  decltype(&cublasLtGetVersion) get_version;
  decltype(&cublasLtGetStatusName) get_status_name;
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulAlgoCheck) matmul_algo_check;
  decltype(&cublasLtMatmulAlgoGetHeuristic) matmul_algo_get_heuristic;
  decltype(&cublasLtMatmulDescCreate) matmul_desc_create;
  decltype(&cublasLtMatmulDescDestroy) matmul_desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) matmul_desc_set_attribute;
  decltype(&cublasLtMatrixLayoutCreate) matrix_layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) matrix_layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) matmul_preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) matmul_preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) matmul_preference_set_attribute;
};

// Looks once; kUnavailable if there is no library of the major version that this was compiled for.
Status FindCublasLt(const CublasLt** library);

}  // namespace flashtrain
