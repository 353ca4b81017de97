#include "bind/cuda_plan.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "fused/program.h"
#include "kernels/cuda/compiler.h"
#include "kernels/cuda/kernel_cache.h"
#include "kernels/cuda/launch_plan.h"

namespace py = pybind11;
namespace cuda = wengert::kernels::cuda;

namespace wengert::bind {
namespace {

using Strides = std::vector<std::int64_t>;
using Operand = std::tuple<std::uintptr_t, std::string, Strides, bool>;  // the last: whether it lies in host memory
using Output = std::tuple<std::uintptr_t, std::string, Strides, bool>;

cuda::Limits limits_of(const py::dict& given) {
  cuda::Limits limits;
  for (auto [key, value] : given) {
    const std::string name = py::cast<std::string>(key);
    if (name == "multiprocessors") {
      limits.multiprocessors = py::cast<int>(value);
    } else if (name == "threads_per_multiprocessor") {
      limits.threads_per_multiprocessor = py::cast<int>(value);
    } else if (name == "narrow_index") {
      limits.narrow_index = py::cast<std::int64_t>(value);
    } else if (name == "iterations_per_lane") {
      limits.iterations_per_lane = py::cast<int>(value);
    } else {
      throw std::invalid_argument("unknown limit '" + name + "'");
    }
  }
  return limits;
}

py::dict to_python(const cuda::Launch& launch) {
  py::dict out;
  out["kernel"] = launch.kernel->id;
  out["entry"] = launch.kernel->entry;
  out["source"] = launch.kernel->source;
  out["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
  out["block"] = py::make_tuple(launch.block[0], launch.block[1], launch.block[2]);
  out["shared_bytes"] = launch.shared_bytes;
  out["parameters"] = py::bytes(launch.parameters.data(), launch.parameters.size());
  out["workspace_pointers"] = launch.workspace_pointers;
  out["bytes_read"] = launch.bytes_read;
  out["bytes_written"] = launch.bytes_written;
  return out;
}

// (address, dtype, strides) or (address, dtype, strides, in_host_memory)
Operand operand_of(const py::tuple& given) {
  return given.size() == 4 ? given.cast<Operand>()
                           : std::tuple_cat(given.cast<std::tuple<std::uintptr_t, std::string, Strides>>(), std::tuple(false));
}

py::dict plan(const std::string& text, const Strides& extents, const std::vector<py::tuple>& given,
              const std::vector<Output>& outputs, const py::dict& limits) {
  const auto program = fused::intern(text);
  auto check = [&](bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(std::string("the program and its views disagree: ") + what);
  };
  check(static_cast<int>(extents.size()) == program->rank(), "extents");
  check(static_cast<int>(given.size()) == program->operands(), "operands");
  check(outputs.size() == program->outputs().size(), "outputs");
  std::vector<Operand> operands;
  for (const py::tuple& operand : given) operands.push_back(operand_of(operand));
  std::vector<kernels::OperandView> inputs;
  std::vector<kernels::OutputView> targets;
  for (const auto& [address, dtype, strides, in_host_memory] : operands) {
    check(strides.size() == extents.size(), "strides of an operand");
    inputs.push_back({reinterpret_cast<const void*>(address), dtype_of(dtype), strides.data(), in_host_memory});
  }
  for (const auto& [address, dtype, strides, accumulate] : outputs) {
    check(strides.size() == extents.size(), "strides of an output");
    targets.push_back({reinterpret_cast<void*>(address), dtype_of(dtype), strides.data(), accumulate});
  }
  const cuda::Plan plan = cuda::plan(*program, extents, inputs, targets, limits_of(limits));
  py::list launches;
  for (const cuda::Launch& launch : plan.launches) launches.append(to_python(launch));
  py::dict out;
  out["launches"] = launches;
  out["workspace_bytes"] = plan.workspace_bytes;
  out["bytes"] = plan.bytes();
  out["minimum_bytes"] = plan.minimum_bytes;
  return out;
}

py::bytes compile(const std::string& source, int arch, const std::string& kind) {
  if (kind != "ptx" && kind != "cubin") throw std::invalid_argument("unknown kind of artifact '" + kind + "'");
  cuda::Bytes bytes;
  {
    py::gil_scoped_release release;
    bytes = cuda::compile(source, arch, kind == "ptx" ? cuda::Artifact::ptx : cuda::Artifact::cubin);
  }
  return py::bytes(bytes->data(), bytes->size());
}

py::dict cache_stats() {
  const cuda::CompilerStatistics statistics = cuda::compiler_statistics();
  py::dict out;
  out["compiled"] = statistics.compiled;
  out["from_memory"] = statistics.from_memory;
  out["from_disk"] = statistics.from_disk;
  out["folder"] = cuda::cache_folder();
  return out;
}

py::dict headers() {
  py::dict out;
  for (const fused::EmbeddedHeader& header : fused::device_headers()) out[header.name] = header.text;
  return out;
}

}  // namespace

fused::Dtype dtype_of(const std::string& name) {
  for (int i = 0; i < fused::kDtypeCount; ++i) {
    if (name == fused::name(static_cast<fused::Dtype>(i))) return static_cast<fused::Dtype>(i);
  }
  throw std::invalid_argument("unknown dtype '" + name + "'");
}

void define_cuda(py::module_ module) {
  module.doc() = "Plans and compilation of CUDA kernels; neither needs a GPU.";
  py::register_exception<cuda::CompileError>(module, "CompileError", PyExc_RuntimeError);
  module.def("plan", &plan, py::arg("program"), py::arg("extents"), py::arg("operands"), py::arg("outputs"),
             py::arg("limits") = py::dict());
  module.def("compile", &compile, py::arg("source"), py::arg("arch"), py::arg("kind") = "ptx");
  module.def("set_nvrtc", &cuda::set_library, py::arg("path"));
  module.def("headers", &headers);
  module.def("cache_stats", &cache_stats);
  module.def("forget_compiled", &cuda::forget_compiled);
}

}  // namespace wengert::bind
