#include "bind/random_state.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/LegacyVmapMode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include <torch/library.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ops/backend.h"
#include "ops/graph_stream.h"

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
      read(*at::check_generator<at::CPUGeneratorImpl>(generator));
    }
    if (device.type() == at::kCPU) return;
    at::Generator generator = at::globalContext().defaultGenerator(device);
    std::lock_guard<std::mutex> lock(generator.mutex());
    device_ = generator.get_state();
  }

  bool operator==(const States& other) const { return same_here(other) && same_on_device(other.device_); }

  // Goes back to these states, a generator only from `last`, where that is given: what others have drawn since stays drawn.
  void restore(const at::Device& device, const States* last = nullptr) const {
    {
      at::Generator generator = at::detail::getDefaultCPUGenerator();
      std::lock_guard<std::mutex> lock(generator.mutex());
      auto* cpu = at::check_generator<at::CPUGeneratorImpl>(generator);
      States now;
      now.read(*cpu);
      if (last == nullptr || now.same_here(*last)) {
        cpu->set_engine(engine_);
        cpu->set_next_float_normal_sample(next_float_);
        cpu->set_next_double_normal_sample(next_double_);
      }
    }
    if (!device_.defined()) return;
    at::Generator generator = at::globalContext().defaultGenerator(device);
    std::lock_guard<std::mutex> lock(generator.mutex());
    if (last == nullptr || last->same_on_device(generator.get_state())) generator.set_state(device_);
  }

 private:
  States() = default;

  void read(const at::CPUGeneratorImpl& cpu) {
    auto& generator = const_cast<at::CPUGeneratorImpl&>(cpu);  // whose accessors are not const
    engine_ = generator.engine();
    next_float_ = generator.next_float_normal_sample();
    next_double_ = generator.next_double_normal_sample();
  }

  bool same_here(const States& other) const {
    const at::mt19937_data_pod &a = engine_.data(), &b = other.engine_.data();
    if (a.left_ != b.left_ || a.next_ != b.next_ || a.seed_ != b.seed_ || a.state_ != b.state_) return false;
    return next_float_ == other.next_float_ && next_double_ == other.next_double_;
  }

  bool same_on_device(const at::Tensor& state) const {
    return !device_.defined() || std::memcmp(device_.const_data_ptr(), state.const_data_ptr(), device_.nbytes()) == 0;
  }

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

// What one thread draws from generators that all threads share: the operators that it calls, and how they moved them.
struct Draws {
  explicit Draws(const at::Device& device) : device(device) {}

  at::Device device;
  std::optional<States> first, last;  // before and after all that moved one
  bool alone = true;                  // no other thread drew in between
  int depth = 0;                      // of operators that may draw, one calling another
  std::atomic<bool> over = false;

  void drew(States before, States after) {
    if (before == after) return;
    if (!first) {
      first.emplace(std::move(before));
    } else if (!(*last == before)) {
      alone = false;
    }
    last.emplace(std::move(after));
  }
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
    if (before) draws->drew(*std::move(before), States(draws->device));
  }
}

