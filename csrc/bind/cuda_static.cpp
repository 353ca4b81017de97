#include "bind/cuda_static.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "bind/cuda_plan.h"
#include "fused/program.h"
#include "kernels/cuda/materialize.h"
#include "kernels/cuda/segment_sum.h"
#include "kernels/cuda/small_matmul.h"

namespace py = pybind11;
namespace cuda = wengert::kernels::cuda;

namespace wengert::bind {
namespace {

using Integers = std::vector<std::int64_t>;
using MaterializeBlock = std::tuple<std::int64_t, Integers, Integers, std::uintptr_t, Integers>;

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::object or_none(const std::optional<cuda::StaticLaunch>& launch) {
  return launch ? py::object(to_python(*launch)) : py::none();
}

}  // namespace

py::dict to_python(const cuda::StaticLaunch& launch) {
  py::dict out;
  out["entry"] = launch.entry;
  out["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
  out["block"] = py::make_tuple(launch.block[0], launch.block[1], launch.block[2]);
  out["shared_bytes"] = launch.shared_bytes;
  out["parameters"] = py::bytes(launch.parameters.data(), launch.parameters.size());
  out["bytes_read"] = launch.bytes_read;
  out["bytes_written"] = launch.bytes_written;
  return out;
}

// Pointers are integers: plans do not follow them.
void define_cuda_static(py::module_ module) {
  module.def(
      "plan_materialize",
      [](std::uintptr_t out, const std::string& dtype, std::int64_t count, const std::vector<MaterializeBlock>& given) {
        std::vector<cuda::MaterializeBlock> blocks;
        for (const auto& [start, extents, steps, value, strides] : given) {
          blocks.push_back({start, extents, steps, strides, at<const void>(value)});
        }
        return or_none(cuda::plan_materialize(at<void>(out), dtype_of(dtype), count, blocks));
      },
      py::arg("out"), py::arg("dtype"), py::arg("count"), py::arg("blocks"));
  module.def(
      "plan_segment_sum",
      [](const std::string& dtype, std::uintptr_t values, std::int64_t position_stride, std::uintptr_t order,
         std::int64_t positions, std::uintptr_t starts, std::uintptr_t targets, std::int64_t segments, std::uintptr_t out,
         std::int64_t target_stride, const Integers& inner, const Integers& value_strides, const Integers& out_strides,
         bool accumulate) {
        return or_none(cuda::plan_segment_sum({.dtype = dtype_of(dtype),
                                               .values = at<const void>(values),
                                               .position_stride = position_stride,
                                               .order = at<const std::int64_t>(order),
                                               .positions = positions,
                                               .starts = at<const std::int64_t>(starts),
                                               .targets = at<const std::int64_t>(targets),
                                               .segments = segments,
                                               .out = at<void>(out),
                                               .target_stride = target_stride,
                                               .inner = inner,
                                               .value_strides = value_strides,
                                               .out_strides = out_strides,
                                               .accumulate = accumulate}));
      },
      py::kw_only(), py::arg("dtype"), py::arg("values"), py::arg("position_stride"), py::arg("order"), py::arg("positions"),
      py::arg("starts"), py::arg("targets"), py::arg("segments"), py::arg("out"), py::arg("target_stride"), py::arg("inner"),
      py::arg("value_strides"), py::arg("out_strides"), py::arg("accumulate"));
  module.def(
      "plan_small_matmul",
      [](const std::string& dtype, const Integers& batch, std::int64_t m, std::int64_t n, std::int64_t k, std::uintptr_t a,
         const Integers& a_strides, std::uintptr_t b, const Integers& b_strides, std::uintptr_t scale,
         const Integers& scale_strides, std::uintptr_t out, const Integers& out_strides) {
        return or_none(cuda::plan_small_matmul({.dtype = dtype_of(dtype),
                                                .batch = batch,
                                                .m = m,
                                                .n = n,
                                                .k = k,
                                                .a = at<const void>(a),
                                                .b = at<const void>(b),
                                                .scale = at<const void>(scale),
                                                .out = at<void>(out),
                                                .a_strides = a_strides,
                                                .b_strides = b_strides,
                                                .scale_strides = scale_strides,
                                                .out_strides = out_strides}));
      },
      py::kw_only(), py::arg("dtype"), py::arg("batch"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a"),
      py::arg("a_strides"), py::arg("b"), py::arg("b_strides"), py::arg("scale") = 0, py::arg("scale_strides") = Integers(),
      py::arg("out"), py::arg("out_strides"));
}

}  // namespace wengert::bind
