#include "flashtrain/common/cublas_lt.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace flashtrain {
namespace {

int FindLoaded(dl_phdr_info* info, size_t, void* found) {
  if (std::strstr(info->dlpi_name, "/libcublasLt.so") == nullptr) return 0;
  *static_cast<std::string*>(found) = info->dlpi_name;
  return 1;
}

void* Open(std::string* name) {
  const std::string soname = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
  std::string loaded;
  dl_iterate_phdr(FindLoaded, &loaded);
  for (const std::string& candidate : {loaded, soname, "/usr/local/cuda/lib64/" + soname}) {
    if (candidate.empty()) continue;
    *name = candidate;
    if (void* handle = dlopen(candidate.c_str(), RTLD_LAZY | RTLD_LOCAL)) return handle;
  }
  *name = soname;
  return nullptr;
}

struct Opened {
  CublasLt library;
  Status status;

  template <typename Function>
  void Find(void* handle, const char* name, const std::string& file, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(handle, name));
    if (*function == nullptr) status = Status::Unavailable(file + " has no " + name);
  }

  Opened() {
    std::string file;
    void* handle = Open(&file);
    if (handle == nullptr) {
      status = Status::Unavailable(file + " was not found; import torch with CUDA first, or add " +
                                   "the library's folder to LD_LIBRARY_PATH");
      return;
    }
    CublasLt& l = library;
    Find(handle, "cublasLtGetVersion", file, &l.get_version);
    Find(handle, "cublasLtGetStatusName", file, &l.get_status_name);
    Find(handle, "cublasLtCreate", file, &l.create);
    Find(handle, "cublasLtMatmul", file, &l.matmul);
    Find(handle, "cublasLtMatmulAlgoCheck", file, &l.matmul_algo_check);
    Find(handle, "cublasLtMatmulAlgoGetHeuristic", file, &l.matmul_algo_get_heuristic);
    Find(handle, "cublasLtMatmulDescCreate", file, &l.matmul_desc_create);
    Find(handle, "cublasLtMatmulDescDestroy", file, &l.matmul_desc_destroy);
    Find(handle, "cublasLtMatmulDescSetAttribute", file, &l.matmul_desc_set_attribute);
    Find(handle, "cublasLtMatrixLayoutCreate", file, &l.matrix_layout_create);
    Find(handle, "cublasLtMatrixLayoutDestroy", file, &l.matrix_layout_destroy);
    Find(handle, "cublasLtMatmulPreferenceCreate", file, &l.matmul_preference_create);
    Find(handle, "cublasLtMatmulPreferenceDestroy", file, &l.matmul_preference_destroy);
    Find(handle, "cublasLtMatmulPreferenceSetAttribute", file, &l.matmul_preference_set_attribute);
    if (!status.ok()) return;
    l.version = l.get_version();
    if (l.version / 10000 != CUBLAS_VER_MAJOR) {
      status = Status::Unavailable(file + " is version " + std::to_string(l.version) +
                                   "; supported: " + std::to_string(CUBLAS_VER_MAJOR) + ".x");
    }
  }
};

}  // namespace

Status FindCublasLt(const CublasLt** library) {
  static const Opened opened;
  *library = &opened.library;
  return opened.status;
}

}  // namespace flashtrain
