// Asynchronous copies from global to shared memory (cp.async, sm_80 and later), used as a pipeline
// that is private to each thread: a thread copies, waits for and reads only its own vectors, so no
// barrier is needed, and data in flight occupies no registers.
#pragma once

#include <cstdint>

#include "flashtrain/common/vec.cuh"

namespace flashtrain {

// Starts copying elements [index, index + N) of an aligned tensor.
template <typename T, int N>
__device__ __forceinline__ void AsyncCopy(RawVec<T, N>* shared, const void* base, int64_t index) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const T* from = static_cast<const T*>(base) + index;
  if constexpr (sizeof(RawVec<T, N>) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    static_assert(sizeof(RawVec<T, N>) == 8, "8 or 16 bytes");
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
  }
}

// Ends a group of copies, possibly empty.
__device__ __forceinline__ void AsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of the thread's latest groups are unfinished.
__device__ __forceinline__ void AsyncWait(int pending) {
  if (pending == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  }
}
constexpr int kMaxAsyncPending = 2;

}  // namespace flashtrain
