#include "kernels/cuda/compiler.h"

#include <mutex>
#include <optional>
#include <string_view>
#include <utility>

#include "common/fork_safe_mutex.h"
#include "common/lru.h"
#include "common/sha256.h"
#include "fused/cuda_source.h"
#include "kernels/cuda/kernel_cache.h"
#include "kernels/cuda/nvrtc.h"

namespace wengert::kernels::cuda {
namespace {

// Fused multiply-add stays on, as in PyTorch's own kernels; nothing else departs from IEEE arithmetic.
// The shared headers hold host functions too, which generated source never calls.
constexpr const char* kOptions[] = {
    "--std=c++20", "--device-as-default-execution-space", "--fmad=true", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"};

// What came of a source: its code, or why there is none.  A failure is not tried again.
struct Outcome {
  Bytes code;
  std::string failure;
};

struct State {
  static constexpr std::size_t kMostBytes = std::size_t{64} << 20;

  common::ForkSafeMutex mutex;
  std::string path;
  std::shared_ptr<const Nvrtc> nvrtc;
  std::string missing;  // why there is none
  common::Lru<std::string, Outcome> outcomes{kMostBytes};
  CompilerStatistics statistics;

  void keep(std::string key, Outcome outcome) {
    const std::size_t bytes =
        2 * sizeof(Outcome) + key.size() + outcome.failure.size() + (outcome.code ? outcome.code->size() : 0);
    outcomes.insert(std::move(key), std::move(outcome), bytes);
  }
};

State& state() {
  static State* instance = new State;  // never destroyed: threads may outlive static destructors
  return *instance;
}
[[maybe_unused]] const State& made_at_load = state();  // see common::ForkSafeMutex

void check(const Nvrtc& nvrtc, int status, const char* what) {
  if (status != 0) throw CompileError(std::string("wengert: ") + what + ": " + nvrtc.error_string(status));
}

// Says that trying again may help.
struct Passing : CompileError {
  using CompileError::CompileError;
};

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
    const std::string message =
        std::string("wengert: a CUDA kernel failed to compile (") + nvrtc.error_string(status) + ", " + target + "):\n" + log;
    if (status == Nvrtc::kOutOfMemory) throw Passing(message);
    throw CompileError(message);
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
    common::Sha256 hash;
    const auto add = [&](std::string_view text) {
      hash.add(std::to_string(text.size()) + ':');
      hash.add(text);
    };
    for (const fused::EmbeddedHeader& header : fused::device_headers()) add(header.name), add(header.text);
    for (const char* option : kOptions) add(option);
    return new std::string(common::hexadecimal(hash.finish()));
  }();
  std::string key;
  for (const std::string* part : {&nvrtc.build, &target, headers, &source})
    ((key += std::to_string(part->size())) += ':') += *part;
  return key;
}

}  // namespace

Bytes compile(const std::string& source, int arch, Artifact artifact) {
  State& s = state();
  std::shared_ptr<const Nvrtc> nvrtc;
  const std::string target =
      std::string("--gpu-architecture=") + (artifact == Artifact::ptx ? "compute_" : "sm_") + std::to_string(arch);
  std::string key;
  {
    std::lock_guard lock(s.mutex);
    if (!s.missing.empty()) throw CompileError(s.missing);
    if (!s.nvrtc) {
      try {
        s.nvrtc = std::make_shared<const Nvrtc>(open_nvrtc(s.path));
      } catch (const CompileError& error) {
        s.missing = error.what();
        throw;
      }
    }
    nvrtc = s.nvrtc;
    key = key_of(*nvrtc, source, target);
    if (const Outcome* found = s.outcomes.find(key)) {
      ++s.statistics.from_memory;
      if (!found->code) throw CompileError(found->failure);
      return found->code;
    }
  }
  std::optional<std::vector<char>> stored = read_cached(key);
  Bytes code;
  try {
    code = std::make_shared<const std::vector<char>>(stored ? std::move(*stored) : run(*nvrtc, source, target, artifact));
  } catch (const Passing&) {
    throw;
  } catch (const CompileError& error) {
    std::lock_guard lock(s.mutex);
    s.keep(std::move(key), {.code = nullptr, .failure = error.what()});
    throw;
  }
  if (!stored) write_cached(key, *code);
  std::lock_guard lock(s.mutex);
  ++(stored ? s.statistics.from_disk : s.statistics.compiled);
  s.keep(std::move(key), {.code = code, .failure = {}});
  return code;
}

void set_library(const std::string& path) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.path = path;
  s.nvrtc.reset();
  s.missing.clear();
}

CompilerStatistics compiler_statistics() {
  State& s = state();
  std::lock_guard lock(s.mutex);
  CompilerStatistics statistics = s.statistics;
  statistics.bytes = static_cast<std::int64_t>(s.outcomes.bytes());
  return statistics;
}

void forget_outcomes() {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.outcomes.clear();
  s.missing.clear();
}

void reset_compiler_statistics() {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.statistics = {};
}

}  // namespace wengert::kernels::cuda
