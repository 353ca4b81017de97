#include "bind/cuda_plan.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "fused/program.h"
#include "kernels/cuda/compiler.h"
#include "kernels/cuda/kernel_cache.h"
#include "kernels/cuda/launch_plan.h"
#include "kernels/cuda/module_cache.h"
#include "ops/backend.h"

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
  out["bytes"] = statistics.bytes;
  out["folder"] = cuda::cache_folder();
  return out;
}

py::dict headers() {
  py::dict out;
  for (const fused::EmbeddedHeader& header : fused::device_headers()) out[header.name] = header.text;
  return out;
}

// A cache over a driver written in Python: load(image, entry), unload(module), record(device, stream), passed(event), in which
// modules and events are numbers and the load of a bad image is 0.
void define_module_cache(py::module_ module) {
  const auto number = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
  const auto pointer = [](std::uintptr_t number) { return reinterpret_cast<void*>(number); };
  py::class_<cuda::Module, std::shared_ptr<cuda::Module>>(module, "Module")
      .def_property_readonly("kernel", [number](const cuda::Module& at) { return number(at.kernel); });
  py::class_<cuda::ModuleCache>(module, "ModuleCache")
      .def(py::init([number, pointer](const py::object& driver, std::size_t most_bytes) {
             const auto load = [=](const std::vector<char>& image, const std::string& entry, cuda::Module& at) {
               at.library = at.kernel =
                   pointer(driver.attr("load")(py::bytes(image.data(), image.size()), entry).cast<std::uintptr_t>());
               return at.kernel == nullptr ? 1 : 0;
             };
             return std::make_unique<cuda::ModuleCache>(
                 cuda::ModuleDriver{.load = load,
                                    .unload = [=](cuda::Module& at) { driver.attr("unload")(number(at.library)); },
                                    .record =
                                        [=](const cuda::LaunchSite& site) {
                                          return pointer(
                                              driver.attr("record")(site.device, number(site.stream)).cast<std::uintptr_t>());
                                        },
                                    .passed = [=](void* event) { return driver.attr("passed")(number(event)).cast<bool>(); }},
                 most_bytes);
           }),
           py::arg("driver"), py::arg("most_bytes"))
      .def(
          "load",
          [pointer](cuda::ModuleCache& cache, std::uint64_t key, const std::string& image, int device, std::uintptr_t stream,
                    bool forever) -> std::shared_ptr<cuda::Module> {
            const cuda::LaunchSite site{.device = device, .stream = pointer(stream), .forever = forever};
            std::shared_ptr<const cuda::Module> found = cache.find(key, site);
            if (!found && cache.load(key, {image.begin(), image.end()}, "entry", site, found) != 0)
              throw cuda::KernelUnavailable("a bad image");
            return std::const_pointer_cast<cuda::Module>(found);
          },
          py::arg("key"), py::arg("image"), py::arg("device"), py::arg("stream"), py::arg("forever") = false)
      .def("clear", &cuda::ModuleCache::clear)
      .def_property_readonly("bytes", &cuda::ModuleCache::bytes);
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
  auto& unavailable = py::register_exception<cuda::KernelUnavailable>(module, "KernelUnavailable", PyExc_RuntimeError);
  py::register_exception<cuda::CompileError>(module, "CompileError", unavailable);
  module.def("plan", &plan, py::arg("program"), py::arg("extents"), py::arg("operands"), py::arg("outputs"),
             py::arg("limits") = py::dict());
  module.def("compile", &compile, py::arg("source"), py::arg("arch"), py::arg("kind") = "ptx");
  module.def("set_nvrtc", &cuda::set_library, py::arg("path"));
  module.def("headers", &headers);
  module.def("cache_stats", &cache_stats);
  module.def("forget_compiled", [] {
    cuda::forget_outcomes();
    cuda::reset_compiler_statistics();
  });
  module.def("kernel_bytes", &ops::kernel_bytes);
  module.def("clear_kernels", &ops::clear_kernels);
  define_module_cache(module);
}

}  // namespace wengert::bind
