// Threads for CPU ops: OpenMP's where the process has loaded them (see openmp.h), else a pool.
//
// The pool is made on first use. A call from inside a task, or while another thread's call is
// running, runs its tasks inline: nothing waits for a busy pool, so nothing can deadlock on it. In
// a child made by fork() the pool starts empty and makes new threads when first used there.
#pragma once

#include <cstdint>
#include <functional>

namespace flashtrain {

// OpenMP ends the process where the system refuses it a thread: no machine needs more than these.
constexpr int kMaxThreads = 1024;

// Sets the number of threads a call may use, the calling thread included; values outside of
// [1, kMaxThreads] mean the nearest in it. Default: std::thread::hardware_concurrency().
void SetNumThreads(int num_threads);
int GetNumThreads();

// Runs task(0) ... task(num_tasks - 1), in any order, on up to GetNumThreads() threads, and returns
// when all are done. What a task computes must not depend on the thread that runs it; then results
// do not depend on the number of threads.
//
// Once a task has thrown, those that have not begun are left out, and the first exception is thrown
// here when the others are done.
void ParallelFor(int64_t num_tasks, const std::function<void(int64_t)>& task);

// A buffer of at least `count` floats owned by the calling thread, 64-byte aligned, contents
// undefined. Valid until the thread's next call. Throws std::bad_alloc.
float* ThreadScratch(int64_t count);

}  // namespace flashtrain
