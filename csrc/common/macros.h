// Function attributes shared by host and device code.
#pragma once

#if defined(__CUDACC__)
#define WENGERT_HD __host__ __device__ __forceinline__
#define WENGERT_OUTLINED __host__ __device__ inline
#else
// Always inlined: the same template is compiled for several instruction sets, and an out-of-line copy of one of them must never
// be merged by the linker with the copy of another.
#define WENGERT_HD inline __attribute__((always_inline))
// For rare functions: the host declares them everywhere and defines them in one file, for the baseline instruction set.
#define WENGERT_OUTLINED
#endif
