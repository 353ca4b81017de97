#include "tape/custom.h"

#include <cstring>
#include <typeinfo>

#include <ATen/record_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include "common/behind.h"

namespace wengert::tape {

namespace {

PythonKnowledge python;

}  // namespace

// PyTorch does not export the type that all Functions written in Python share; each of those in C++ has one of a template.
bool is_custom(const torch::autograd::Node& fn) {
  const char* type = typeid(fn).name();
  return std::strstr(type, "PyNode") != nullptr || std::strstr(type, "CppNode") != nullptr;
}

bool has_tensor_hooks(torch::autograd::Node& fn) { return !fn.tensor_pre_hooks().empty() || !fn.retains_grad_hooks().empty(); }

bool has_node_hooks(const torch::autograd::Node& fn) { return !fn.pre_hooks().empty() || !fn.post_hooks().empty(); }

bool passes_custom(at::TensorList outputs, at::TensorList inputs) {
  const auto is_plain = [](torch::autograd::Node& fn) { return !is_custom(fn) && !has_tensor_hooks(fn) && !has_node_hooks(fn); };
  return !common::visit_behind(outputs, inputs, is_plain);
}

bool passes_hooks(at::TensorList outputs, at::TensorList inputs) {
  const auto has_none = [](torch::autograd::Node& fn) { return !has_tensor_hooks(fn) && !has_node_hooks(fn); };
  return !common::visit_behind(outputs, inputs, has_none);
}

bool is_older(const torch::autograd::Node& fn, at::TensorList leaves, std::uint64_t begun) {
  if (fn.thread_id() == at::RecordFunction::currentThreadId()) return fn.sequence_nr() < begun;
  return !common::leads_to(fn, leaves);
}

void drop_hooks(at::TensorList outputs, at::TensorList inputs, std::uint64_t begun) {
  common::visit_behind(outputs, inputs, [inputs, begun](torch::autograd::Node& fn) {
    if (typeid(fn) == typeid(torch::autograd::AccumulateGrad)) return true;
    if ((!has_tensor_hooks(fn) && !has_node_hooks(fn)) || is_older(fn, inputs, begun)) return true;
    fn.tensor_pre_hooks().clear();
    fn.retains_grad_hooks().clear();
    fn.pre_hooks().clear();
    fn.post_hooks().clear();
    return true;
  });
}

void set_python_knowledge(const PythonKnowledge& knowledge) { python = knowledge; }

bool saves_through_hooks(const torch::autograd::Node& fn) {
  return python.saves_through_hooks != nullptr && python.saves_through_hooks(fn);
}

bool may_retry(const std::exception& error) { return python.may_retry == nullptr || python.may_retry(error); }

}  // namespace wengert::tape
