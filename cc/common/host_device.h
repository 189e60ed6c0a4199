// FLASHTRAIN_HOST_DEVICE: for functions that C++ sources and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define FLASHTRAIN_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined, so that sources compiled for several instruction sets share no symbol.
#define FLASHTRAIN_HOST_DEVICE inline __attribute__((always_inline))
#endif
