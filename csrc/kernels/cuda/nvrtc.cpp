#include "kernels/cuda/nvrtc.h"

#include <dlfcn.h>
#include <sys/stat.h>
#if __has_include(<link.h>)
#include <link.h>
#endif

#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <vector>

#include "kernels/cuda/compiler.h"

namespace wengert::kernels::cuda {
namespace {

// The build id that the linker wrote into the library at this address; empty: none.
std::string build_id([[maybe_unused]] const void* address) {
#ifdef NT_GNU_BUILD_ID
  struct Search {
    std::uintptr_t address;
    std::string id;
  } search{reinterpret_cast<std::uintptr_t>(address), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* library, std::size_t, void* data) {
        auto& search = *static_cast<Search*>(data);
        bool holds = false;
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const ElfW(Phdr) & part = library->dlpi_phdr[i];
          holds = holds || (part.p_type == PT_LOAD && search.address - (library->dlpi_addr + part.p_vaddr) < part.p_memsz);
        }
        if (!holds) return 0;
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const ElfW(Phdr) & part = library->dlpi_phdr[i];
          if (part.p_type != PT_NOTE) continue;
          std::string_view notes(reinterpret_cast<const char*>(library->dlpi_addr + part.p_vaddr), part.p_memsz);
          ElfW(Nhdr) note;
          const auto padded = [](std::size_t size) { return (size + 3) / 4 * 4; };
          while (notes.size() >= sizeof note) {
            std::memcpy(&note, notes.data(), sizeof note);
            const std::size_t name = sizeof note, text = name + padded(note.n_namesz), end = text + padded(note.n_descsz);
            if (end > notes.size()) break;
            if (note.n_type == NT_GNU_BUILD_ID && notes.substr(name, note.n_namesz) == std::string_view("GNU", 4)) {
              search.id = notes.substr(text, note.n_descsz);
              return 1;
            }
            notes.remove_prefix(end);
          }
        }
        return 1;
      },
      &search);
  return search.id;
#else
  return {};
#endif
}

// The version has no patch release, whose machine code may differ.
std::string build_of(const std::string& file, const void* address) {
  if (std::string id = build_id(address); !id.empty()) return id;
  struct stat status{};
  if (stat(file.c_str(), &status) != 0) return file;
  return file + '\0' + std::to_string(status.st_size) + '.' + std::to_string(status.st_mtime);
}

}  // namespace

Nvrtc open_nvrtc(const std::string& path) {
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
  const std::string version = std::to_string(major) + "." + std::to_string(minor);
  nvrtc.build = version;
  // NVRTC opens its built-in functions by name alone; where it is no system library that works if they are open already.
  Dl_info place;
  const void* address = reinterpret_cast<void*>(nvrtc.version);
  if (dladdr(address, &place) != 0 && place.dli_fname != nullptr) {
    const std::string file = place.dli_fname;
    const std::string folder = file.substr(0, file.rfind('/') + 1);
    dlopen((folder + "libnvrtc-builtins.so." + version).c_str(), RTLD_NOW | RTLD_GLOBAL);
    nvrtc.build += '\0' + build_of(file, address);
  }
  return nvrtc;  // the libraries stay open
}

}  // namespace wengert::kernels::cuda
