// NVRTC, loaded at run time.
#pragma once
#include <cstddef>
#include <string>

namespace wengert::kernels::cuda {

// The part of NVRTC's interface that is used; a status of 0 is success.
struct Nvrtc {
  using Handle = void*;
  static constexpr int kOutOfMemory = 1;  // the one failure that may pass

  int (*version)(int* major, int* minor);
  const char* (*error_string)(int status);
  int (*create)(Handle*, const char* source, const char* name, int headers, const char* const* texts, const char* const* names);
  int (*destroy)(Handle*);
  int (*compile)(Handle, int options, const char* const* option);
  int (*ptx_size)(Handle, std::size_t*);
  int (*ptx)(Handle, char*);
  int (*cubin_size)(Handle, std::size_t*);
  int (*cubin)(Handle, char*);
  int (*log_size)(Handle, std::size_t*);
  int (*log)(Handle, char*);
  std::string build;  // tells every build from every other, those of one version included
};

// An empty path: the system's.  Throws CompileError.
Nvrtc open_nvrtc(const std::string& path);

}  // namespace wengert::kernels::cuda
