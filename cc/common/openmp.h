// The threads of the OpenMP runtime that the process has loaded, as torch does.
//
// A second pool beside it would fight for the same cores: OpenMP's threads spin for milliseconds
// after each parallel region, just where an op follows another. Nothing is linked: the runtime,
// GNU's libgomp, is looked up among the libraries that are loaded already.
#pragma once

#include <cstdint>
#include <functional>

namespace flashtrain {

// Runs task(0) ... task(num_tasks - 1) on `threads` threads of libgomp, the calling one among them.
// False, and nothing was run, where no libgomp is loaded. Tasks must not throw: the exception would
// leave a thread of libgomp's and end the process.
bool RunOnOpenMp(int64_t num_tasks, const std::function<void(int64_t)>& task, int threads);

}  // namespace flashtrain