// So that what a function did to the generators since can be undone.  Where `others` may draw at the same time it watches, until
// it is over, and undoes what this thread's operators did, unless another thread drew in between.
class RandomState {
 public:
  RandomState(const at::Device& device, bool others) : device_(device) {
    if (!others) {
      before_.emplace(device);
      return;
    }
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

  void restore() {
    if (before_) {
      before_->restore(device_);
      return;
    }
    end();
    if (draws_->first && draws_->alone) draws_->first->restore(device_, &*draws_->last);
    for (const auto& outer : watched) {  // which have seen the same draws
      if (outer->last && draws_->last && *outer->last == *draws_->last) outer->last = draws_->first;
    }
    draws_->first.reset();
  }

 private:
  at::Device device_;
  std::optional<States> before_;
  std::shared_ptr<Draws> draws_;
};

// PyTorch has such a rule: under its first vmap, which only autograd.grad(is_grads_batched=True) uses today, random operators
// raise an error before they draw; a key of the dispatcher, included for a thread, brings its kernels in.  It knows operators
// that others are made of, but for those that draw in their own kernels:
constexpr std::array kDrawThemselves{
    "_cudnn_rnn",
    "_efficient_attention_forward",
    "_flash_attention_forward",
    "_fused_dropout",
    "_sample_dirichlet",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_standard_gamma",
    "binomial",
    "native_dropout",
    "rrelu_with_noise",
    "rrelu_with_noise_",
};

thread_local bool forbidden = false;

// Nothing but what moves a generator is an error: attention without dropout draws nothing.
void refuse_draws(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto is_zero = [](const c10::IValue& value) { return value.isDouble() && value.toDouble() == 0; };
  const std::string& name = op.schema().name();
  bool draws = forbidden;
  for (std::size_t k = 0; draws && k < op.schema().arguments().size(); ++k) {
    const c10::IValue& value = stack->at(stack->size() - op.schema().arguments().size() + k);
    const std::string& argument = op.schema().arguments()[k].name();
    if ((argument == "dropout_p" || argument == "dropout") && is_zero(value)) draws = false;
    if ((argument == "training" || argument == "train") && value.isBool() && !value.toBool()) draws = false;
  }
  TORCH_CHECK(!draws, "vmap: We do not yet support calling random operations inside of vmap: ", name);
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::VmapMode), stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, VmapMode, m) {
  for (const char* name : kDrawThemselves) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_draws>());
}

py::object without_draws(const py::object& function) {
  const bool outer = std::exchange(forbidden, true);
  struct Back {
    bool outer;
    ~Back() {
      forbidden = outer;
      at::impl::VmapMode::decrement_nesting();
    }
  };
  at::impl::VmapMode::increment_nesting();  // counted, so that a vmap of the function's own leaves it at that
  const Back back{outer};
  return function();
}

// A number that is another one where the default generators of the CPU and of the device are in another state.
std::uint64_t position_of(const at::Device& device) {
  std::uint64_t hash = 0;
  const auto mix = [&hash](std::uint64_t word) { hash = (hash ^ word) * 0x9E3779B97F4A7C15ull ^ hash >> 32; };
  {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    auto* cpu = at::check_generator<at::CPUGeneratorImpl>(generator);
    const at::mt19937 engine = cpu->engine();
    const at::mt19937_data_pod& data = engine.data();
    mix(data.seed_);
    mix(static_cast<std::uint64_t>(data.left_) << 32 | data.next_);
    mix(data.state_[0]);  // which every new block of numbers changes
    mix(cpu->next_float_normal_sample() ? std::bit_cast<std::uint32_t>(*cpu->next_float_normal_sample()) : 1);
    mix(cpu->next_double_normal_sample() ? std::bit_cast<std::uint64_t>(*cpu->next_double_normal_sample()) : 1);
  }
  if (device.type() != at::kCPU) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    std::lock_guard<std::mutex> lock(generator.mutex());
    mix(generator.current_seed());
    mix(generator.get_offset());
  }
  return hash;
}

// States to go back to, without regard to other threads.  Most functions draw nothing: as long as the generators stay where they
// are, the thread's calls share one.
struct GeneratorMark {
  at::Device device;
  std::uint64_t position;
  States states;

  void restore() const {
    if (position_of(device) != position) states.restore(device);
  }
};

std::shared_ptr<GeneratorMark> mark_generators(at::Device device) {
  thread_local std::shared_ptr<GeneratorMark> latest;
  // Nobody may look at a generator that a CUDA graph captures.
  if (!device.is_cpu() && ops::is_capturing(ops::current_stream(device))) device = at::kCPU;
  const std::uint64_t position = position_of(device);
  if (!latest || latest->position != position || latest->device != device) {
    latest = std::make_shared<GeneratorMark>(GeneratorMark{device, position, States(device)});
  }
  return latest;
}

void define_random_state(py::module_ m) {
  py::class_<GeneratorMark, std::shared_ptr<GeneratorMark>>(m, "GeneratorMark").def("restore", &GeneratorMark::restore);
  m.def("mark_generators", &mark_generators, py::arg("device"));
  py::class_<RandomState>(m, "RandomState")
      .def(py::init<at::Device, bool>(), py::arg("device"), py::arg("others"))
      .def("end", &RandomState::end)
      .def("restore", &RandomState::restore);
}

}  // namespace wengert::bind
