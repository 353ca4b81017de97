#include "bind/evaluator.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/utils/pybind.h>

#include "bind/cuda_static.h"
#include "kernels/cuda/compiler.h"
#include "ops/backend.h"

namespace py = pybind11;

namespace wengert::bind {
namespace {

struct Replacement {
  py::object evaluate, launch;
};

Replacement& replacement() {
  static auto* instance = new Replacement;  // outlives the interpreter's shutdown
  return *instance;
}

// A kernel that is not to be had is the engine's affair; whatever else a function raises is its caller's.
template <class F>
void calling(F f) {
  try {
    f();
  } catch (const py::error_already_set& error) {
    if (!error.matches(py::module_::import("wengert._C").attr("cuda").attr("KernelUnavailable"))) throw;
    throw kernels::cuda::KernelUnavailable(error.what());
  }
}

// Calls evaluate(text, extents, operands as (address, dtype, strides), outputs as (address, dtype, strides, accumulate)).
void evaluate_in_python(at::Device, const fused::Program& program, std::span<const std::int64_t> extents,
                        std::span<const ops::OperandView> operands, std::span<const ops::OutputView> outputs) {
  py::gil_scoped_acquire acquire;
  auto strides = [&](const std::int64_t* first) { return std::vector<std::int64_t>(first, first + extents.size()); };
  py::list sources, targets;
  for (const ops::OperandView& view : operands) {
    sources.append(py::make_tuple(reinterpret_cast<std::uintptr_t>(view.data), fused::name(view.dtype), strides(view.strides)));
  }
  for (const ops::OutputView& view : outputs) {
    targets.append(py::make_tuple(reinterpret_cast<std::uintptr_t>(view.data), fused::name(view.dtype), strides(view.strides),
                                  view.accumulate));
  }
  calling([&] {
    replacement().evaluate(program.text(), std::vector<std::int64_t>(extents.begin(), extents.end()), sources, targets);
  });
}

// Calls launch(the launch as plan_* give it, the memory it may touch as (address, bytes)).
void launch_in_python(at::Device, const kernels::cuda::StaticLaunch& launch, at::TensorList touched) {
  py::gil_scoped_acquire acquire;
  py::list memory;
  for (const at::Tensor& tensor : touched) {
    memory.append(py::make_tuple(reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()),
                                 at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size())));
  }
  calling([&] { replacement().launch(to_python(launch), memory); });
}

}  // namespace

void define_evaluator(py::module_ module) {
  module.def(
      "can_evaluate", [](const std::string& device) { return ops::can_evaluate(at::Device(device).type()); }, py::arg("device"));
  module.def(
      "evaluate_with",
      [](const py::object& evaluate, const py::object& launch) {
        static const ops::Backend own = ops::exchange_backend(at::kCPU, {});
        replacement() = {.evaluate = evaluate, .launch = launch};
        ops::exchange_backend(at::kCPU, evaluate.is_none()
                                            ? own
                                            : ops::Backend{.evaluate = evaluate_in_python,
                                                           .launch = launch.is_none() ? nullptr : launch_in_python});
      },
      py::arg("evaluate"), py::arg("launch") = py::none(),
      "Tests only: every nest on the CPU is evaluated by the first function, and where there is a second one, the engine "
      "launches the "
      "kernels of csrc/kernels/cuda by it; None: as the engine does.");
}

}  // namespace wengert::bind
