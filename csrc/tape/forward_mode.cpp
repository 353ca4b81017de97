#include "tape/forward_mode.h"

#include <torch/csrc/autograd/generated/Functions.h>

#include <string_view>
#include <typeindex>
#include <unordered_map>

#include "common/behind.h"

namespace wengert::tape {

namespace {

using torch::autograd::Node;

// Found by comparing torch.func.jacfwd and jacrev over the operator database, at ties and at other points.
constexpr std::string_view kDiffers =
    " CholeskyInverseBackward0 FmaxBackward0 FminBackward0 IndexCopyBackward0 IndexPutBackward0 LinalgCholeskyExBackward0 "
    "LinalgEighBackward0 MaxUnpool2DBackward0 MaxUnpool3DBackward0 PolarBackward0 PreluKernelBackward0 PutBackward0 "
    "ScatterBackward0 ScatterReduceBackward0 TriangularSolveBackward0 ";
constexpr std::string_view kMasks = " MaskedFillBackward0 MaskedFillBackward1 MaskedScatterBackward0 WhereBackward0 ";

enum class Role { plain, differs, masks };

Role role_of(const Node& node) {
  thread_local std::unordered_map<std::type_index, Role> known;  // names are made anew on every call
  const auto [at, is_new] = known.try_emplace(typeid(node), Role::plain);
  if (is_new) {
    const std::string name = " " + node.name() + " ";
    if (kDiffers.find(name) != std::string_view::npos) at->second = Role::differs;
    if (kMasks.find(name) != std::string_view::npos) at->second = Role::masks;
  }
  return at->second;
}

// Of which PyTorch's forward mode makes zeros.
bool scatters_products(const Node& node) {
  const auto* scatter = dynamic_cast<const torch::autograd::generated::ScatterReduceBackward0*>(&node);
  return scatter != nullptr && scatter->reduce == "prod";
}

}  // namespace

ForwardMode forward_mode(at::TensorList outputs, at::TensorList inputs) {
  ForwardMode out;
  common::visit_behind(outputs, inputs, [&](const Node& node) {
    const Role role = scatters_products(node) ? Role::plain : role_of(node);
    out.masks = out.masks || role == Role::masks;
    if (role == Role::differs) out.differs = node.name();
    return role != Role::differs;
  });
  return out;
}

}  // namespace wengert::tape
