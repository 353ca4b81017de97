#include "tape/pass.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/graph_task.h>

#include <exception>
#include <limits>
#include <stdexcept>
#include <unordered_map>

#include "common/node_ptr.h"
#include "tape/tape.h"

namespace wengert::tape {

namespace {

namespace autograd = torch::autograd;

class Body : public autograd::Node {
 public:
  // Before whatever waits in the thread's queue.
  Body() : Node(std::numeric_limits<std::uint64_t>::max()) {}
  std::string name() const override { return "wengert"; }

  autograd::variable_list apply(autograd::variable_list&&) override {
    started = true;
    try {
      const autograd::AutoGradMode mode(grad_mode);
      (*run)();
    } catch (...) {
      error = std::current_exception();
      throw std::runtime_error("wengert");  // for the engine, which would hand Python's errors to Python at once
    }
    return {};
  }

  const std::function<void()>* run = nullptr;
  bool grad_mode = false, started = false;
  std::exception_ptr error;
};

// What nodes consult: nothing in it means that all of their gradients are wanted.
std::unordered_map<autograd::Node*, autograd::GraphTask::ExecInfo>* info_of_pass() {
  // A member of the pass itself, which is not constant.
  using Info = std::unordered_map<autograd::Node*, autograd::GraphTask::ExecInfo>;
  return const_cast<Info*>(autograd::get_current_graph_task_exec_info());
}

}  // namespace

bool inside_pass() { return autograd::get_current_graph_task_id() != -1; }

void in_own_pass(bool keep_graph, const std::function<void()>& body) {
  const at::Tensor nothing = at::detail::empty_cpu({0}, at::kFloat);
  auto node = common::make_node<Body>();
  node->add_input_metadata(nothing);
  node->run = &body;
  node->grad_mode = at::GradMode::is_enabled();
  try {
    autograd::Engine::get_default_engine().execute({autograd::Edge(node, 0)}, {nothing}, keep_graph, /*create_graph=*/false,
                                                   /*accumulate_grad=*/true);
  } catch (const std::exception& error) {
    if (!node->started) throw Unsupported(std::string("PyTorch's engine does not run a pass at this place: ") + error.what());
    if (node->error) std::rethrow_exception(node->error);
    throw;  // of a callback at the end of the pass
  }
}

bool Wanted::are_some(const autograd::Node& fn, const std::vector<bool>& wanted) {
  for (std::size_t j = 0; j < wanted.size(); ++j) {
    if (!wanted[j] && fn.next_edge(j).is_valid()) return true;
  }
  return false;
}

Wanted::Wanted(const autograd::Node& fn, const std::vector<bool>& wanted) {
  auto* const info = info_of_pass();
  if (info == nullptr || !are_some(fn, wanted)) return;
  for (std::size_t j = 0; j < wanted.size(); ++j) {
    if (wanted[j]) (*info)[fn.next_edge(j).function.get()].needed_ = true;
  }
}

Wanted::~Wanted() {
  if (auto* const info = info_of_pass()) info->clear();
}

}  // namespace wengert::tape
