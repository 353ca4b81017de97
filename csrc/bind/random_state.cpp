#include "bind/random_state.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace wengert::bind {
namespace {

// The states of the default generators of the CPU and of one device.  The CPU's is copied as it is: as a tensor it costs 2 us.
class States {
 public:
  explicit States(const at::Device& device) {
    {
      at::Generator generator = at::detail::getDefaultCPUGenerator();
      std::lock_guard<std::mutex> lock(generator.mutex());
      auto* cpu = at::check_generator<at::CPUGeneratorImpl>(generator);
      engine_ = cpu->engine();
      next_float_ = cpu->next_float_normal_sample();
      next_double_ = cpu->next_double_normal_sample();
    }
    if (device.type() == at::kCPU) return;
    at::Generator generator = at::globalContext().defaultGenerator(device);
    std::lock_guard<std::mutex> lock(generator.mutex());
    device_ = generator.get_state();
  }

  bool operator==(const States& other) const {
    const at::mt19937_data_pod &a = engine_.data(), &b = other.engine_.data();
    if (a.left_ != b.left_ || a.next_ != b.next_ || a.seed_ != b.seed_ || a.state_ != b.state_) return false;
    if (next_float_ != other.next_float_ || next_double_ != other.next_double_) return false;
    return !device_.defined() || std::memcmp(device_.const_data_ptr(), other.device_.const_data_ptr(), device_.nbytes()) == 0;
  }

  void restore(const at::Device& device) const {
    {
      at::Generator generator = at::detail::getDefaultCPUGenerator();
      std::lock_guard<std::mutex> lock(generator.mutex());
      auto* cpu = at::check_generator<at::CPUGeneratorImpl>(generator);
      cpu->set_engine(engine_);
      cpu->set_next_float_normal_sample(next_float_);
      cpu->set_next_double_normal_sample(next_double_);
    }
    if (!device_.defined()) return;
    at::Generator generator = at::globalContext().defaultGenerator(device);
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(device_);
  }

 private:
  at::mt19937 engine_;
  std::optional<float> next_float_;
  std::optional<double> next_double_;
  at::Tensor device_;
};

// Whether the operator may draw random numbers.  Known by the address of its name, as asking for more costs as much as a call.
bool may_draw(const at::RecordFunction& function) {
  thread_local std::unordered_map<const char*, bool> known;
  const auto found = known.find(function.name());
  if (found != known.end()) return found->second;
  const std::optional<c10::OperatorName> name = function.operator_name();
  if (!name) return false;  // no operator
  const auto op = c10::Dispatcher::singleton().findOp(*name);
  const bool tells = op && std::string_view(name->name).starts_with("aten::");
  return known[function.name()] = !tells || op->hasTag(at::Tag::nondeterministic_seeded);
}

// What one thread draws from generators that all threads share: the operators that it calls, and whether one of them moved one.
struct Draws {
  explicit Draws(const at::Device& device) : device(device) {}

  at::Device device;
  bool any = false;
  int depth = 0;  // of operators that may draw, one calling another
  std::atomic<bool> over = false;
};

thread_local std::vector<std::shared_ptr<Draws>> watched;
thread_local std::optional<at::CallbackHandle> callback;

struct Before : at::ObserverContext {
  std::vector<std::pair<std::shared_ptr<Draws>, std::optional<States>>> states;
};

std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& function) {
  if (watched.empty() || !may_draw(function)) return nullptr;
  std::erase_if(watched, [](const auto& draws) { return draws->over.load(); });  // by another thread
  auto before = std::make_unique<Before>();
  for (const auto& draws : watched) {
    before->states.emplace_back(draws, std::nullopt);
    if (draws->depth++ == 0) before->states.back().second.emplace(draws->device);
  }
  return before;
}

void leave(const at::RecordFunction&, at::ObserverContext* context) {
  if (context == nullptr) return;
  for (auto& [draws, before] : static_cast<Before*>(context)->states) {
    --draws->depth;
    if (before && !draws->any) draws->any = !(*before == States(draws->device));
  }
}

// From its construction until it is over, and so that what the function did to the generators can be undone.  Where it does not
// watch the thread's operators, a fifth of the time of a small function, it only compares: what other threads draw counts too,
// and not what a function draws and puts back.
class RandomState {
 public:
  RandomState(const at::Device& device, bool watches) : device_(device), before_(device) {
    if (!watches) return;
    draws_ = std::make_shared<Draws>(device);
    watched.push_back(draws_);
    if (!callback) {
      callback = at::addThreadLocalCallback(at::RecordFunctionCallback(&enter, &leave).scopes({at::RecordScope::FUNCTION}));
    }
  }

  ~RandomState() { end(); }
  RandomState(const RandomState&) = delete;
  RandomState& operator=(const RandomState&) = delete;

  void end() {
    if (!draws_ || draws_->over.exchange(true)) return;
    std::erase(watched, draws_);
    if (!watched.empty() || !callback) return;
    at::removeCallback(*callback);
    callback.reset();
  }

  bool drawn() {
    end();
    return draws_ ? draws_->any : !(before_ == States(device_));
  }

  void restore() {
    if (draws_ && drawn()) before_.restore(device_);  // the numbers of other threads stay drawn
  }

 private:
  at::Device device_;
  States before_;
  std::shared_ptr<Draws> draws_;
};

}  // namespace

void define_random_state(py::module_ m) {
  py::class_<RandomState>(m, "RandomState")
      .def(py::init<at::Device, bool>(), py::arg("device"), py::arg("watches"))
      .def("end", &RandomState::end)
      .def("drawn", &RandomState::drawn)
      .def("restore", &RandomState::restore);
}

}  // namespace wengert::bind
