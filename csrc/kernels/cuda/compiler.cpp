#include "kernels/cuda/compiler.h"

#include <dlfcn.h>

#include <mutex>
#include <unordered_map>
#include <utility>

#include "fused/cuda_source.h"
#include "kernels/cuda/kernel_cache.h"

namespace wengert::kernels::cuda {
namespace {

// The part of NVRTC's interface that is used; a status of 0 is success.
struct Nvrtc {
  using Handle = void*;
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
  std::string release;  // part of every key
};

// Fused multiply-add stays on, as in PyTorch's own kernels; nothing else departs from IEEE arithmetic.
// The shared headers hold host functions too, which generated source never calls.
constexpr const char* kOptions[] = {
    "--std=c++20", "--device-as-default-execution-space", "--fmad=true", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"};

Nvrtc open_library(const std::string& path) {
  void* library = nullptr;
  std::string failures;
  const std::vector<std::string> names =
      path.empty() ? std::vector<std::string>{"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"} : std::vector<std::string>{path};
  for (const std::string& name : names) {
    library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    const char* reason = dlerror();
    failures += std::string("\n  ") + (reason ? reason : name.c_str());
  }
  if (library == nullptr) throw CompileError("wengert: NVRTC, which compiles CUDA kernels, was not found:" + failures);
  Nvrtc nvrtc{};
  auto find = [&](auto& function, const char* name) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr) throw CompileError(std::string("wengert: this NVRTC has no ") + name);
    function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
  };
  find(nvrtc.version, "nvrtcVersion");
  find(nvrtc.error_string, "nvrtcGetErrorString");
  find(nvrtc.create, "nvrtcCreateProgram");
  find(nvrtc.destroy, "nvrtcDestroyProgram");
  find(nvrtc.compile, "nvrtcCompileProgram");
  find(nvrtc.ptx_size, "nvrtcGetPTXSize");
  find(nvrtc.ptx, "nvrtcGetPTX");
  find(nvrtc.cubin_size, "nvrtcGetCUBINSize");
  find(nvrtc.cubin, "nvrtcGetCUBIN");
  find(nvrtc.log_size, "nvrtcGetProgramLogSize");
  find(nvrtc.log, "nvrtcGetProgramLog");
  int major = 0, minor = 0;
  nvrtc.version(&major, &minor);
  nvrtc.release = std::to_string(major) + "." + std::to_string(minor);
  // NVRTC opens its built-in functions by name alone; where it is no system library that works if they are open already.
  Dl_info place;
  if (dladdr(reinterpret_cast<void*>(nvrtc.version), &place) != 0 && place.dli_fname != nullptr) {
    const std::string file = place.dli_fname;
    const std::string folder = file.substr(0, file.rfind('/') + 1);
    dlopen((folder + "libnvrtc-builtins.so." + nvrtc.release).c_str(), RTLD_NOW | RTLD_GLOBAL);
  }
  return nvrtc;  // the libraries stay open
}

struct State {
  std::mutex mutex;
  std::string path;
  std::shared_ptr<const Nvrtc> nvrtc;
  std::unordered_map<std::string, Bytes> compiled;
  CompilerStatistics statistics;
};

State& state() {
  static State* instance = new State;  // never destroyed: threads may outlive static destructors
  return *instance;
}

void check(const Nvrtc& nvrtc, int status, const char* what) {
  if (status != 0) throw CompileError(std::string("wengert: ") + what + ": " + nvrtc.error_string(status));
}

std::vector<char> run(const Nvrtc& nvrtc, const std::string& source, const std::string& target, Artifact artifact) {
  std::vector<const char*> texts, names;
  for (const fused::EmbeddedHeader& header : fused::device_headers()) {
    texts.push_back(header.text);
    names.push_back(header.name);
  }
  Nvrtc::Handle handle = nullptr;
  check(nvrtc,
        nvrtc.create(&handle, source.c_str(), "wengert_nest.cu", static_cast<int>(names.size()), texts.data(), names.data()),
        "NVRTC refused a program");
  struct Destroy {
    const Nvrtc& nvrtc;
    Nvrtc::Handle handle;
    ~Destroy() { nvrtc.destroy(&handle); }
  } destroy{nvrtc, handle};
  std::vector<const char*> options(std::begin(kOptions), std::end(kOptions));
  options.push_back(target.c_str());
  const int status = nvrtc.compile(handle, static_cast<int>(options.size()), options.data());
  if (status != 0) {
    std::size_t size = 0;
    nvrtc.log_size(handle, &size);
    std::string log(size, '\0');
    if (size > 0) nvrtc.log(handle, log.data());
    while (!log.empty() && (log.back() == '\0' || log.back() == '\n')) log.pop_back();
    throw CompileError(std::string("wengert: a CUDA kernel failed to compile (") + nvrtc.error_string(status) + ", " + target +
                       "):\n" + log);
  }
  const bool ptx = artifact == Artifact::ptx;
  std::size_t size = 0;
  check(nvrtc, (ptx ? nvrtc.ptx_size : nvrtc.cubin_size)(handle, &size), "NVRTC gave no result");
  std::vector<char> bytes(size);
  check(nvrtc, (ptx ? nvrtc.ptx : nvrtc.cubin)(handle, bytes.data()), "NVRTC gave no result");
  if (ptx && !bytes.empty() && bytes.back() == '\0') bytes.pop_back();
  return bytes;
}

// Everything that decides the result: source, embedded headers, target, options and the compiler.
std::string key_of(const Nvrtc& nvrtc, const std::string& source, const std::string& target) {
  static const std::string* headers = [] {
    auto* all = new std::string;
    for (const fused::EmbeddedHeader& header : fused::device_headers()) (((*all += header.name) += '\0') += header.text) += '\0';
    for (const char* option : kOptions) (*all += option) += '\0';
    return all;
  }();
  return nvrtc.release + '\0' + target + '\0' + source + '\0' + std::to_string(std::hash<std::string>{}(*headers));
}

}  // namespace

