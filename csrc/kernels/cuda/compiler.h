// Compiles generated source with NVRTC, which is loaded at run time; results are kept in memory and on disk.
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace wengert::kernels::cuda {

// A kernel cannot be had on this device, though the device itself is well: PyTorch can do the work.
struct KernelUnavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct CompileError : KernelUnavailable {
  using KernelUnavailable::KernelUnavailable;
};

enum class Artifact : std::uint8_t {
  ptx,   // text for the driver to compile
  cubin  // machine code of one architecture
};

using Bytes = std::shared_ptr<const std::vector<char>>;

// `arch` is 10 * major + minor of the compute capability.  Throws CompileError: NVRTC is missing, or with its log; once more
// without trying, where it did before.  Any thread.
Bytes compile(const std::string& source, int arch, Artifact artifact);

// Which NVRTC is used from now on; without a call, or with an empty path, the system's libnvrtc.
void set_library(const std::string& path);

struct CompilerStatistics {
  std::int64_t compiled = 0;     // by NVRTC
  std::int64_t from_memory = 0;  // answers without a file
  std::int64_t from_disk = 0;
  std::int64_t bytes = 0;  // in memory
};
CompilerStatistics compiler_statistics();
void reset_compiler_statistics();
// Forgets what is kept in memory; files stay.
void forget_outcomes();

}  // namespace wengert::kernels::cuda
