#include "flashtrain/common/openmp.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>
#include <string>

namespace flashtrain {
namespace {

// What compilers emit for "#pragma omp parallel" (GCC's libgomp.h): runs function(data) on a team
// of threads and returns when all have.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads,
                              unsigned flags);

// Wheels bring a libgomp each; torch's is the one whose threads are at work.
int FindLibrary(dl_phdr_info* info, size_t, void* found) {
  if (std::strstr(info->dlpi_name, "/libgomp") == nullptr) return 0;
  std::string& path = *static_cast<std::string*>(found);
  const bool of_torch = std::strstr(info->dlpi_name, "/torch") != nullptr;
  if (path.empty() || of_torch) path = info->dlpi_name;
  return of_torch;
}

GompParallel FindGompParallel() {
  std::string path;
  dl_iterate_phdr(FindLibrary, &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
}

struct Region {
  const std::function<void(int64_t)>& task;
  const int64_t num_tasks;
  std::atomic<int64_t> next_task{0};

  static void Run(void* self) {
    Region& region = *static_cast<Region*>(self);
    for (int64_t i;
         (i = region.next_task.fetch_add(1, std::memory_order_relaxed)) < region.num_tasks;) {
      region.task(i);
    }
  }
};

}  // namespace

bool RunOnOpenMp(int64_t num_tasks, const std::function<void(int64_t)>& task, int threads) {
  static const GompParallel gomp_parallel = FindGompParallel();
  if (gomp_parallel == nullptr) return false;
  Region region{task, num_tasks};
  gomp_parallel(Region::Run, &region, static_cast<unsigned>(threads), /*flags=*/0);
  return true;
}

}  // namespace flashtrain
