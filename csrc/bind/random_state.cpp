#include "bind/random_state.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>

namespace py = pybind11;

namespace wengert::bind {
namespace {

// The states of the default generators of the CPU and of one device.  The CPU's is copied as it is: as a tensor it costs 2 us.
// Meanwhile the seed it remembers, which no number is drawn from, is another: a function that seeds the generator itself may well
// leave it in the state it found it in.
class RandomState {
 public:
  explicit RandomState(const at::Device& device) : cpu_(at::detail::getDefaultCPUGenerator()), before_(state_of_cpu()) {
    mark();
    if (device.type() == at::kCPU) return;
    device_ = at::globalContext().defaultGenerator(device);
    device_before_ = state_of_device();
  }

  ~RandomState() { unmark(); }
  RandomState(const RandomState&) = delete;
  RandomState& operator=(const RandomState&) = delete;

  bool drawn() {
    const bool seeded = !unmark();
    if (seeded || !(state_of_cpu() == before_)) return true;
    if (!device_.defined()) return false;
    const at::Tensor now = state_of_device();
    return std::memcmp(now.const_data_ptr(), device_before_.const_data_ptr(), now.nbytes()) != 0;
  }

  void restore() {
    marked_ = false;
    {
      std::lock_guard<std::mutex> lock(cpu_.mutex());
      auto* cpu = at::check_generator<at::CPUGeneratorImpl>(cpu_);
      cpu->set_engine(before_.engine);
      cpu->set_next_float_normal_sample(before_.next_float);
      cpu->set_next_double_normal_sample(before_.next_double);
    }
    if (!device_.defined()) return;
    std::lock_guard<std::mutex> lock(device_.mutex());
    device_.set_state(device_before_);
  }

 private:
  struct CpuState {
    at::mt19937 engine;
    std::optional<float> next_float;
    std::optional<double> next_double;

    bool operator==(const CpuState& other) const {
      const at::mt19937_data_pod &a = engine.data(), &b = other.engine.data();
      return a.left_ == b.left_ && a.next_ == b.next_ && a.seed_ == b.seed_ && a.state_ == b.state_ &&
             next_float == other.next_float && next_double == other.next_double;
    }
  };

  CpuState state_of_cpu() {
    std::lock_guard<std::mutex> lock(cpu_.mutex());
    auto* cpu = at::check_generator<at::CPUGeneratorImpl>(cpu_);
    return {cpu->engine(), cpu->next_float_normal_sample(), cpu->next_double_normal_sample()};
  }

  static constexpr std::uint64_t kMark = 0x57454e4745525400;  // no seed that anyone gives

  static void remember(at::CPUGeneratorImpl* cpu, std::uint64_t seed) {
    at::mt19937 engine = cpu->engine();
    at::mt19937_data_pod data = engine.data();
    data.seed_ = seed;
    engine.set_data(data);
    cpu->set_engine(engine);
  }

  void mark() {
    std::lock_guard<std::mutex> lock(cpu_.mutex());
    remember(at::check_generator<at::CPUGeneratorImpl>(cpu_), before_.engine.data().seed_ ^ kMark);
    marked_ = true;
  }

  // Whether the mark was there still.
  bool unmark() {
    if (!marked_) return true;
    marked_ = false;
    std::lock_guard<std::mutex> lock(cpu_.mutex());
    auto* cpu = at::check_generator<at::CPUGeneratorImpl>(cpu_);
    const std::uint64_t seed = before_.engine.data().seed_;
    if (cpu->engine().data().seed_ != (seed ^ kMark)) return false;
    remember(cpu, seed);
    return true;
  }

  at::Tensor state_of_device() {
    std::lock_guard<std::mutex> lock(device_.mutex());
    return device_.get_state();
  }

  at::Generator cpu_, device_;
  CpuState before_;
  at::Tensor device_before_;
  bool marked_ = false;
};

}  // namespace

void define_random_state(py::module_ m) {
  py::class_<RandomState>(m, "RandomState")
      .def(py::init<at::Device>())
      .def("drawn", &RandomState::drawn)
      .def("restore", &RandomState::restore);
}

}  // namespace wengert::bind
