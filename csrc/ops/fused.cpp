#include "ops/fused.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <stdexcept>

namespace wengert::ops {
namespace {

constexpr at::ScalarType kScalarTypes[fused::kDtypeCount] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kLong,
                                                             at::kInt,   at::kShort,  at::kChar,     at::kByte, at::kBool};

int find_dtype(at::ScalarType type) {
  for (int i = 0; i < fused::kDtypeCount; ++i) {
    if (kScalarTypes[i] == type) return i;
  }
  return -1;
}

// The extents of the nest, checked: along each axis all sizes other than 1 agree.
template <class Int, class SizesOf>
c10::SmallVector<Int, 8> infer_extents(const fused::Program& program, at::TensorList operands, SizesOf sizes_of) {
  TORCH_CHECK_VALUE(static_cast<int>(operands.size()) == program.operands(), "wengert::fused: the program takes ",
                    program.operands(), " operands, got ", operands.size());
  c10::SmallVector<Int, 8> extents(program.rank(), Int(1));
  for (std::size_t i = 0; i < operands.size(); ++i) {
    const at::Tensor& operand = operands[i];
    TORCH_CHECK_VALUE(operand.dim() == program.rank(), "wengert::fused: operand ", i, " has ", operand.dim(),
                      " dimensions, the program's nest has ", program.rank());
    to_dtype(operand.scalar_type());
    auto sizes = sizes_of(operand);
    for (int k = 0; k < program.rank(); ++k) {
      if (sizes[k] == 1) continue;
      TORCH_CHECK_VALUE(extents[k] == 1 || extents[k] == sizes[k], "wengert::fused: operand ", i, " has size ", sizes[k],
                        " along axis ", k, " where another has size ", extents[k]);
      extents[k] = sizes[k];
    }
  }
  return extents;
}

template <class Int>
c10::SmallVector<Int, 8> output_sizes(const c10::SmallVector<Int, 8>& extents, const fused::OutputSpec& output) {
  c10::SmallVector<Int, 8> sizes = extents;
  for (std::size_t k = 0; k < sizes.size(); ++k) {
    if (output.reduced >> k & 1) sizes[k] = Int(1);
  }
  return sizes;
}

at::Device common_device(at::TensorList operands) {
  const at::Device device = operands.empty() ? at::Device(at::kCPU) : operands[0].device();
  for (std::size_t i = 0; i < operands.size(); ++i) {
    TORCH_CHECK_VALUE(operands[i].device() == device, "wengert::fused: operand ", i, " is on ", operands[i].device(),
                      ", operand 0 on ", device, "; all have to be on one device");
  }
  return device;
}

// The kernel of every device that has an evaluator.
std::vector<at::Tensor> fused_dense(at::TensorList operands, std::string_view text) {
  std::shared_ptr<const fused::Program> program = load(text);
  auto extents = infer_extents<std::int64_t>(*program, operands, [](const at::Tensor& t) { return t.sizes(); });
  const int rank = program->rank();
  const at::Device device = common_device(operands);
  c10::SmallVector<OperandView, 8> inputs;
  c10::SmallVector<std::int64_t, 64> strides(operands.size() * rank);
  for (std::size_t i = 0; i < operands.size(); ++i) {
    const at::Tensor& operand = operands[i];
    TORCH_CHECK_VALUE(operand.layout() == at::kStrided, "wengert::fused: operand ", i, " has layout ", operand.layout(),
                      "; only strided tensors are supported");
    TORCH_CHECK_VALUE(!operand.is_neg(), "wengert::fused: operand ", i, " has a pending negation");
    for (int k = 0; k < rank; ++k) strides[i * rank + k] = operand.size(k) == 1 ? 0 : operand.stride(k);
    inputs.push_back({operand.const_data_ptr(), to_dtype(operand.scalar_type()), strides.data() + i * rank});
  }
  std::vector<at::Tensor> results;
  c10::SmallVector<OutputView, 4> outputs;
  results.reserve(program->outputs().size());
  for (const fused::OutputSpec& output : program->outputs()) {
    results.push_back(at::empty(output_sizes(extents, output), at::device(device).dtype(to_scalar_type(output.dtype))));
    outputs.push_back({results.back().mutable_data_ptr(), output.dtype, results.back().strides().data(), false});
  }
  evaluate(device, *program, extents, inputs, outputs);
  return results;
}

std::vector<at::Tensor> fused_meta(at::TensorList operands, std::string_view text) {
  std::shared_ptr<const fused::Program> program = load(text);
  common_device(operands);
  auto extents = infer_extents<c10::SymInt>(*program, operands, [](const at::Tensor& t) { return t.sym_sizes(); });
  std::vector<at::Tensor> results;
  for (const fused::OutputSpec& output : program->outputs()) {
    results.push_back(at::empty_symint(output_sizes(extents, output), at::device(at::kMeta).dtype(to_scalar_type(output.dtype))));
  }
  return results;
}

}  // namespace

bool is_supported(at::ScalarType type) { return find_dtype(type) >= 0; }
fused::Dtype to_dtype(at::ScalarType type) {
  int found = find_dtype(type);
  TORCH_CHECK_VALUE(found >= 0, "wengert::fused: unsupported element type ", type);
  return static_cast<fused::Dtype>(found);
}
at::ScalarType to_scalar_type(fused::Dtype dtype) { return kScalarTypes[static_cast<int>(dtype)]; }

std::shared_ptr<const fused::Program> load(std::string_view text) {
  try {
    return fused::intern(text);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

namespace {

using FusedOp = c10::TypedOperatorHandle<std::vector<at::Tensor>(at::TensorList, std::string_view)>;

const FusedOp& fused_op() {
  static const FusedOp op = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("wengert::fused", "")
                                .typed<std::vector<at::Tensor>(at::TensorList, std::string_view)>();
  return op;
}

}  // namespace

std::vector<at::Tensor> fused(at::TensorList operands, std::string_view program) { return fused_op().call(operands, program); }

TORCH_LIBRARY(wengert, m) { m.def("fused(Tensor[] operands, str program) -> Tensor[]", {at::Tag::pt2_compliant_tag}); }
[[maybe_unused]] const FusedOp& made_at_load = fused_op();  // see common::ForkSafeMutex; after its schema
TORCH_LIBRARY_IMPL(wengert, CPU, m) { m.impl("fused", fused_dense); }
TORCH_LIBRARY_IMPL(wengert, CUDA, m) { m.impl("fused", fused_dense); }
TORCH_LIBRARY_IMPL(wengert, Meta, m) { m.impl("fused", fused_meta); }

}  // namespace wengert::ops
