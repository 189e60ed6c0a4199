// Threads for CPU ops: OpenMP's where the process has loaded them (see openmp.h), else a pool.
//
// The pool is made on first use. A call from inside a task, or while another thread's call is
// running, runs its tasks inline: nothing waits for a busy pool, so nothing can deadlock on it. In
// a child made by fork() the pool starts empty and makes new threads when first used there.
#pragma once

#include <cstdint>
#include <functional>

namespace flashtrain {

// Sets the number of threads a call may use, the calling thread included; values below 1 mean 1.
// Default: std::thread::hardware_concurrency().
void SetNumThreads(int num_threads);
int GetNumThreads();

// Runs task(0) ... task(num_tasks - 1), in any order, on up to GetNumThreads() threads, and returns
// when all are done. Tasks must not throw. What a task computes must not depend on the thread that
// runs it; then results do not depend on the number of threads.
void ParallelFor(int64_t num_tasks, const std::function<void(int64_t)>& task);

// A buffer of at least `count` floats owned by the calling thread, 64-byte aligned, contents
// undefined. Valid until the thread's next call.
float* ThreadScratch(int64_t count);

}  // namespace flashtrain
