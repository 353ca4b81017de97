#include "bind/random_state.h"

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <mutex>
#include <vector>

namespace py = pybind11;

namespace wengert::bind {
namespace {

// The states of the default generators of the CPU and of one device.
class RandomState {
 public:
  explicit RandomState(const at::Device& device) {
    remember(at::kCPU);
    if (device.type() != at::kCPU) remember(device);
  }

  bool drawn() {
    for (auto& [generator, before] : states_) {
      const at::Tensor now = state(generator);
      if (std::memcmp(now.const_data_ptr(), before.const_data_ptr(), before.nbytes()) != 0) return true;
    }
    return false;
  }

  void restore() {
    for (auto& [generator, before] : states_) {
      std::lock_guard<std::mutex> lock(generator.mutex());
      generator.set_state(before);
    }
  }

 private:
  struct Entry {
    at::Generator generator;
    at::Tensor before;
  };

  void remember(at::Device device) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    at::Tensor before = state(generator);
    states_.push_back({std::move(generator), std::move(before)});
  }

  static at::Tensor state(at::Generator& generator) {
    std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.get_state();
  }

  std::vector<Entry> states_;
};

}  // namespace

void define_random_state(py::module_ m) {
  py::class_<RandomState>(m, "RandomState")
      .def(py::init<at::Device>())
      .def("drawn", &RandomState::drawn)
      .def("restore", &RandomState::restore);
}

}  // namespace wengert::bind