Bytes compile(const std::string& source, int arch, Artifact artifact) {
  constexpr std::size_t kMostInMemory = 4096;
  State& s = state();
  std::shared_ptr<const Nvrtc> nvrtc;
  const std::string target =
      std::string("--gpu-architecture=") + (artifact == Artifact::ptx ? "compute_" : "sm_") + std::to_string(arch);
  std::string key;
  {
    std::lock_guard lock(s.mutex);
    if (!s.nvrtc) s.nvrtc = std::make_shared<const Nvrtc>(open_library(s.path));
    nvrtc = s.nvrtc;
    key = key_of(*nvrtc, source, target);
    if (auto found = s.compiled.find(key); found != s.compiled.end()) {
      ++s.statistics.from_memory;
      return found->second;
    }
  }
  Bytes bytes;
  const bool stored = [&] {
    auto found = read_cached(key);
    if (found) bytes = std::make_shared<const std::vector<char>>(std::move(*found));
    return bytes != nullptr;
  }();
  if (!stored) {
    bytes = std::make_shared<const std::vector<char>>(run(*nvrtc, source, target, artifact));
    write_cached(key, *bytes);
  }
  std::lock_guard lock(s.mutex);
  ++(stored ? s.statistics.from_disk : s.statistics.compiled);
  if (s.compiled.size() >= kMostInMemory) s.compiled.clear();
  return s.compiled.try_emplace(std::move(key), std::move(bytes)).first->second;
}

void set_library(const std::string& path) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.path = path;
  s.nvrtc.reset();
}

CompilerStatistics compiler_statistics() {
  State& s = state();
  std::lock_guard lock(s.mutex);
  return s.statistics;
}

void forget_compiled() {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.compiled.clear();
  s.statistics = {};
}

}  // namespace wengert::kernels::cuda
