#include "tape/custom.h"

#include <cstring>
#include <typeinfo>

namespace wengert::tape {

namespace {

PythonKnowledge python;

}  // namespace

// PyTorch does not export the type that all Functions written in Python share; each of those in C++ has one of a template.
bool is_custom(const torch::autograd::Node& fn) {
  const char* type = typeid(fn).name();
  return std::strstr(type, "PyNode") != nullptr || std::strstr(type, "CppNode") != nullptr;
}

void set_python_knowledge(const PythonKnowledge& knowledge) { python = knowledge; }

bool saves_through_hooks(const torch::autograd::Node& fn) {
  return python.saves_through_hooks != nullptr && python.saves_through_hooks(fn);
}

bool may_retry(const std::exception& error) { return python.may_retry == nullptr || python.may_retry(error); }

}  // namespace wengert::tape
