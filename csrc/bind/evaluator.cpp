#include "bind/evaluator.h"

#include <torch/csrc/utils/pybind.h>

#include "kernels/cuda/compiler.h"
#include "ops/fused.h"

namespace py = pybind11;

namespace wengert::bind {
namespace {

py::object& replacement() {
  static auto* callable = new py::object;  // outlives the interpreter's shutdown
  return *callable;
}

// Calls replacement(text, extents, operands as (address, dtype, strides), outputs as (address, dtype, strides, accumulate)).
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
  try {
    replacement()(program.text(), std::vector<std::int64_t>(extents.begin(), extents.end()), sources, targets);
  } catch (const py::error_already_set& error) {
    if (!error.matches(py::module_::import("wengert._C").attr("cuda").attr("CompileError"))) throw;
    throw kernels::cuda::CompileError(error.what());
  }
}

}  // namespace

void define_evaluator(py::module_ module) {
  module.def(
      "can_evaluate", [](const std::string& device) { return ops::can_evaluate(at::Device(device).type()); }, py::arg("device"));
  module.def(
      "evaluate_with",
      [](const py::object& callable) {
        static const ops::Evaluator own = ops::exchange_evaluator(at::kCPU, nullptr);
        replacement() = callable;
        ops::exchange_evaluator(at::kCPU, callable.is_none() ? own : evaluate_in_python);
      },
      py::arg("callable"), "Tests only: every nest on the CPU is evaluated by this function; None: by the engine's kernels.");
}

}  // namespace wengert::bind
